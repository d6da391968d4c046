//! Fixed-size blocks with reference counts.

/// Gives out blocks of equal size by number and counts their users.
///
/// A block is *free* (on the free list) or *referenced* (one user or more). Blocks are given out last freed first,
/// so a pool that is never full touches little memory. All operations are O(1).
#[derive(Debug, Clone)]
pub struct BlockPool {
    /// Free blocks; the last is given out next.
    free: Vec<u32>,
    /// Users of each block; 0 is free.
    references: Vec<u32>,
    /// Blocks with at least one user, kept apart from the free list so that the two check each other.
    referenced: u32,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, numbered from 0.
    pub fn new(blocks: u32) -> Self {
        Self { free: (0..blocks).rev().collect(), references: vec![0; blocks as usize], referenced: 0 }
    }

    /// A free block with one reference, or `None` when all are taken.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
        self.references[block as usize] = 1;
        self.referenced += 1;
        Some(block)
    }

    /// Adds a reference to a block in use.
    ///
    /// # Panics
    /// When the block is free or not of this pool.
    pub fn retain(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "block {block} is free and cannot be shared");
        *count += 1;
    }

    /// Gives up a reference; true when it was the last and the block is free again.
    ///
    /// # Panics
    /// When the block is free already or not of this pool.
    pub fn release(&mut self, block: u32) -> bool {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "block {block} is freed twice");
        *count -= 1;
        if *count > 0 {
            return false;
        }
        self.referenced -= 1;
        self.free.push(block);
        true
    }

    /// All blocks.
    pub fn total(&self) -> u32 {
        self.references.len() as u32
    }

    /// Blocks without users.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks with at least one user.
    pub fn referenced(&self) -> u32 {
        self.referenced
    }

    /// References to one block.
    pub fn references(&self, block: u32) -> u32 {
        self.references[block as usize]
    }

    /// The O(1) invariant: free + referenced = all.
    ///
    /// # Panics
    /// When it does not hold.
    pub fn check(&self) {
        let (free, referenced, total) = (self.free(), self.referenced, self.total());
        assert!(
            free + referenced == total,
            "{free} free + {referenced} referenced blocks are not all {total}"
        );
    }

    /// Counts everything anew: every block on the free list is there once and has no users, every other has some.
    ///
    /// # Panics
    /// When the books do not balance.
    pub fn recount(&self) {
        self.check();
        let mut on_list = vec![false; self.references.len()];
        for &block in &self.free {
            let seen = std::mem::replace(&mut on_list[block as usize], true);
            assert!(!seen, "block {block} is on the free list twice");
        }
        for (block, (&count, &free)) in self.references.iter().zip(&on_list).enumerate() {
            assert!((count == 0) == free, "block {block}: {count} references, on the free list: {free}");
        }
    }
}
