//! What policies see.

use std::collections::VecDeque;
use std::time::Instant;

use crate::config::Limits;
use crate::kv::{KvMemory, KvTrial};
use crate::sequence::SequenceTable;

/// Names a sequence in a plan. Valid for the step it was seen in; a request's `id` names it for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqKey(pub(crate) u32);

/// One sequence as policies see it. The true output length is not among what they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqView {
    /// Its name in plans.
    pub key: SeqKey,
    /// The request's id.
    pub id: u64,
    /// The request's class; 0 is the best.
    pub priority: u8,
    /// When the request was submitted.
    pub arrival: Instant,
    /// Prompt tokens.
    pub prompt_len: u32,
    /// Tokens: prompt and output, the one included that a step under way samples.
    pub len: u32,
    /// Tokens whose K and V are stored, or will be before the next step reads them; of a waiting sequence, those that it
    /// would find in the prefix cache or with the request that it forks, or that were swapped out.
    pub computed: u32,
    /// Tokens proposed to follow the last one, which a plan may have computed with it (speculative decoding): more than
    /// `pending`, all or some. Those refused cost their rows.
    pub drafted: u32,
    /// Length that it cannot exceed: prompt and `max_tokens`, or the model's limit.
    pub max_len: u32,
    /// KV slots held.
    pub kv_slots: u32,
    /// It computes nothing now and keeps its place: until its batch ends, or until the other beams of its request are as far.
    /// The latter may be preempted like any other.
    pub idle: bool,
    /// Times it was preempted.
    pub preemptions: u32,
    /// Slots a contiguous layout reserves: may depend on the true output length, so policies do not see it.
    pub(crate) reservation: u32,
    /// Of a waiting sequence, blocks that it would share and others use, up to the first that nobody uses.
    pub(crate) shared_blocks: u32,
    /// Of a running sequence, blocks that no other uses.
    pub(crate) own_blocks: u32,
}

impl SeqView {
    /// Tokens to compute; 0 for a sequence that computes nothing now.
    #[inline]
    pub fn pending(&self) -> u32 {
        if self.idle { 0 } else { self.len - self.computed }
    }
}

/// The scheduler's state, read only. Running and waiting sequences are in order of arrival.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerView<'a> {
    pub(crate) sequences: &'a SequenceTable,
    pub(crate) running: &'a [SeqKey],
    pub(crate) waiting: &'a VecDeque<SeqKey>,
    pub(crate) kv: &'a KvMemory,
    pub(crate) limits: &'a Limits,
    /// Whether tokens are proposed at all.
    pub(crate) speculates: bool,
    pub(crate) now: Instant,
}

impl SchedulerView<'_> {
    /// The time.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Rows that a step may have, padding included.
    pub fn token_budget(&self) -> u32 {
        self.limits.token_budget
    }

    /// Sequences that may run.
    pub fn max_running(&self) -> usize {
        self.limits.max_running as usize
    }

    /// How many sequences run: hold KV memory.
    pub fn running_len(&self) -> usize {
        self.running.len()
    }

    /// The running sequence at `index`; 0 arrived first.
    ///
    /// # Panics
    /// When `index` is not below `running_len`.
    // Always inlined, so that what a policy does not look at is not computed: for 256 sequences that is most of it.
    #[inline(always)]
    pub fn running(&self, index: usize) -> SeqView {
        self.sequences.view_running(self.running[index], self.kv)
    }

    /// How many requests wait.
    pub fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Priority and arrival of the waiting sequence at `index`: what a policy needs to choose by, without the look-up in the
    /// prefix cache that all of [`Self::waiting_at`] takes.
    ///
    /// # Panics
    /// When `index` is not below `waiting_len`.
    pub fn waiting_rank(&self, index: usize) -> (u8, Instant) {
        let sequence = &self.sequences[self.waiting[index]];
        (sequence.priority, sequence.arrival)
    }

    /// The waiting sequence at `index`; 0 arrived first.
    ///
    /// # Panics
    /// When `index` is not below `waiting_len`.
    pub fn waiting_at(&self, index: usize) -> SeqView {
        self.sequences.view_waiting(self.waiting[index], self.kv)
    }

    /// The waiting sequences; a preempted one stands by its arrival.
    pub fn waiting(&self) -> impl Iterator<Item = SeqView> {
        self.waiting.iter().map(|&key| self.sequences.view_waiting(key, self.kv))
    }

    /// A copy of the KV memory's books to try a plan on.
    pub fn kv_trial(&self) -> KvTrial {
        self.kv.trial()
    }

    /// The most KV slots that one sequence could have alone.
    pub fn kv_largest(&self) -> u32 {
        self.kv.largest_hold()
    }
}
