//! From sampled tokens back to the sequences.

use super::Scheduler;
use crate::sequence::Status;
use crate::{Event, Sampled};

impl Scheduler {
    /// Appends the sampled tokens of the step under way, ends what ends, and gives its KV memory back.
    ///
    /// # Panics
    /// When `tokens` are not one for each row of the batch's `logit_rows`: the executor broke its contract.
    pub(crate) fn commit(&mut self, tokens: Vec<Sampled>) {
        assert!(
            tokens.len() == self.sampled.len(),
            "the executor sampled {} tokens for {} rows",
            tokens.len(),
            self.sampled.len()
        );
        for &(key, _) in &self.plan.run {
            let sequence = &mut self.sequences[key];
            sequence.computed += std::mem::take(&mut sequence.scheduled);
        }
        let largest_hold = self.kv.largest_hold();
        let mut ended = false;
        for (&key, sampled) in self.sampled.iter().zip(tokens) {
            let sequence = &mut self.sequences[key];
            sequence.tokens.push(sampled.token);
            self.events.push(Event::Token { id: sequence.id, sampled });
            if let Some(reason) = sequence.end(largest_hold) {
                sequence.status = Status::Ended(reason);
                ended = true;
            }
        }
        if ended {
            self.release_ended();
        }
    }

    /// Takes out the sequences that ended: at once, or, where they end together, when all have.
    pub(super) fn release_ended(&mut self) {
        let runs = |&key| self.sequences[key].status == Status::Running;
        if self.ends_together && self.running.iter().any(runs) {
            return;
        }
        let mut running = std::mem::take(&mut self.running);
        running.retain(|&key| {
            let Status::Ended(reason) = self.sequences[key].status else { return true };
            let sequence = self.forget(key);
            self.events.push(Event::Finished {
                id: sequence.id,
                reason,
                preemptions: sequence.preemptions,
                cached_tokens: 0,
            });
            false
        });
        self.running = running;
    }
}
