//! The KV memory under one layout: who holds which slots.

use super::{BlockName, BlockPool, BlockTable, BuddyAllocator, KvLayout, KvTrial, Region, Reservation};
use crate::{EngineError, KvPlacement};

/// What one sequence holds.
#[derive(Debug)]
pub(crate) enum KvHold {
    /// Nothing: it waits.
    None,
    /// Blocks.
    Paged(BlockTable),
    /// A region.
    Contiguous(Region),
}

impl KvHold {
    /// Slots held.
    #[inline]
    pub(crate) fn slots(&self) -> u32 {
        match self {
            Self::None => 0,
            Self::Paged(table) => table.slots(),
            Self::Contiguous(region) => region.slots(),
        }
    }

    /// Appends the slots of positions `from..to` to `slots`.
    #[inline(always)]
    pub(crate) fn append_slots(&self, from: u32, to: u32, slots: &mut Vec<u32>) {
        match self {
            // A decode, without an iterator's bookkeeping.
            Self::Paged(table) if to == from + 1 => slots.push(table.slot(from)),
            hold => hold.append_many_slots(from, to, slots),
        }
    }

    fn append_many_slots(&self, from: u32, to: u32, slots: &mut Vec<u32>) {
        match self {
            Self::None => unreachable!("a sequence that runs holds KV slots"),
            Self::Paged(table) => slots.extend((from..to).map(|position| table.slot(position))),
            Self::Contiguous(region) => slots.extend(region.start + from..region.start + to),
        }
    }

    /// Appends where the first `context` positions lie to `placement`.
    #[inline]
    pub(crate) fn append_placement(&self, context: u32, placement: &mut KvPlacement) {
        match (self, placement) {
            (Self::Paged(table), KvPlacement::Paged { block_size, tables, table_start }) => {
                table_start.push(tables.len() as u32);
                tables.extend_from_slice(&table.blocks()[..context.div_ceil(*block_size) as usize]);
            }
            (Self::Contiguous(region), KvPlacement::Contiguous { start }) => start.push(region.start),
            _ => unreachable!("a sequence that runs holds slots of the engine's layout"),
        }
    }
}

/// The slots of an executor's KV memory, given out by one layout.
#[derive(Debug)]
pub(crate) enum KvMemory {
    /// Blocks of `block_size` slots.
    Paged { block_size: u32, pool: BlockPool },
    /// Regions.
    Contiguous { buddy: BuddyAllocator },
}

impl KvMemory {
    /// `slots` free slots under `layout`; checks that one sequence can run at all.
    pub(crate) fn new(layout: KvLayout, slots: usize, max_model_len: u32) -> Result<Self, EngineError> {
        layout.validate()?;
        let slots =
            u32::try_from(slots).ok().filter(|&slots| slots < quire_kernels::NO_SLOT).ok_or_else(|| {
                EngineError::Config(format!(
                    "{slots} KV slots cannot be numbered in 32 bits: give less KV memory"
                ))
            })?;
        match layout {
            KvLayout::Paged { block_size } => {
                let blocks = slots / block_size;
                if blocks == 0 {
                    return Err(EngineError::Config(format!(
                        "the KV memory's {slots} slots hold no block of {block_size}: \
                         lower kv.block_size or give more KV memory"
                    )));
                }
                Ok(Self::Paged { block_size, pool: BlockPool::new(blocks) })
            }
            KvLayout::Contiguous { reservation } => {
                let buddy = BuddyAllocator::new(slots);
                let needed = if reservation == Reservation::Max { max_model_len } else { 1 };
                if buddy.largest() < needed {
                    return Err(EngineError::Config(format!(
                        "the KV memory's {slots} slots give regions of at most {}, too small to reserve {needed} \
                         for one sequence: lower max_model_len or give more KV memory",
                        buddy.largest()
                    )));
                }
                Ok(Self::Contiguous { buddy })
            }
        }
    }

    /// Slots that can be given out. A paged layout's last slots, fewer than a block, are not among them.
    #[inline]
    pub(crate) fn total_slots(&self) -> u32 {
        match self {
            Self::Paged { block_size, pool } => pool.total() * block_size,
            Self::Contiguous { buddy } => buddy.total(),
        }
    }

    /// Slots that are free: of no sequence, and not cached.
    pub(crate) fn free_slots(&self) -> u32 {
        match self {
            Self::Paged { block_size, pool } => pool.free() * block_size,
            Self::Contiguous { buddy } => buddy.free_slots(),
        }
    }

    /// Slots that hold what a later request may ask for, and can be given out all the same.
    pub(crate) fn cached_slots(&self) -> u32 {
        match self {
            Self::Paged { block_size, pool } => pool.cached() * block_size,
            Self::Contiguous { .. } => 0,
        }
    }

    /// Slots that sequences count twice or more often, beyond the first time.
    pub(crate) fn shared_slots(&self) -> u32 {
        match self {
            Self::Paged { block_size, pool } => pool.shared() * block_size,
            Self::Contiguous { .. } => 0,
        }
    }

    /// The blocks, from the first on, that hold what these names say: at most `most`.
    pub(crate) fn find(&self, names: &[BlockName], most: u32) -> Vec<u32> {
        let Self::Paged { pool, .. } = self else { return Vec::new() };
        names.iter().take(most as usize).map_while(|&name| pool.find(name)).collect()
    }

    /// How many of these blocks, which were found, surely cost nothing to share: they have users, and so do all before them.
    /// A cached block may be given to another sequence first, and what comes after it is then not found any more. (It can
    /// be in use all the same, by a sequence that computed the block before for itself.)
    pub(crate) fn in_use(&self, blocks: &[u32]) -> u32 {
        let Self::Paged { pool, .. } = self else { return 0 };
        blocks.iter().take_while(|&&block| pool.references(block) > 0).count() as u32
    }

    /// Blocks that only this hold has.
    #[inline]
    pub(crate) fn own_blocks(&self, hold: &KvHold) -> u32 {
        let (Self::Paged { pool, .. }, KvHold::Paged(table)) = (self, hold) else { return 0 };
        match pool.shared() {
            0 => table.blocks().len() as u32,
            _ => table.blocks().iter().filter(|&&block| pool.references(block) == 1).count() as u32,
        }
    }

    /// Names the blocks of `hold` from `first` on; they are full and stay as they are.
    pub(crate) fn name(&mut self, hold: &KvHold, first: usize, names: &[BlockName]) {
        let (Self::Paged { pool, .. }, KvHold::Paged(table)) = (self, hold) else { return };
        for (&block, &name) in table.blocks()[first..].iter().zip(names) {
            pool.name(block, name);
        }
    }

    /// The most slots one sequence can hold when it is alone.
    #[inline]
    pub(crate) fn largest_hold(&self) -> u32 {
        match self {
            Self::Paged { .. } => self.total_slots(),
            Self::Contiguous { buddy } => buddy.largest(),
        }
    }

    /// A copy of the books for a policy to plan with.
    pub(crate) fn trial(&self) -> KvTrial {
        match self {
            Self::Paged { block_size, pool } => KvTrial::paged(*block_size, pool),
            Self::Contiguous { buddy } => KvTrial::contiguous(buddy),
        }
    }

    /// Slots for a sequence that starts: blocks for `len` tokens, of which `found` are the first, or a region of
    /// `reservation` slots.
    pub(crate) fn admit(&mut self, len: u32, reservation: u32, found: &[u32]) -> Option<KvHold> {
        match self {
            Self::Paged { block_size, pool } => {
                let mut table = BlockTable::new(*block_size);
                table.share(found, pool);
                if table.grow(len, pool) {
                    return Some(KvHold::Paged(table));
                }
                table.release(pool);
                None
            }
            Self::Contiguous { buddy } => buddy.allocate(reservation).map(KvHold::Contiguous),
        }
    }

    /// Makes `hold` reach `len` slots; false when it cannot.
    #[inline]
    pub(crate) fn grow(&mut self, hold: &mut KvHold, len: u32) -> bool {
        match (self, hold) {
            (Self::Paged { pool, .. }, KvHold::Paged(table)) => len <= table.slots() || table.grow(len, pool),
            (_, hold) => len <= hold.slots(),
        }
    }

    /// Takes back what `hold` has beyond its first `len` slots, where memory grows.
    pub(crate) fn shrink(&mut self, hold: &mut KvHold, len: u32) {
        if let (Self::Paged { pool, .. }, KvHold::Paged(table)) = (self, hold) {
            table.shrink(len, pool);
        }
    }

    /// Takes all slots of `hold` back.
    pub(crate) fn release(&mut self, hold: &mut KvHold) {
        match (self, std::mem::replace(hold, KvHold::None)) {
            (_, KvHold::None) => {}
            (Self::Paged { pool, .. }, KvHold::Paged(mut table)) => table.release(pool),
            (Self::Contiguous { buddy }, KvHold::Contiguous(region)) => buddy.release(region),
            _ => unreachable!("a hold is of its memory's layout"),
        }
    }

    /// The O(1) check of every step: `held` slots of sequences, each counted once, the cached and the free ones are all
    /// slots.
    pub(crate) fn check(&self, held: u64) {
        if let Self::Paged { pool, .. } = self {
            pool.check();
        }
        let (free, cached, total) = (self.free_slots(), self.cached_slots(), self.total_slots());
        assert!(
            held + u64::from(free) + u64::from(cached) == u64::from(total),
            "{held} KV slots held by sequences, {cached} cached and {free} free ones are not all {total}"
        );
    }

    /// Counts everything anew.
    pub(crate) fn recount(&self) {
        match self {
            Self::Paged { pool, .. } => pool.recount(),
            Self::Contiguous { buddy } => buddy.recount(),
        }
    }
}
