//! Preemption by swapping: K and V in host memory while a sequence waits.

use super::Scheduler;
use crate::kv::{BlockPool, BlockTable};
use crate::policy::SeqKey;
use crate::sequence::Sequence;
use crate::stats::BatchStats;
use crate::{KvCopy, KvCopyKind};

/// Tokens in a block of host memory, whatever the layout of the KV memory.
const BLOCK: u32 = 16;

/// Host memory for K and V, and the copies to, from and beside it that are still to be begun.
#[derive(Debug)]
pub(super) struct SwapSpace {
    pool: BlockPool,
    copies: Vec<KvCopy>,
    /// Tokens swapped out and in since the last step.
    moved: [u32; 2],
}

impl SwapSpace {
    /// Room for so many tokens: none where preemption is by recomputation.
    pub(super) fn new(tokens: usize) -> Self {
        let blocks = u32::try_from(tokens).unwrap_or(u32::MAX) / BLOCK;
        Self { pool: BlockPool::new(blocks), copies: Vec::new(), moved: [0; 2] }
    }

    /// Gives up what a sequence that ends has there.
    pub(super) fn forget(&mut self, sequence: &mut Sequence) {
        if let Some(mut table) = sequence.swapped.take() {
            table.release(&mut self.pool);
        }
    }

    /// Queues the copies of a sequence's computed tokens. Its KV memory is held, and its place here known.
    fn copy(&mut self, kind: KvCopyKind, sequence: &Sequence, table: &BlockTable) {
        let mut slots = Vec::new();
        sequence.kv.append_slots(0, sequence.computed, &mut slots);
        let pairs = slots.into_iter().zip(0..).map(|(slot, position)| [slot, table.slot(position)]);
        self.queue(kind, pairs);
        self.moved[usize::from(kind == KvCopyKind::In)] += sequence.computed;
    }

    /// Queues copies from slots of the KV memory to others.
    pub(super) fn copy_within(&mut self, slots: impl Iterator<Item = [u32; 2]>) {
        self.queue(KvCopyKind::Within, slots);
    }

    fn queue(&mut self, kind: KvCopyKind, slots: impl Iterator<Item = [u32; 2]>) {
        let mut slots = slots.peekable();
        if slots.peek().is_none() {
            return;
        }
        match self.copies.last_mut() {
            Some(last) if last.kind == kind => last.slots.extend(slots),
            _ => self.copies.push(KvCopy { kind, slots: slots.collect() }),
        }
    }

    /// Counts everything anew.
    pub(super) fn recount(&self) {
        self.pool.recount();
    }

    /// Blocks in use.
    pub(super) fn held(&self) -> u32 {
        self.pool.referenced()
    }
}

impl Scheduler {
    /// Swaps the computed tokens of a running sequence out; false when there is no room, or nothing to keep.
    pub(super) fn swap_out(&mut self, key: SeqKey) -> bool {
        let sequence = &mut self.sequences[key];
        let mut table = BlockTable::new(BLOCK);
        if sequence.computed == 0 || !table.grow(sequence.computed, &mut self.swap_space.pool) {
            return false;
        }
        self.swap_space.copy(KvCopyKind::Out, sequence, &table);
        sequence.swapped = Some(table);
        true
    }

    /// Swaps a sequence that was given KV memory in again, if it was swapped out. Its place in host memory may be used at
    /// once: copies are made in order.
    pub(super) fn swap_in(&mut self, key: SeqKey) {
        let sequence = &mut self.sequences[key];
        if let Some(mut table) = sequence.swapped.take() {
            self.swap_space.copy(KvCopyKind::In, sequence, &table);
            table.release(&mut self.swap_space.pool);
        }
    }

    /// The copies to begin before anything else, in order.
    pub(crate) fn take_copies(&mut self) -> Vec<KvCopy> {
        std::mem::take(&mut self.swap_space.copies)
    }

    /// Counts what was swapped since the last step.
    pub(super) fn measure_swaps(&mut self, stats: &mut BatchStats) {
        [stats.swapped_out, stats.swapped_in] = std::mem::take(&mut self.swap_space.moved);
    }
}
