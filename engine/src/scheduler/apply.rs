//! From a plan to a batch.

use std::sync::Arc;

use super::Scheduler;
use crate::policy::{Plan, SeqKey};
use crate::sequence::{Sequence, Status};
use crate::speculation::DraftSpan;
use crate::stats::BatchStats;
use crate::{EngineError, Event, FED, Refusal, SampleRow, ScheduledBatch};

impl Scheduler {
    /// Checks and applies a plan, and fills `batch`.
    pub(super) fn apply(
        &mut self,
        plan: &Plan,
        batch: &mut ScheduledBatch,
    ) -> Result<BatchStats, EngineError> {
        for (key, reason) in &plan.reject {
            self.expect(*key, Status::Waiting, "rejects")?;
            let id = self.sequences[*key].id;
            if self.sequences[*key].output_len() > 0 {
                return invalid(format!("rejects request {id}, of which tokens are delivered"));
            }
            if !self.drop_search(id) {
                self.withdraw(*key);
            }
            self.events.push(Event::Rejected { id, refusal: Refusal::Policy, reason: reason.clone() });
        }
        for &key in &plan.preempt {
            if self.sequences.find(key).is_none_or(|sequence| sequence.status != Status::Paused) {
                self.expect(key, Status::Running, "preempts")?;
            }
            self.preempt(key);
        }
        for &key in &plan.admit {
            self.expect(key, Status::Waiting, "admits")?;
            if self.running.len() >= self.limits.max_running as usize {
                return invalid(format!("runs more than {} sequences", self.limits.max_running));
            }
            if !self.admit(key) {
                let id = self.sequences[key].id;
                return invalid(format!("admits request {id}, for which there is too little KV memory"));
            }
        }
        let mut stats = BatchStats::default();
        for &(key, tokens) in &plan.run {
            self.run(key, tokens, batch, &mut stats)?;
        }
        if plan.padding > 0 && plan.run.is_empty() {
            return invalid("computes padding alone".into());
        }
        batch.pad(plan.padding);
        stats.padding_tokens = plan.padding;
        if batch.rows() > self.limits.token_budget as usize {
            let budget = self.limits.token_budget;
            return invalid(format!("computes {} rows with a budget of {budget}", batch.rows()));
        }
        Ok(stats)
    }

    /// Adds the next `tokens` tokens of a running sequence to the batch.
    fn run(
        &mut self,
        key: SeqKey,
        tokens: u32,
        batch: &mut ScheduledBatch,
        stats: &mut BatchStats,
    ) -> Result<(), EngineError> {
        let sequence = match self.sequences.find_mut(key) {
            Some(sequence) if sequence.status == Status::Running => sequence,
            _ => return self.expect(key, Status::Running, "runs"),
        };
        let (id, pending, proposed) = (sequence.id, sequence.pending(), sequence.draft.len() as u32);
        if sequence.scheduled > 0 || tokens == 0 || tokens > pending + proposed {
            return invalid(format!(
                "computes {tokens} tokens of request {id}, which has {pending} and {proposed} proposed, or it twice"
            ));
        }
        let drafted = tokens.saturating_sub(pending);
        sequence.draft.truncate(drafted as usize);
        let (from, to) = (sequence.computed, sequence.computed + tokens);
        if !self.kv.grow(&mut sequence.kv, to) {
            return invalid(format!("runs request {id}, for which there is too little KV memory"));
        }
        sequence.scheduled = tokens;
        let prefill = to.min(sequence.prefill_len).saturating_sub(from);
        stats.prefill_tokens += prefill;
        stats.decode_tokens += tokens - drafted - prefill;
        stats.drafted_tokens += drafted;

        let known = (to - drafted) as usize;
        append(&mut batch.tokens, &sequence.tokens[from as usize..known]);
        if let (true, Some(row), Some(last)) = (tokens >= pending, sequence.awaited, batch.tokens.last_mut())
        {
            *last = FED + row;
        }
        append(&mut batch.tokens, &sequence.draft);
        if tokens == 1 {
            batch.positions.push(from);
        } else {
            batch.positions.extend(from..to);
        }
        sequence.kv.append_slots(from, to, &mut batch.slots);
        sequence.kv.append_placement(to, &mut batch.kv);
        batch.query_start.push(batch.tokens.len() as u32);
        batch.context_len.push(to);
        if tokens >= pending {
            want_samples(sequence, drafted, batch);
            self.sampled.push((key, 1 + drafted));
        }
        Ok(())
    }

    /// Checks that a plan's key names a sequence of this status.
    fn expect(&self, key: SeqKey, status: Status, verb: &str) -> Result<(), EngineError> {
        match self.sequences.find(key) {
            Some(sequence) if sequence.status == status => Ok(()),
            Some(sequence) => invalid(format!(
                "{verb} request {}, which is {:?}, not {status:?}",
                sequence.id, sequence.status
            )),
            None => invalid(format!("{verb} a sequence that is not alive")),
        }
    }
}

/// Appends `from`, what a decode has (one token, and no proposals) without a call: there are many of them in a step.
#[inline]
fn append(to: &mut Vec<u32>, from: &[u32]) {
    match from {
        [] => {}
        [one] => to.push(*one),
        many => to.extend_from_slice(many),
    }
}

/// Asks for a token after the last row but `drafted` of the batch, a sequence's last known token, and after each proposal.
#[inline]
fn want_samples(sequence: &Sequence, drafted: u32, batch: &mut ScheduledBatch) {
    let row = batch.tokens.len() as u32 - 1 - drafted;
    want_sample(sequence, row, 0, batch);
    if drafted > 0 {
        batch.drafts.push(DraftSpan {
            id: sequence.id,
            sequence: batch.context_len.len() as u32 - 1,
            row,
            sample: batch.logit_rows.len() as u32 - 1,
            drafted,
        });
        (1..=drafted).for_each(|proposed| want_sample(sequence, row, proposed, batch));
    }
}

/// Asks for the token after `proposed` proposals; `row` is that of the last known token.
#[inline(always)]
fn want_sample(sequence: &Sequence, row: u32, proposed: u32, batch: &mut ScheduledBatch) {
    batch.logit_rows.push(row + proposed);
    // A repetition penalty alone looks at the prompt, which may be long.
    let params = &sequence.sampling;
    let first = if params.repetition_penalty == 1.0 { sequence.prompt_len } else { 0 };
    let history = if params.needs_history() {
        history(sequence, first, &sequence.draft[..proposed as usize])
    } else {
        Vec::new()
    };
    batch.sampling.push(SampleRow {
        params: Arc::clone(&sequence.sampling),
        history,
        prompt_len: sequence.prompt_len - first,
        output_index: sequence.output_len() + proposed,
    });
}

/// A sequence's tokens from `first` on, and proposals after them. Where its last one is awaited there are no proposals.
fn history(sequence: &Sequence, first: u32, proposed: &[u32]) -> Vec<u32> {
    let mut history = [&sequence.tokens[first as usize..], proposed].concat();
    if let (Some(row), Some(last)) = (sequence.awaited, history.last_mut()) {
        *last = FED + row;
    }
    history
}

fn invalid<T>(what: String) -> Result<T, EngineError> {
    Err(EngineError::Plan(what))
}
