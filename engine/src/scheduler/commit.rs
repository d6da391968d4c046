//! From a step that was begun, and later its tokens, back to the sequences.

use super::Scheduler;
use crate::policy::SeqKey;
use crate::sequence::{Sequence, Status};
use crate::{Event, FinishReason, Sampled};

/// What stands in a sequence for a token that was not collected yet.
const AWAITED: u32 = u32::MAX;

/// Rows of a sequence whose tokens are awaited.
#[derive(Debug, Clone, Copy)]
pub(super) struct AwaitedRows {
    /// The sequence, and its place in the order of arrival, which tells it from a later one of the same key. None where a
    /// token of the step before, collected meanwhile, ended the sequence.
    sequence: Option<(SeqKey, u64)>,
    /// Its rows: one, and one for each proposal.
    rows: u32,
}

/// What became of a step's proposals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Verified {
    /// Tokens accepted.
    pub(crate) accepted: u32,
    /// Sequences a proposal of which was refused.
    pub(crate) refused: u32,
}

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
                // Whether its proposals hold is known when their tokens are.
                sequence.computed += std::mem::take(&mut sequence.scheduled) - sequence.draft.len() as u32;
                sequence.name_blocks(&mut self.kv);
            }
        }
        self.let_ready_forks_go();
        let largest_hold = self.kv.largest_hold();
        let mut row = 0;
        for &(key, rows) in &self.sampled {
            let sequence = self.sequences.find_mut(key).filter(|s| s.status == Status::Running);
            let sequence = sequence.map(|sequence| {
                sequence.tokens.push(AWAITED);
                sequence.awaited = Some(row);
                // Of a beam, its whole request decides.
                if sequence.beam.is_none()
                    && let Some(reason) = sequence.end_by_length(largest_hold)
                {
                    sequence.status = Status::Ended(reason);
                    self.ended = true;
                }
                (key, sequence.order)
            });
            self.awaited.push(AwaitedRows { sequence, rows });
            row += rows;
        }
        self.sampled.clear();
        self.release_ended();
    }

    /// Puts the tokens of the step that advanced last in their places, and ends what they end. Of a sequence with proposals,
    /// each that is accepted makes the token sampled after it the next one.
    ///
    /// # Panics
    /// When `tokens` are not one for each row of that step's `logit_rows`: the executor broke its contract.
    pub(crate) fn settle(&mut self, tokens: Vec<Sampled>) -> Verified {
        let awaited = std::mem::take(&mut self.awaited);
        let rows: u32 = awaited.iter().map(|awaited| awaited.rows).sum();
        assert!(
            tokens.len() == rows as usize,
            "the executor sampled {} tokens for {rows} rows",
            tokens.len()
        );
        let largest_hold = self.kv.largest_hold();
        let (mut verified, mut tokens) = (Verified::default(), tokens.into_iter());
        for &AwaitedRows { sequence, rows } in &awaited {
            let own = tokens.next();
            let (Some((key, order)), Some(own)) = (sequence, own) else {
                skip(&mut tokens, rows - 1);
                continue;
            };
            let reason = match self.sequences.find_mut(key).filter(|s| s.order == order) {
                Some(sequence) if sequence.beam.is_some() => {
                    sequence.awaited = None;
                    sequence.tokens.pop();
                    self.pause_beam(key, own);
                    None
                }
                Some(sequence) if sequence.draft.is_empty() => {
                    sequence.settle(own.token);
                    self.events.push(Event::Token { id: sequence.id, sampled: own });
                    sequence.name_blocks(&mut self.kv);
                    sequence.end(largest_hold)
                }
                Some(_) => {
                    let proposed = tokens.by_ref().take(rows as usize - 1);
                    let sampled: Vec<Sampled> = std::iter::once(own).chain(proposed).collect();
                    self.verify(key, sampled, &mut verified)
                }
                None => {
                    skip(&mut tokens, rows - 1);
                    None
                }
            };
            if let Some(reason) = reason {
                self.end(key, reason);
            }
        }
        self.awaited = awaited;
        self.awaited.clear();
        self.release_ended();
        verified
    }

    /// The same for one sequence with proposals: `sampled` are the token after its last one and those after its proposals.
    /// Returns whether, and why, it ended.
    fn verify(
        &mut self,
        key: SeqKey,
        sampled: Vec<Sampled>,
        verified: &mut Verified,
    ) -> Option<FinishReason> {
        let largest_hold = self.kv.largest_hold();
        let sequence = &mut self.sequences[key];
        let draft = std::mem::take(&mut sequence.draft);
        let mut reason = None;
        for (row, mut sampled) in sampled.into_iter().enumerate() {
            // The first one's place is held.
            let (id, index) = (sequence.id, sequence.output_len() - u32::from(row == 0));
            let proposed = draft.get(row).copied();
            let accepted =
                proposed.filter(|&proposed| self.acceptance.accepts(proposed, sampled.token, id, index));
            // Of the drafters but the synthetic one, the same token.
            sampled.token = accepted.unwrap_or(sampled.token);
            if row > 0 {
                sequence.tokens.push(AWAITED);
            }
            sequence.settle(sampled.token);
            self.events.push(Event::Token { id, sampled });
            verified.accepted += u32::from(accepted.is_some());
            verified.refused += u32::from(proposed.is_some() && accepted.is_none());
            reason = sequence.end(largest_hold);
            if accepted.is_none() || reason.is_some() {
                break;
            }
            sequence.computed += 1;
        }
        sequence.name_blocks(&mut self.kv);
        self.kv.shrink(&mut sequence.kv, sequence.tokens.len() as u32);
        reason
    }

    /// Ends a sequence whose last token is known and ended it.
    fn end(&mut self, key: SeqKey, reason: FinishReason) {
        let sequence = &mut self.sequences[key];
        match sequence.status {
            Status::Running | Status::Ended(_) => {
                sequence.status = Status::Ended(reason);
                self.ended = true;
            }
            // Preempted since: it need not come back.
            Status::Leaving | Status::Waiting | Status::Held | Status::Paused => self.finish(key, reason),
        }
    }

    /// Whether the step that was begun and not settled samples for a sequence whose next step needs to know the token: a beam.
    pub(crate) fn must_settle(&self) -> bool {
        self.awaited.iter().filter_map(|awaited| awaited.sequence).any(|(key, order)| {
            self.sequences.find(key).is_some_and(|s| s.order == order && s.beam.is_some())
        })
    }

    /// Takes the sequences that ended out of the running ones: at once, or, where they end together, when all have.
    pub(super) fn release_ended(&mut self) {
        let goes_on = |&key| {
            let sequence = &self.sequences[key];
            sequence.status == Status::Running || sequence.awaited.is_some()
        };
        if !self.ended || (self.ends_together && self.running.iter().any(goes_on)) {
            return;
        }
        self.ended = false;
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

/// Leaves out the tokens of rows that nobody waits for any more.
fn skip(tokens: &mut impl Iterator<Item = Sampled>, rows: u32) {
    tokens.take(rows as usize).for_each(drop);
}
