//! A smaller model that proposes.

use std::collections::HashMap;

use super::passes::propose_from;
use super::{DraftContext, DraftTarget, Drafter};
use crate::kv::KvHold;
use crate::{EngineError, Executor, KvLayout, Sampled, ScheduledBatch};

/// Tokens that a sequence for which tokens were proposed in the last step is behind by, at most: the last proposal, if it was
/// accepted, and the token after it.
const AT_HAND: u32 = 2;

/// A draft model: an executor of its own, whose KV memory has a slot for each of the engine's. A token's K and V lie in the
/// same slot of both, so that the engine's block tables serve both and nothing is allocated twice.
pub struct DraftModel {
    executor: Box<dyn Executor>,
    sequences: HashMap<u64, Known>,
    /// Tokens that a step may compute for sequences further behind than [`AT_HAND`]: a long prompt is caught up with in parts,
    /// as the engine computes it.
    budget: u32,
    /// How many of them this step has left.
    left: u32,
    /// Such parts, of sequences for which nothing is proposed yet, and how many tokens of each are computed then.
    parts: ScheduledBatch,
    ends: Vec<(u64, u32)>,
}

/// What the draft model has of a sequence.
#[derive(Debug, Default)]
struct Known {
    /// Tokens of the sequence whose K and V it stored.
    computed: u32,
    /// Proposals after them whose K and V it stored too. Which were accepted is known when it is to propose again.
    proposed: Vec<u32>,
    /// The sequence's preemptions then: each moves its slots.
    preemptions: u32,
    /// Tokens to compute before it can propose: the last known one, and those before it that it did not compute.
    behind: Vec<u32>,
}

impl Known {
    /// Counts proposals that were accepted as computed, and forgets the others: any number of steps may have gone on from
    /// them since.
    fn keep_accepted(&mut self, tokens: &[u32]) {
        let since = tokens.iter().skip(self.computed as usize);
        let accepted = self.proposed.iter().zip(since).take_while(|(proposed, token)| proposed == token);
        self.computed = (self.computed + accepted.count() as u32).min(tokens.len() as u32 - 1);
        self.proposed.clear();
    }
}

impl DraftModel {
    /// A draft model on `executor`, which must have at least as many KV slots as the engine's.
    pub fn new(executor: Box<dyn Executor>) -> Self {
        let parts = ScheduledBatch::new(KvLayout::default().placement());
        Self { executor, sequences: HashMap::new(), budget: 0, left: 0, parts, ends: Vec::new() }
    }

    /// Computes parts of sequences that are far behind. Since they were asked for some may have been preempted and their slots
    /// given away: what others have there is computed after this.
    fn catch_up_in_parts(&mut self) -> Result<(), EngineError> {
        if self.ends.is_empty() {
            return Ok(());
        }
        run(&mut *self.executor, &self.parts)?;
        for (id, end) in self.ends.drain(..) {
            if let Some(known) = self.sequences.get_mut(&id) {
                known.computed = end;
            }
        }
        Ok(())
    }

    /// Computes what the model is behind by where it proposes, and with it the first proposals.
    fn catch_up(&mut self, batch: &mut ScheduledBatch) -> Result<(), EngineError> {
        let most = self.executor.max_batch_rows();
        let mut pass = ScheduledBatch::new(batch.kv.clone());
        let mut next = 0;
        while next < batch.drafts.len() {
            pass.clear();
            let mut first = Vec::new();
            while next < batch.drafts.len() && pass.rows() < most {
                let span = batch.drafts[next];
                // A span stands for a sequence that was proposed for in this step.
                let Some(known) = self.sequences.get_mut(&span.id) else {
                    unreachable!("a proposal was asked for")
                };
                let tokens = known.behind.len().min(most - pass.rows());
                let whole = tokens == known.behind.len();
                let sampling = whole.then(|| batch.sampling[span.sample as usize].clone());
                pass.add_rows_of(batch, span.sequence, known.computed, &known.behind[..tokens], sampling);
                known.computed += tokens as u32;
                known.behind.drain(..tokens);
                if whole {
                    first.push(next);
                    next += 1;
                }
            }
            let sampled = run(&mut *self.executor, &pass)?;
            for (&span, sampled) in first.iter().zip(&sampled) {
                batch.set_draft(span, 0, sampled.token);
            }
        }
        Ok(())
    }
}

/// Adds rows of a sequence whose slots are `kv`: `tokens` from `position` on.
fn add_rows(batch: &mut ScheduledBatch, kv: &KvHold, position: u32, tokens: &[u32]) {
    let context = position + tokens.len() as u32;
    batch.tokens.extend_from_slice(tokens);
    batch.positions.extend(position..context);
    kv.append_slots(position, context, &mut batch.slots);
    kv.append_placement(context, &mut batch.kv);
    batch.query_start.push(batch.tokens.len() as u32);
    batch.context_len.push(context);
}

fn run(executor: &mut dyn Executor, pass: &ScheduledBatch) -> Result<Vec<Sampled>, EngineError> {
    executor.forward(pass)?;
    executor.sample(&pass.sampling)?;
    executor.collect()
}

impl Drafter for DraftModel {
    fn prepare(&mut self, target: DraftTarget<'_>) -> Result<(), EngineError> {
        let DraftTarget { executor: target, layout, sequences, max_model_len, token_budget } = target;
        let draft = &self.executor;
        for (what, has, needed) in [
            ("KV slots", draft.kv_slots(), target.kv_slots()),
            ("tokens of a sequence", draft.max_model_len(), max_model_len as usize),
            ("rows of a batch", draft.max_batch_rows(), sequences.max(AT_HAND) as usize),
            ("sequences of a batch", draft.max_sequences(), sequences as usize),
        ] {
            if has < needed {
                return Err(EngineError::Config(format!(
                    "speculation: the draft model has {has} {what} and needs {needed}: build its executor for more"
                )));
            }
        }
        if draft.vocab_size() != target.vocab_size() {
            return Err(EngineError::Config(format!(
                "speculation: the draft model's vocabulary has {} tokens, the model's {}: they must be the same",
                draft.vocab_size(),
                target.vocab_size()
            )));
        }
        self.budget = token_budget.min(u32::try_from(draft.max_batch_rows()).unwrap_or(u32::MAX));
        self.parts = ScheduledBatch::new(layout.placement());
        self.executor.prepare(layout, &mut |_, _| {})
    }

    fn begin(&mut self) {
        self.left = self.budget;
        self.parts.clear();
        self.ends.clear();
    }

    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let known = self.sequences.entry(context.id).or_default();
        if known.preemptions != context.preemptions {
            *known = Known { preemptions: context.preemptions, ..Known::default() };
        }
        known.keep_accepted(context.tokens);
        let behind = context.tokens.len() as u32 - known.computed;
        if behind > AT_HAND {
            let part = self.left.min(behind);
            self.left -= part;
            if part < behind {
                if part > 0 {
                    let (from, to) = (known.computed, known.computed + part);
                    let tokens = &context.tokens[from as usize..to as usize];
                    add_rows(&mut self.parts, context.kv, from, tokens);
                    self.ends.push((context.id, to));
                }
                return;
            }
        }
        known.behind.clear();
        known.behind.extend_from_slice(&context.tokens[known.computed as usize..]);
        drafts.extend((0..most).map(|_| 0));
    }

    fn complete(&mut self, _: &mut dyn Executor, batch: &mut ScheduledBatch) -> Result<(), EngineError> {
        self.catch_up_in_parts()?;
        if batch.drafts.is_empty() {
            return Ok(());
        }
        self.catch_up(batch)?;
        propose_from(batch, 1, &mut |pass| run(&mut *self.executor, pass))?;
        for span in &batch.drafts {
            if let Some(known) = self.sequences.get_mut(&span.id) {
                // The last proposal was not computed.
                let first = span.row as usize + 1;
                known.proposed.extend_from_slice(&batch.tokens[first..first + span.drafted as usize - 1]);
            }
        }
        Ok(())
    }

    fn forget(&mut self, id: u64) {
        self.sequences.remove(&id);
    }
}

impl std::fmt::Debug for DraftModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DraftModel").field("sequences", &self.sequences.len()).finish_non_exhaustive()
    }
}
