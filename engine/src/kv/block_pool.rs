//! Fixed-size blocks with reference counts, some of them kept for what they hold.

use std::collections::{BTreeMap, HashMap};

use super::BlockName;

/// Gives out blocks of equal size by number and counts their users.
///
/// A block is *referenced* (one user or more), *cached* (no user, but a name by which what it holds can be found) or
/// *free*. Free blocks are given out first, last freed first, so a pool that is never full touches little memory; then
/// the cached ones, least recently used first, which lose their names. Operations are O(1), with a cached block
/// logarithmic in their number.
#[derive(Debug, Clone)]
pub struct BlockPool {
    /// Free blocks; the last is given out next.
    free: Vec<u32>,
    /// Users of each block; 0 is free or cached.
    references: Vec<u32>,
    /// Blocks with at least one user, kept apart from the free list so that the two check each other.
    referenced: u32,
    /// References beyond each block's first.
    shared: u32,
    /// The name of each block that has one.
    names: Vec<Option<BlockName>>,
    by_name: HashMap<BlockName, u32>,
    /// Cached blocks by when they lost their last user, and when each did.
    cached: BTreeMap<u64, u32>,
    left: Vec<u64>,
    clock: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, numbered from 0.
    pub fn new(blocks: u32) -> Self {
        Self {
            free: (0..blocks).rev().collect(),
            references: vec![0; blocks as usize],
            referenced: 0,
            shared: 0,
            names: vec![None; blocks as usize],
            by_name: HashMap::new(),
            cached: BTreeMap::new(),
            left: vec![0; blocks as usize],
            clock: 0,
        }
    }

    /// A free or cached block with one reference and no name, or `None` when all have users.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.cached.pop_first()?;
                self.forget(block);
                block
            }
        };
        self.references[block as usize] = 1;
        self.referenced += 1;
        Some(block)
    }

    /// Gives a block in use a name; what it holds must not change after. Without effect when another block has that name.
    ///
    /// # Panics
    /// When the block has no user, or another name.
    pub fn name(&mut self, block: u32, name: BlockName) {
        assert!(self.references[block as usize] > 0, "block {block} has no user and cannot be named");
        let known = *self.by_name.entry(name).or_insert(block);
        if known == block {
            let own = self.names[block as usize].get_or_insert(name);
            assert!(*own == name, "block {block} has another name");
        }
    }

    /// The block of this name.
    pub fn find(&self, name: BlockName) -> Option<u32> {
        self.by_name.get(&name).copied()
    }

    /// Adds a reference to a block in use or cached.
    ///
    /// # Panics
    /// When the block is free or not of this pool.
    pub fn retain(&mut self, block: u32) {
        let count = &mut self.references[block as usize];
        if *count > 0 {
            self.shared += 1;
        } else {
            let cached = self.cached.remove(&self.left[block as usize]);
            assert!(cached == Some(block), "block {block} is free and cannot be shared");
            self.referenced += 1;
        }
        *count += 1;
    }

    /// Gives up a reference; true when it was the last and the block is free again, or cached if it has a name.
    ///
    /// # Panics
    /// When the block has no user already or is not of this pool.
    pub fn release(&mut self, block: u32) -> bool {
        let count = &mut self.references[block as usize];
        assert!(*count > 0, "block {block} is freed twice");
        *count -= 1;
        if *count > 0 {
            self.shared -= 1;
            return false;
        }
        self.referenced -= 1;
        if self.names[block as usize].is_some() {
            self.clock += 1;
            self.left[block as usize] = self.clock;
            self.cached.insert(self.clock, block);
        } else {
            self.free.push(block);
        }
        true
    }

    fn forget(&mut self, block: u32) {
        if let Some(name) = self.names[block as usize].take() {
            self.by_name.remove(&name);
        }
    }

    /// All blocks.
    #[inline]
    pub fn total(&self) -> u32 {
        self.references.len() as u32
    }

    /// Blocks without users and names.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Blocks without users that hold what a name tells.
    pub fn cached(&self) -> u32 {
        self.cached.len() as u32
    }

    /// Blocks that can be given out: free and cached.
    pub fn available(&self) -> u32 {
        self.free() + self.cached()
    }

    /// Blocks with at least one user.
    pub fn referenced(&self) -> u32 {
        self.referenced
    }

    /// References beyond each block's first: by so much the users' counts exceed the blocks.
    #[inline]
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// References to one block.
    pub fn references(&self, block: u32) -> u32 {
        self.references[block as usize]
    }

    /// The O(1) invariant: free + cached + referenced = all.
    ///
    /// # Panics
    /// When it does not hold.
    pub fn check(&self) {
        let (free, cached, referenced, total) = (self.free(), self.cached(), self.referenced, self.total());
        assert!(
            free + cached + referenced == total,
            "{free} free + {cached} cached + {referenced} referenced blocks are not all {total}"
        );
    }

    /// Counts everything anew: every block is on one list or has users, and names lead to their blocks.
    ///
    /// # Panics
    /// When the books do not balance.
    pub fn recount(&self) {
        self.check();
        let mut listed = vec![false; self.references.len()];
        for &block in self.free.iter().chain(self.cached.values()) {
            let seen = std::mem::replace(&mut listed[block as usize], true);
            assert!(!seen, "block {block} is listed twice");
        }
        for (block, (&count, &listed)) in self.references.iter().zip(&listed).enumerate() {
            assert!((count == 0) == listed, "block {block}: {count} references, listed: {listed}");
        }
        let beyond = |&count: &u32| u64::from(count.saturating_sub(1));
        assert!(
            self.references.iter().map(beyond).sum::<u64>() == u64::from(self.shared),
            "shared references"
        );
        for (block, name) in (0..).zip(&self.names) {
            assert!(
                name.is_none_or(|name| self.find(name) == Some(block)),
                "block {block} is not found by its name"
            );
        }
        assert!(self.by_name.len() == self.names.iter().flatten().count(), "names without blocks");
        assert!(
            self.free.iter().all(|&block| self.names[block as usize].is_none()),
            "a free block has a name"
        );
    }
}
