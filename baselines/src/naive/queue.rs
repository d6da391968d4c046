//! Who waits, who may come in, and when a batch is formed.

use std::collections::VecDeque;
use std::time::Duration;

use quire_workloads::{FinishReason, GenerationRequest};

/// A request that was let in.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) id: u64,
    pub(super) prompt: Vec<u32>,
    /// The most tokens it may get: what the server plans with.
    pub(super) limit: usize,
    /// Tokens it will get: the trace's end if that comes first. Not planned with.
    pub(super) end: usize,
    /// How it ends.
    pub(super) reason: FinishReason,
    arrived: Duration,
}

/// What requests must fit into.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) vocab_size: usize,
    pub(super) max_model_len: usize,
    pub(super) batch_size: usize,
    pub(super) batch_timeout: Duration,
    /// KV columns over all rows of a batch; `None` for no limit.
    pub(super) kv_slots: Option<u64>,
}

/// When the next batch can start.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ready {
    Now,
    At(Duration),
    Empty,
}

/// First come, first served; nobody overtakes.
#[derive(Debug)]
pub(super) struct Queue {
    limits: Limits,
    waiting: VecDeque<Waiting>,
}

/// KV columns set aside for rows of these lengths: each row as wide as the longest prompt and the longest output
/// that the server must expect, since rows of one tensor have one length.
fn reservation(rows: usize, longest_prompt: usize, longest_limit: usize) -> u64 {
    (rows as u64).saturating_mul(longest_prompt as u64 + longest_limit as u64)
}

impl Limits {
    /// Checks a request that arrived at `now`.
    fn admit(&self, request: GenerationRequest, now: Duration) -> Result<Waiting, String> {
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err("the prompt is empty".into());
        }
        if !request.decoding.is_single() {
            return Err("one output of a prompt is all that it gives".into());
        }
        if request.max_tokens == 0 || request.true_output_len == Some(0) {
            return Err("no output token is wanted".into());
        }
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(format!("token id {id} is outside the vocabulary of {}", self.vocab_size));
        }
        if prompt >= self.max_model_len {
            return Err(format!("a prompt of {prompt} leaves no room in {} tokens", self.max_model_len));
        }
        let limit = (request.max_tokens as usize).min(self.max_model_len - prompt);
        let wanted = reservation(1, prompt, limit);
        if let Some(slots) = self.kv_slots.filter(|slots| wanted > *slots) {
            return Err(format!("its KV may grow to {wanted} tokens, the memory holds {slots}"));
        }
        let traced = request.true_output_len.map_or(usize::MAX, |n| n as usize);
        let (end, reason) =
            if traced <= limit { (traced, FinishReason::Stop) } else { (limit, FinishReason::Length) };
        Ok(Waiting { id: request.id, prompt: request.prompt, limit, end, reason, arrived: now })
    }
}

impl Queue {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, waiting: VecDeque::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Lets a request in, or says why not.
    pub(super) fn push(&mut self, request: GenerationRequest, now: Duration) -> Result<(), String> {
        self.waiting.push_back(self.limits.admit(request, now)?);
        Ok(())
    }

    /// Takes a waiting request out; false when it does not wait here.
    pub(super) fn remove(&mut self, id: u64) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|w| w.id != id);
        self.waiting.len() < before
    }

    /// How many of the first requests make the next batch, and whether waiting longer could not add to it.
    fn next_batch(&self) -> (usize, bool) {
        let (mut prompt, mut limit) = (0, 0);
        for (count, request) in self.waiting.iter().enumerate() {
            if count == self.limits.batch_size {
                return (count, true);
            }
            prompt = prompt.max(request.prompt.len());
            limit = limit.max(request.limit);
            let wanted = reservation(count + 1, prompt, limit);
            if self.limits.kv_slots.is_some_and(|slots| wanted > slots) {
                return (count, true);
            }
        }
        (self.waiting.len(), self.waiting.len() == self.limits.batch_size)
    }

    /// When the next batch starts: at once if it is full or memory ends it, else when its oldest has waited enough.
    pub(super) fn ready(&self, now: Duration) -> Ready {
        let Some(oldest) = self.waiting.front() else { return Ready::Empty };
        let due = oldest.arrived.saturating_add(self.limits.batch_timeout);
        if now >= due || self.next_batch().1 { Ready::Now } else { Ready::At(due) }
    }

    /// Takes the next batch, and the KV columns set aside for it.
    pub(super) fn take_batch(&mut self) -> (Vec<Waiting>, u64) {
        let (count, _) = self.next_batch();
        let batch: Vec<Waiting> = self.waiting.drain(..count).collect();
        let prompt = batch.iter().map(|w| w.prompt.len()).max().unwrap_or(0);
        let limit = batch.iter().map(|w| w.limit).max().unwrap_or(0);
        let reserved = reservation(batch.len(), prompt, limit);
        (batch, reserved)
    }
}

#[cfg(test)]
mod tests {
    use quire_workloads::Decoding;

    use super::*;

    fn queue(kv_slots: Option<u64>) -> Queue {
        Queue::new(Limits {
            vocab_size: 10,
            max_model_len: 20,
            batch_size: 3,
            batch_timeout: Duration::from_secs(2),
            kv_slots,
        })
    }

    fn request(id: u64, prompt: usize, max_tokens: u32) -> GenerationRequest {
        GenerationRequest {
            id,
            prompt: vec![1; prompt],
            max_tokens,
            true_output_len: Some(2),
            class: 0,
            decoding: Decoding::Single {},
        }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_batch_starts_when_full_or_when_its_oldest_waited_enough() {
        let mut queue = queue(None);
        assert_eq!(queue.ready(at(0)), Ready::Empty);
        for id in 0..2 {
            queue.push(request(id, 4, 4), at(id)).unwrap();
        }
        assert_eq!(queue.ready(at(1)), Ready::At(at(2)));
        assert_eq!(queue.ready(at(2)), Ready::Now);
        for id in 2..5 {
            queue.push(request(id, 4, 4), at(1)).unwrap();
        }
        assert_eq!(queue.ready(at(1)), Ready::Now);
        let (batch, reserved) = queue.take_batch();
        assert_eq!(batch.iter().map(|w| w.id).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(reserved, 3 * 8);
        assert_eq!(queue.ready(at(1)), Ready::At(at(3)));
    }

    #[test]
    fn memory_ends_a_batch_by_its_padded_worst_case() {
        let mut queue = queue(Some(40));
        queue.push(request(0, 2, 16), at(0)).unwrap();
        // Padded together: 2 rows of (10 + 16); apart, 18 and 16 would fit.
        queue.push(request(1, 10, 6), at(0)).unwrap();
        assert_eq!(queue.ready(at(0)), Ready::Now);
        let (batch, reserved) = queue.take_batch();
        assert_eq!((batch.len(), reserved), (1, 18));
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn what_cannot_be_served_is_refused_with_the_reason() {
        let mut queue = queue(Some(15));
        let cases = [
            (request(0, 0, 1), "empty"),
            (request(1, 3, 0), "no output"),
            (request(2, 20, 1), "room"),
            (request(3, 8, 8), "16 tokens, the memory holds 15"),
            (GenerationRequest { prompt: vec![1, 10], ..request(4, 0, 1) }, "token id 10"),
        ];
        for (request, word) in cases {
            let reason = queue.push(request, at(0)).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
        assert_eq!(queue.len(), 0);
    }

    #[test]
    fn the_end_is_the_trace_s_unless_a_limit_comes_first() {
        let mut queue = queue(None);
        queue.push(request(0, 4, 9), at(0)).unwrap();
        queue.push(request(1, 4, 1), at(0)).unwrap();
        queue.push(GenerationRequest { true_output_len: None, ..request(2, 15, 9) }, at(0)).unwrap();
        let ends: Vec<_> = queue.take_batch().0.iter().map(|w| (w.limit, w.end, w.reason)).collect();
        assert_eq!(
            ends,
            [(9, 2, FinishReason::Stop), (1, 1, FinishReason::Length), (5, 5, FinishReason::Length)]
        );
    }
}
