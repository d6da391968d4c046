//! From a client's requests to the engine's, of which there may be several for one, and back.

use std::collections::HashMap;
use std::sync::Arc;

use quire_engine::{BeamSearch, Event, FinishReason, Parallel, ParallelSamples, Request, SamplingParams};
use quire_workloads::{Decoding, EarlyStopping, EventKind, GenerationRequest};

/// Ids of the engine's requests for one of the client's.
const STRIDE: u64 = Decoding::MOST as u64;

/// The requests under way that have several outputs.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    parallel: HashMap<u64, Open>,
    /// The end of the request whose tokens were given out last, where they come with it.
    end: Option<EventKind>,
}

/// Samples of one prompt.
#[derive(Debug, Default)]
struct Open {
    /// Those that have not ended.
    left: u32,
    preemptions: u32,
    /// Prompt tokens that the first found in a cache; the others share its prompt.
    cached: u32,
    was_refused: bool,
    was_cancelled: bool,
    /// Where the best are delivered: all that came so far.
    gathered: Option<ParallelSamples>,
}

impl Outputs {
    /// The engine's requests for a client's.
    pub(super) fn requests(&mut self, request: GenerationRequest) -> Vec<Request> {
        let GenerationRequest { id, prompt, max_tokens, true_output_len, class, decoding } = request;
        let single = Request {
            id: id * STRIDE,
            prompt,
            max_tokens,
            true_output_len,
            stop_tokens: Arc::new([]),
            sampling: Arc::default(),
            fork_of: None,
            beam: None,
            priority: class,
            cache_salt: 0,
        };
        match decoding {
            Decoding::Single {} => vec![single],
            Decoding::Beam { width, length_penalty, early_stopping } => {
                let early_stopping = match early_stopping {
                    EarlyStopping::Always => quire_engine::EarlyStopping::Always,
                    EarlyStopping::Unlikely => quire_engine::EarlyStopping::Unlikely,
                    EarlyStopping::Impossible => quire_engine::EarlyStopping::Impossible,
                };
                let beam = BeamSearch { width, length_penalty, early_stopping };
                vec![Request { beam: Some(beam), ..single }]
            }
            Decoding::Parallel { outputs, best_of } => {
                let sampling = SamplingParams { temperature: 1.0, seed: id, ..SamplingParams::default() };
                let first = Request { sampling: Arc::new(sampling), ..single };
                let mut next = first.id;
                let parallel = Parallel { n: outputs, best_of: best_of.unwrap_or(outputs) };
                let requests = parallel.requests(first, || {
                    next += 1;
                    next
                });
                let requests = requests.expect("a workload has as many outputs as an engine can give");
                let gathered = best_of.map(|_| ParallelSamples::new(parallel, &requests));
                self.parallel.insert(id, Open { left: parallel.best_of, gathered, ..Open::default() });
                requests
            }
        }
    }

    /// The engine's requests for a client's; some may have ended.
    pub(super) fn ids(&self, request: u64) -> impl Iterator<Item = u64> + use<> {
        let ids = if self.parallel.contains_key(&request) { STRIDE } else { 1 };
        (0..ids).map(move |index| request * STRIDE + index)
    }

    /// What an event of the engine's is to the client: the request and what happened, or nothing.
    pub(super) fn translate(&mut self, event: Event) -> Option<(u64, EventKind)> {
        let (id, index) = (event.id() / STRIDE, event.id() % STRIDE);
        if let Some(gathered) = self.parallel.get_mut(&id).and_then(|open| open.gathered.as_mut()) {
            gathered.observe(&event);
        }
        let kind = match event {
            Event::Token { sampled, .. } => EventKind::Tokens(vec![sampled.token]),
            Event::Hypotheses { hypotheses, .. } => {
                EventKind::Tokens(hypotheses.into_iter().flat_map(|found| found.tokens).collect())
            }
            Event::Finished { reason, preemptions, cached_tokens, .. } => {
                let reason = match reason {
                    FinishReason::Stop => quire_workloads::FinishReason::Stop,
                    FinishReason::Length => quire_workloads::FinishReason::Length,
                    FinishReason::KvExhausted => quire_workloads::FinishReason::KvExhausted,
                };
                EventKind::Finished { reason, preemptions, cached_tokens }
            }
            Event::Rejected { reason, .. } => EventKind::Rejected { reason },
            Event::Cancelled { .. } => EventKind::Cancelled,
        };
        let Some(open) = self.parallel.get_mut(&id) else { return Some((id, kind)) };
        if open.take(index, &kind) {
            let mut open = self.parallel.remove(&id)?;
            let gathered = open.gathered.take();
            let end = open.end(kind)?;
            return Some((id, self.with_best(gathered, end)));
        }
        match kind {
            EventKind::Tokens(_) if open.gathered.is_some() => None,
            EventKind::Tokens(_) if !open.was_refused => Some((id, kind)),
            // The first refusal is the whole request's; what ran is cancelled.
            EventKind::Rejected { .. } if !std::mem::replace(&mut open.was_refused, true) => Some((id, kind)),
            _ => None,
        }
    }
}

impl Outputs {
    /// The end of the request that the last event was of, if it comes with it.
    pub(super) fn take_end(&mut self) -> Option<EventKind> {
        self.end.take()
    }

    /// The tokens of the best of several samples, and their end after them; or only the end.
    fn with_best(&mut self, gathered: Option<ParallelSamples>, end: EventKind) -> EventKind {
        match (gathered.map(ParallelSamples::into_best), &end) {
            (Some(Ok(best)), EventKind::Finished { .. }) => {
                self.end = Some(end);
                EventKind::Tokens(best.into_iter().flat_map(|sample| sample.tokens).collect())
            }
            _ => end,
        }
    }
}

impl Open {
    /// Takes an event of one sample in; whether all have ended now.
    fn take(&mut self, index: u64, kind: &EventKind) -> bool {
        match kind {
            EventKind::Tokens(_) => return false,
            EventKind::Finished { preemptions, cached_tokens, .. } => {
                self.preemptions += preemptions;
                if index == 0 {
                    self.cached = *cached_tokens;
                }
            }
            EventKind::Cancelled => self.was_cancelled = true,
            EventKind::Rejected { .. } | EventKind::Failed { .. } => {}
        }
        self.left -= 1;
        self.left == 0
    }

    /// What the request's end is, the last sample's being `last`.
    fn end(self, last: EventKind) -> Option<EventKind> {
        if self.was_refused {
            return None;
        }
        match last {
            EventKind::Rejected { .. } => Some(last),
            _ if self.was_cancelled => Some(EventKind::Cancelled),
            EventKind::Finished { reason, .. } => {
                let (preemptions, cached_tokens) = (self.preemptions, self.cached);
                Some(EventKind::Finished { reason, preemptions, cached_tokens })
            }
            other => Some(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use quire_engine::Refusal;

    use super::*;

    fn asked(id: u64, decoding: Decoding) -> GenerationRequest {
        GenerationRequest {
            id,
            prompt: vec![1, 2, 3],
            max_tokens: 4,
            true_output_len: Some(2),
            class: 1,
            decoding,
        }
    }

    fn finished(id: u64, preemptions: u32, cached_tokens: u32) -> Event {
        Event::Finished { id, reason: FinishReason::Stop, preemptions, cached_tokens }
    }

    #[test]
    fn samples_are_forks_and_end_together() {
        let mut outputs = Outputs::default();
        let requests = outputs.requests(asked(3, Decoding::parallel(3)));
        assert_eq!(requests.iter().map(|r| r.id).collect::<Vec<_>>(), [48, 49, 50]);
        assert!(requests[1..].iter().all(|r| r.fork_of == Some(48)) && requests[0].priority == 1);
        assert!(requests[0].sampling.seed != requests[1].sampling.seed);
        assert_eq!(outputs.ids(3).count(), 16);
        assert!(outputs.translate(finished(49, 1, 2)).is_none());
        assert!(outputs.translate(finished(48, 1, 0)).is_none());
        let reason = quire_workloads::FinishReason::Stop;
        let end = EventKind::Finished { reason, preemptions: 2, cached_tokens: 0 };
        assert_eq!(outputs.translate(finished(50, 0, 2)), Some((3, end)));
        assert_eq!(outputs.ids(3).count(), 1);
    }

    #[test]
    fn one_refusal_is_the_request_s() {
        let mut outputs = Outputs::default();
        outputs.requests(asked(0, Decoding::parallel(2)));
        let refused = |id| Event::Rejected { id, refusal: Refusal::QueueFull, reason: "full".into() };
        assert_eq!(outputs.translate(refused(1)), Some((0, EventKind::Rejected { reason: "full".into() })));
        assert!(outputs.translate(Event::Cancelled { id: 0 }).is_none());
        outputs.requests(asked(1, Decoding::parallel(2)));
        assert!(outputs.translate(finished(16, 0, 0)).is_none());
        assert_eq!(outputs.translate(Event::Cancelled { id: 17 }), Some((1, EventKind::Cancelled)));
    }

    #[test]
    fn of_more_samples_the_best_are_delivered_at_the_end() {
        let mut outputs = Outputs::default();
        let requests = outputs.requests(asked(1, Decoding::Parallel { outputs: 2, best_of: Some(3) }));
        assert_eq!(requests.iter().map(|r| r.id).collect::<Vec<_>>(), [16, 17, 18]);
        assert!(requests.iter().all(|r| r.sampling.logprobs));
        for (id, token, logprob) in
            [(16, 5, -1.0), (17, 6, -3.0), (18, 7, -2.0), (16, 8, -1.0), (18, 9, -2.0)]
        {
            let sampled = quire_engine::Sampled { token, logprob: Some(logprob), top: None };
            assert_eq!(outputs.translate(Event::Token { id, sampled }), None);
        }
        assert!(outputs.translate(finished(16, 0, 3)).is_none());
        assert!(outputs.translate(finished(17, 1, 2)).is_none() && outputs.take_end().is_none());
        let tokens = EventKind::Tokens(vec![5, 8, 7, 9]);
        assert_eq!(outputs.translate(finished(18, 0, 2)), Some((1, tokens)));
        let reason = quire_workloads::FinishReason::Stop;
        let end = EventKind::Finished { reason, preemptions: 1, cached_tokens: 3 };
        assert_eq!((outputs.take_end(), outputs.take_end()), (Some(end), None));
        // One that is cancelled delivers nothing.
        outputs.requests(asked(2, Decoding::Parallel { outputs: 1, best_of: Some(2) }));
        assert!(outputs.translate(finished(32, 0, 0)).is_none());
        assert_eq!(outputs.translate(Event::Cancelled { id: 33 }), Some((2, EventKind::Cancelled)));
        assert!(outputs.take_end().is_none());
    }

    #[test]
    fn what_is_wanted_of_a_prompt_is_read_and_checked() {
        #[derive(serde::Deserialize, serde::Serialize, PartialEq, Debug)]
        struct Panel {
            decoding: Decoding,
        }
        let read =
            |text: &str| toml::from_str::<Panel>(&format!("decoding = {{ {text} }}")).unwrap().decoding;
        let beam = read("kind = 'beam', width = 4, length_penalty = 0.6, early_stopping = 'always'");
        let always = EarlyStopping::Always;
        assert_eq!(beam, Decoding::Beam { width: 4, length_penalty: 0.6, early_stopping: always });
        assert_eq!(read("kind = 'beam', width = 4"), Decoding::beam(4));
        let best = read("kind = 'parallel', outputs = 1, best_of = 4");
        assert_eq!((best, best.outputs()), (Decoding::Parallel { outputs: 1, best_of: Some(4) }, 1));
        for decoding in
            [beam, best, Decoding::parallel(2), Decoding::beam(1), Decoding::beam(16), Decoding::Single {}]
        {
            decoding.validate().unwrap();
            let panel = Panel { decoding };
            assert_eq!(toml::from_str::<Panel>(&toml::to_string(&panel).unwrap()).unwrap(), panel);
        }
        // What was written before these settings is written the same.
        let text = toml::to_string(&Panel { decoding: Decoding::beam(4) }).unwrap();
        assert!(!text.contains("penalty") && !text.contains("early"), "{text}");
        for (text, expected) in [
            ("kind = 'parallel', outputs = 1", "choose 2 to 16"),
            ("kind = 'parallel', outputs = 2, best_of = 2", "choose 1 or more of up to 16 that are more"),
            ("kind = 'parallel', outputs = 2, best_of = 17", "best of 17"),
            ("kind = 'beam', width = 0", "choose 1 to 16"),
            ("kind = 'beam', width = 17", "choose 1 to 16"),
            ("kind = 'beam', width = 2, length_penalty = nan", "choose -100 to 100"),
        ] {
            let error = read(text).validate().unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_search_is_as_it_was_asked_for() {
        let early = EarlyStopping::Impossible;
        let decoding = Decoding::Beam { width: 9, length_penalty: -0.5, early_stopping: early };
        let beam = Outputs::default().requests(asked(1, decoding))[0].beam.unwrap();
        let early_stopping = quire_engine::EarlyStopping::Impossible;
        assert_eq!(beam, BeamSearch { width: 9, length_penalty: -0.5, early_stopping });
        let plain = Outputs::default().requests(asked(1, Decoding::beam(4)))[0].beam;
        assert_eq!(plain, Some(BeamSearch::new(4)));
    }

    #[test]
    fn beams_come_at_the_end() {
        let mut outputs = Outputs::default();
        let requests = outputs.requests(asked(2, Decoding::beam(4)));
        assert!(requests.len() == 1 && requests[0].beam.is_some_and(|beam| beam.width == 4));
        let one = |tokens: Vec<u32>| quire_engine::Hypothesis {
            tokens,
            logprob: -1.0,
            score: -1.0,
            reason: FinishReason::Stop,
        };
        let hypotheses = vec![one(vec![7, 8]), one(vec![7, 9])];
        let tokens = EventKind::Tokens(vec![7, 8, 7, 9]);
        assert_eq!(outputs.translate(Event::Hypotheses { id: 32, hypotheses }), Some((2, tokens)));
    }
}
