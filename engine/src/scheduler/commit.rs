//! From a step that was begun, and later its tokens, back to the sequences.

use super::Scheduler;
use crate::policy::SeqKey;
use crate::sequence::{Sequence, Status};
use crate::{Event, FinishReason, Sampled};

/// What stands in a sequence for a token that was not collected yet.
const AWAITED: u32 = u32::MAX;

/// A row whose token is awaited: the sequence, and its place in the order of arrival, which tells it from a later one of
/// the same key. None where a token of the step before, collected meanwhile, ended the sequence.
pub(super) type AwaitedRow = Option<(SeqKey, u64)>;

impl Scheduler {
    /// Counts the scheduled step as computed: the device runs steps in order, so whatever is scheduled next finds its K
    /// and V. Every sequence sampled gets one more token, to be known by [`Self::settle`]; where that many tokens end it,
    /// it gives its KV memory back at once.
    ///
    /// # Panics
    /// When the step before was not settled.
    pub(crate) fn advance(&mut self) {
        assert!(self.awaited.is_empty(), "the tokens of the step before are settled first");
        for &(key, _) in &self.plan.run {
            // A sequence may have ended since it was scheduled.
            if let Some(sequence) = self.sequences.find_mut(key) {
                sequence.computed += std::mem::take(&mut sequence.scheduled);
                sequence.name_blocks(&mut self.kv);
            }
        }
        let largest_hold = self.kv.largest_hold();
        for (row, &key) in self.sampled.iter().enumerate() {
            let sequence = self.sequences.find_mut(key).filter(|s| s.status == Status::Running);
            self.awaited.push(sequence.map(|sequence| {
                sequence.tokens.push(AWAITED);
                sequence.awaited = Some(row as u32);
                if let Some(reason) = sequence.end_by_length(largest_hold) {
                    sequence.status = Status::Ended(reason);
                }
                (key, sequence.order)
            }));
        }
        self.sampled.clear();
        self.release_ended();
    }

    /// Puts the tokens of the step that advanced last in their places, and ends what they end.
    ///
    /// # Panics
    /// When `tokens` are not one for each row of that step's `logit_rows`: the executor broke its contract.
    pub(crate) fn settle(&mut self, tokens: Vec<Sampled>) {
        let rows = std::mem::take(&mut self.awaited);
        assert!(
            tokens.len() == rows.len(),
            "the executor sampled {} tokens for {} rows",
            tokens.len(),
            rows.len()
        );
        let largest_hold = self.kv.largest_hold();
        for (row, sampled) in rows.iter().zip(tokens) {
            let Some((key, order)) = *row else { continue };
            let Some(sequence) = self.sequences.find_mut(key).filter(|s| s.order == order) else { continue };
            sequence.awaited = None;
            if let Some(last) = sequence.tokens.last_mut() {
                *last = sampled.token;
            }
            sequence.extend_names();
            sequence.name_blocks(&mut self.kv);
            self.events.push(Event::Token { id: sequence.id, sampled });
            let Some(reason) = sequence.end(largest_hold) else { continue };
            match sequence.status {
                Status::Running | Status::Ended(_) => sequence.status = Status::Ended(reason),
                // Preempted since: it need not come back.
                Status::Leaving | Status::Waiting => self.finish(key, reason),
            }
        }
        self.awaited = rows;
        self.awaited.clear();
        self.release_ended();
    }

    /// Whether the step that was begun and not settled samples for a sequence whose next step needs to know the token.
    pub(crate) fn must_settle(&self) -> bool {
        self.awaited.iter().flatten().any(|&(key, order)| {
            self.sequences.find(key).is_some_and(|s| s.order == order && s.sampling.needs_history())
        })
    }

    /// Takes the sequences that ended out of the running ones: at once, or, where they end together, when all have.
    pub(super) fn release_ended(&mut self) {
        let goes_on = |&key| {
            let sequence = &self.sequences[key];
            sequence.status == Status::Running || sequence.awaited.is_some()
        };
        if self.ends_together && self.running.iter().any(goes_on) {
            return;
        }
        let mut running = std::mem::take(&mut self.running);
        running.retain(|&key| {
            let sequence = &mut self.sequences[key];
            let Status::Ended(reason) = sequence.status else { return true };
            sequence.status = Status::Leaving;
            if sequence.awaited.is_some() {
                self.kv.release(&mut sequence.kv);
            } else {
                self.finish(key, reason);
            }
            false
        });
        self.running = running;
    }

    /// Takes a sequence off the books whose last token is known and ended it.
    fn finish(&mut self, key: SeqKey, reason: FinishReason) {
        let Sequence { id, preemptions, cached, .. } = self.withdraw(key);
        self.events.push(Event::Finished { id, reason, preemptions, cached_tokens: cached });
    }
}
