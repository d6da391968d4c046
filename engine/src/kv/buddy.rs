//! Contiguous regions of power-of-two sizes (Knowlton 1965).

use std::collections::{BTreeMap, BTreeSet};

/// Orders a `u32` size can have: 2^0 to 2^31.
pub(super) const ORDERS: usize = 32;

/// A contiguous region of `1 << order` slots; its start is a multiple of its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Region {
    /// First slot.
    pub start: u32,
    /// Binary logarithm of its size.
    pub order: u32,
}

impl Region {
    /// Slots in it.
    pub fn slots(self) -> u32 {
        1 << self.order
    }
}

/// A buddy allocator over any number of slots.
///
/// A total that is no power of two is cut into its binary digits, the largest first: 13 slots are regions of 8, 4
/// and 1. Each starts at a multiple of its size, and the buddy of such an uncut region lies in a smaller one or past
/// the end, so it never coalesces beyond it.
#[derive(Debug, Clone)]
pub struct BuddyAllocator {
    /// Starts of the free regions of each order; the lowest is given out first.
    free: Vec<BTreeSet<u32>>,
    /// Order of each region given out, by its start.
    taken: BTreeMap<u32, u32>,
    total: u32,
    free_slots: u32,
}

/// The smallest order whose regions hold `slots` slots, if there is one.
pub(super) fn order_for(slots: u32) -> Option<u32> {
    slots.max(1).checked_next_power_of_two().map(u32::ilog2)
}

impl BuddyAllocator {
    /// An allocator over `total` free slots.
    pub fn new(total: u32) -> Self {
        let mut free = vec![BTreeSet::new(); ORDERS];
        let mut start = 0;
        for order in (0..ORDERS as u32).rev().filter(|&order| total >> order & 1 == 1) {
            free[order as usize].insert(start);
            start += 1 << order;
        }
        Self { free, taken: BTreeMap::new(), total, free_slots: total }
    }

    /// A region of at least `slots` slots (rounded up to a power of two), or `None` when no free region is that
    /// large, however many slots are free in smaller ones.
    pub fn allocate(&mut self, slots: u32) -> Option<Region> {
        let order = order_for(slots)?;
        let found = (order..ORDERS as u32).find(|&o| !self.free[o as usize].is_empty())?;
        let start = self.free[found as usize].pop_first()?;
        for split in (order..found).rev() {
            self.free[split as usize].insert(start + (1 << split));
        }
        self.taken.insert(start, order);
        self.free_slots -= 1 << order;
        Some(Region { start, order })
    }

    /// Takes a region back and joins it with its buddy while that is free.
    ///
    /// # Panics
    /// When the region is not one given out.
    pub fn release(&mut self, region: Region) {
        let taken = self.taken.remove(&region.start);
        assert!(taken == Some(region.order), "{region:?} is freed, but {taken:?} was taken there");
        self.free_slots += region.slots();
        let Region { mut start, mut order } = region;
        while order + 1 < ORDERS as u32 && self.free[order as usize].remove(&(start ^ (1 << order))) {
            start &= !(1 << order);
            order += 1;
        }
        self.free[order as usize].insert(start);
    }

    /// All slots.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Slots in free regions.
    pub fn free_slots(&self) -> u32 {
        self.free_slots
    }

    /// Slots of the largest region an empty allocator can give; 0 when it has no slots at all.
    pub fn largest(&self) -> u32 {
        if self.total == 0 { 0 } else { 1 << self.total.ilog2() }
    }

    /// Free regions of each order.
    pub(super) fn free_counts(&self) -> [u32; ORDERS] {
        std::array::from_fn(|order| self.free[order].len() as u32)
    }

    /// Walks over all slots: free and taken regions cover them exactly once, aligned, and no two free buddies are
    /// left apart.
    ///
    /// # Panics
    /// When they do not.
    pub fn recount(&self) {
        let free = self.free.iter().enumerate();
        let free = free.flat_map(|(order, starts)| starts.iter().map(move |&start| (start, order as u32)));
        let mut all: Vec<_> = free.chain(self.taken.iter().map(|(&start, &order)| (start, order))).collect();
        all.sort_unstable();
        let mut next = 0;
        for (start, order) in all {
            assert!(start == next, "the region at {start} should start at {next}");
            assert!(
                start.is_multiple_of(1 << order),
                "the region at {start} of order {order} is not aligned"
            );
            next = start + (1 << order);
        }
        assert!(next == self.total, "the regions end at {next}, not at {}", self.total);
        let mut free_slots = 0;
        for (order, starts) in self.free.iter().enumerate() {
            free_slots += starts.len() << order;
            for &start in starts {
                let buddy = start ^ (1 << order);
                assert!(
                    !starts.contains(&buddy),
                    "free buddies {start} and {buddy} of order {order} are apart"
                );
            }
        }
        assert!(
            free_slots == self.free_slots as usize,
            "{free_slots} slots are free, not {}",
            self.free_slots
        );
    }
}
