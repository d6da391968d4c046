//! Proposals of tokens, before a step is planned and before it runs.

use super::Scheduler;
use crate::sequence::Status;
use crate::speculation::{DraftContext, Speculator};
use crate::{EngineError, ScheduledBatch};

impl Scheduler {
    /// Asks for proposals for every running sequence whose last token alone is to be computed. Policies see how many there
    /// are; those of a step before are forgotten.
    pub(crate) fn propose(&mut self, speculator: &mut Speculator) {
        self.speculates = true;
        let decodes = self.running.iter().filter(|&&key| {
            let sequence = &self.sequences[key];
            sequence.status == Status::Running && sequence.pending() == 1 && sequence.beam.is_none()
        });
        let length = speculator.begin(decodes.count());
        let largest_hold = self.kv.largest_hold();
        // Every sequence of the step may want a row of logits of its own, those too that its plan admits.
        let sequences = self.running.len() + self.waiting.len();
        let wanted = u32::try_from(sequences).unwrap_or(u32::MAX).min(self.limits.max_running);
        let mut rows = self.limits.max_logit_rows.saturating_sub(wanted);
        for &key in &self.running {
            let sequence = &mut self.sequences[key];
            sequence.draft.clear();
            if sequence.status != Status::Running || sequence.pending() != 1 || sequence.beam.is_some() {
                continue;
            }
            // The token after the last proposal counts too.
            let room = sequence.max_len.min(largest_hold).saturating_sub(sequence.len() + 1);
            let most = length.min(room).min(rows);
            if most == 0 {
                continue;
            }
            let context = DraftContext {
                id: sequence.id,
                tokens: &sequence.tokens,
                cache_salt: sequence.cache_salt,
                preemptions: sequence.preemptions,
                kv: &sequence.kv,
            };
            speculator.propose(context, most, &mut sequence.draft);
            sequence.draft.truncate(most as usize);
            rows -= sequence.draft.len() as u32;
        }
    }

    /// Takes over the proposals as they stand in the batch, where some were put after it was planned.
    pub(crate) fn take_drafts(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        for span in &batch.drafts {
            let Some(&key) = self.ids.get(&span.id) else { continue };
            let first = span.row as usize + 1;
            let proposed = &batch.tokens[first..first + span.drafted as usize];
            let vocab = self.limits.vocab_size;
            if let Some(token) = proposed.iter().find(|&&token| token >= vocab) {
                return Err(EngineError::Plan(format!(
                    "proposes token {token} for request {}, the vocabulary ends below {vocab}",
                    span.id
                )));
            }
            self.sequences[key].draft.copy_from_slice(proposed);
        }
        Ok(())
    }
}
