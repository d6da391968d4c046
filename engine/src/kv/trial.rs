//! What a policy plans KV memory with.

use super::BlockPool;
use super::buddy::{BuddyAllocator, ORDERS, order_for};
use crate::policy::SeqView;

/// A copy of the KV memory's books, to try a plan on: what succeeds here succeeds when the plan is applied.
///
/// It holds counts alone and costs nothing to make. Memory released in a trial is not coalesced with its
/// neighbours, so under a contiguous layout a trial may refuse what the memory would grant, never the reverse.
#[derive(Debug, Clone)]
pub struct KvTrial(Books);

#[derive(Debug, Clone)]
enum Books {
    /// `free` counts cached blocks too. Once something was `released`, blocks that a sequence would share may have no
    /// user left, and count like all others: also those `shared` by sequences that this trial admitted before.
    Paged {
        block_size: u32,
        free: u32,
        total: u32,
        shared: u32,
        released: bool,
    },
    Contiguous {
        free: [u32; ORDERS],
        free_slots: u32,
        total: u32,
    },
}

impl KvTrial {
    pub(super) fn paged(block_size: u32, pool: &BlockPool) -> Self {
        Self(Books::Paged {
            block_size,
            free: pool.available(),
            total: pool.total(),
            shared: 0,
            released: false,
        })
    }

    pub(super) fn contiguous(buddy: &BuddyAllocator) -> Self {
        Self(Books::Contiguous {
            free: buddy.free_counts(),
            free_slots: buddy.free_slots(),
            total: buddy.total(),
        })
    }

    /// Slots that can be given out, free or not.
    pub fn total_slots(&self) -> u32 {
        match &self.0 {
            Books::Paged { block_size, total, .. } => total * block_size,
            Books::Contiguous { total, .. } => *total,
        }
    }

    /// Slots still free in this trial.
    pub fn free_slots(&self) -> u32 {
        match &self.0 {
            Books::Paged { block_size, free, .. } => free * block_size,
            Books::Contiguous { free_slots, .. } => *free_slots,
        }
    }

    /// Whether sequences take more memory as they grow (paged); if not, admission gives them all they get.
    pub fn grows(&self) -> bool {
        matches!(self.0, Books::Paged { .. })
    }

    /// Takes memory for a waiting sequence: for `slots` tokens when memory grows, else its reservation. False, with
    /// nothing taken, when there is too little, or when fewer than `spare` slots would stay free. Admission itself
    /// takes blocks for the tokens known; ask for more to keep room for growth.
    pub fn admit(&mut self, sequence: &SeqView, slots: u32, spare: u32) -> bool {
        match &mut self.0 {
            Books::Paged { block_size, free, shared: given, released, .. } => {
                let shared = if *released { 0 } else { sequence.shared_blocks };
                let owed = if *released { *given } else { 0 };
                let needed = u64::from(slots.div_ceil(*block_size).saturating_sub(shared));
                let fits =
                    needed + u64::from(owed) + u64::from(spare.div_ceil(*block_size)) <= u64::from(*free);
                if fits {
                    *free -= needed as u32;
                    *given += shared;
                }
                fits
            }
            Books::Contiguous { free, free_slots, .. } => {
                let Some(order) = order_for(sequence.reservation) else { return false };
                let Some(found) = (order as usize..ORDERS).find(|&o| free[o] > 0) else { return false };
                if *free_slots - (1 << order) < spare {
                    return false;
                }
                free[found] -= 1;
                free[order as usize..found].iter_mut().for_each(|count| *count += 1);
                *free_slots -= 1 << order;
                true
            }
        }
    }

    /// Takes what a running sequence lacks to hold `slots` tokens; false, with nothing taken, when there is too
    /// little.
    #[inline]
    pub fn grow(&mut self, sequence: &SeqView, slots: u32) -> bool {
        self.grow_further(sequence, 0, slots)
    }

    /// The same for a sequence that this trial made hold `held` slots already.
    #[inline]
    pub fn grow_further(&mut self, sequence: &SeqView, held: u32, slots: u32) -> bool {
        if slots <= sequence.kv_slots {
            return true;
        }
        match &mut self.0 {
            Books::Paged { block_size, free, shared, released, .. } => {
                let owed = if *released { *shared } else { 0 };
                let held = held.div_ceil(*block_size).max(sequence.kv_slots / *block_size);
                let needed = slots.div_ceil(*block_size).saturating_sub(held);
                let fits = needed <= free.saturating_sub(owed);
                if fits {
                    *free -= needed;
                }
                fits
            }
            Books::Contiguous { .. } => false,
        }
    }

    /// Gives back what a running sequence held before this trial, as preempting it would. What this trial admitted before may
    /// have been to share that: such a plan holds only if something is granted after.
    pub fn release(&mut self, sequence: &SeqView) {
        match &mut self.0 {
            Books::Paged { free, released, .. } => {
                *free += sequence.own_blocks;
                *released = true;
            }
            Books::Contiguous { free, free_slots, .. } => {
                if sequence.kv_slots > 0 {
                    free[sequence.kv_slots.ilog2() as usize] += 1;
                    *free_slots += sequence.kv_slots;
                }
            }
        }
    }
}
