//! Several samples of one prompt: `n` outputs, the best of `best_of` that are generated.

use std::sync::Arc;

use quire_kernels::generated::mix;

use crate::{Event, FinishReason, Request, SamplingParams};

/// The most samples of one prompt.
pub const MAX_SAMPLES: u32 = 128;

/// How many outputs of a prompt are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parallel {
    /// Outputs returned: the most probable, by the mean of their tokens' log-probabilities.
    pub n: u32,
    /// Outputs generated.
    pub best_of: u32,
}

impl Parallel {
    /// Checks that every parameter has a meaning.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn validate(&self) -> Result<(), String> {
        if self.n == 0 || self.best_of > MAX_SAMPLES {
            return Err(format!("n is {} and best_of {}: choose 1 to {MAX_SAMPLES}", self.n, self.best_of));
        }
        if self.best_of < self.n {
            return Err(format!("best_of is {}, fewer than the {} to return", self.best_of, self.n));
        }
        Ok(())
    }

    /// The request of each sample, to be submitted in this order: the first is `request`, the others are forks of it with seeds
    /// of their own and the ids that `next_id` gives.
    ///
    /// # Errors
    /// As [`Self::validate`].
    pub fn requests(
        &self,
        request: Request,
        mut next_id: impl FnMut() -> u64,
    ) -> Result<Vec<Request>, String> {
        self.validate()?;
        let logprobs = request.sampling.logprobs || self.best_of > self.n;
        let sample = |index: u32| {
            let seed = match index {
                0 => request.sampling.seed,
                _ => mix(request.sampling.seed ^ mix(u64::from(index))),
            };
            Request {
                id: if index == 0 { request.id } else { next_id() },
                fork_of: if index == 0 { request.fork_of } else { Some(request.id) },
                sampling: Arc::new(SamplingParams { seed, logprobs, ..(*request.sampling).clone() }),
                ..request.clone()
            }
        };
        Ok((0..self.best_of).map(sample).collect())
    }
}

/// One output.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Sum of their log-probabilities, as far as they were asked for.
    pub logprob: f64,
    /// Why it ended; none of one that was cancelled.
    pub reason: Option<FinishReason>,
}

impl Sample {
    fn mean(&self) -> f64 {
        self.logprob / self.tokens.len().max(1) as f64
    }
}

/// Gathers the samples of one prompt from an engine's events.
#[derive(Debug)]
pub struct ParallelSamples {
    n: usize,
    ids: Vec<u64>,
    samples: Vec<Sample>,
    left: usize,
    refused: Option<String>,
}

impl ParallelSamples {
    /// For these requests, which [`Parallel::requests`] made.
    pub fn new(parallel: Parallel, requests: &[Request]) -> Self {
        Self {
            n: parallel.n as usize,
            ids: requests.iter().map(|request| request.id).collect(),
            samples: vec![Sample::default(); requests.len()],
            left: requests.len(),
            refused: None,
        }
    }

    /// Takes an event in. The index of the sample that it is about, if it is one of these.
    pub fn observe(&mut self, event: &Event) -> Option<usize> {
        let index = self.ids.iter().position(|id| *id == event.id())?;
        let sample = &mut self.samples[index];
        match event {
            // Steps that overlap may bring one more after its stop.
            Event::Token { .. } if sample.reason.is_some() => {}
            Event::Token { sampled, .. } => {
                sample.tokens.push(sampled.token);
                sample.logprob += f64::from(sampled.logprob.unwrap_or(0.0));
            }
            Event::Hypotheses { .. } => {}
            Event::Finished { reason, .. } => {
                sample.reason = Some(*reason);
                self.left -= 1;
            }
            Event::Rejected { reason, .. } => {
                self.refused.get_or_insert_with(|| reason.clone());
                self.left -= 1;
            }
            Event::Cancelled { .. } => self.left -= 1,
        }
        Some(index)
    }

    /// Ends a sample that is whole as it is, since its text came to a stop that tokens do not tell. Its request is to be
    /// cancelled.
    pub fn stop(&mut self, index: usize) {
        self.samples[index].reason.get_or_insert(FinishReason::Stop);
    }

    /// Whether all samples have ended.
    pub fn is_finished(&self) -> bool {
        self.left == 0
    }

    /// The samples to return, the best first where some were left out (those that were cancelled last), else in the order of their requests.
    ///
    /// # Errors
    /// Why the engine refused them.
    pub fn into_best(mut self) -> Result<Vec<Sample>, String> {
        if let Some(reason) = self.refused {
            return Err(reason);
        }
        if self.n < self.samples.len() {
            // What was cancelled early is not probable for being short.
            let rank = |sample: &Sample| (sample.reason.is_some(), sample.mean());
            self.samples.sort_by(|a, b| {
                let ((a, a_mean), (b, b_mean)) = (rank(a), rank(b));
                b.cmp(&a).then(b_mean.total_cmp(&a_mean))
            });
            self.samples.truncate(self.n);
        }
        Ok(self.samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_to_a_stop_is_whole() {
        let samples = vec![Sample::default(); 2];
        let mut samples = ParallelSamples { n: 1, ids: vec![0, 1], samples, left: 2, refused: None };
        let token = |id, token| {
            let sampled = crate::Sampled { token, logprob: Some(-1.0), top: None };
            Event::Token { id, sampled }
        };
        [token(0, 5), token(1, 6)].iter().for_each(|event| _ = samples.observe(event));
        samples.stop(1);
        let finished =
            Event::Finished { id: 0, reason: FinishReason::Length, preemptions: 0, cached_tokens: 0 };
        [token(1, 7), Event::Cancelled { id: 1 }, token(0, 5), finished].iter().for_each(|event| {
            samples.observe(event);
        });
        assert!(samples.is_finished());
        let stopped = Sample { tokens: vec![6], logprob: -1.0, reason: Some(FinishReason::Stop) };
        assert_eq!(samples.samples[1], stopped);
    }

    #[test]
    fn what_was_cancelled_ranks_last() {
        let sample = |tokens: usize, logprob, reason| Sample { tokens: vec![7; tokens], logprob, reason };
        let ended = Some(FinishReason::Length);
        let samples =
            vec![sample(0, 0.0, None), sample(4, -8.0, ended), sample(4, -4.0, ended), sample(1, -0.1, None)];
        let gathered = ParallelSamples { n: 3, ids: Vec::new(), samples, left: 0, refused: None };
        let best: Vec<f64> = gathered.into_best().unwrap().iter().map(|sample| sample.logprob).collect();
        assert_eq!(best, [-4.0, -8.0, 0.0]);
    }
}
