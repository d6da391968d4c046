//! From a sequence's positions to blocks.

use super::BlockPool;

/// The physical block of each logical block of one sequence: position `p` lies in entry `p / block_size`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
    block_size: u32,
}

impl BlockTable {
    /// An empty table over blocks of `block_size` slots.
    ///
    /// # Panics
    /// When `block_size` is 0.
    pub fn new(block_size: u32) -> Self {
        assert!(block_size > 0, "a block has at least one slot");
        Self { blocks: Vec::new(), block_size }
    }

    /// Slots in a block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Physical blocks, in order of position.
    #[inline]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Slots in the blocks held.
    #[inline]
    pub fn slots(&self) -> u32 {
        self.blocks.len() as u32 * self.block_size
    }

    /// The slot of a position.
    ///
    /// # Panics
    /// When the position lies past the blocks held.
    #[inline]
    pub fn slot(&self, position: u32) -> u32 {
        self.blocks[(position / self.block_size) as usize] * self.block_size + position % self.block_size
    }

    /// Takes a reference to each of `blocks` as its own first ones.
    ///
    /// # Panics
    /// When it holds blocks already.
    pub fn share(&mut self, blocks: &[u32], pool: &mut BlockPool) {
        assert!(self.blocks.is_empty(), "shared blocks come first");
        blocks.iter().for_each(|&block| pool.retain(block));
        self.blocks.extend_from_slice(blocks);
    }

    /// Takes blocks until `slots` slots are held; false, with nothing taken, when the pool has too few.
    pub fn grow(&mut self, slots: u32, pool: &mut BlockPool) -> bool {
        let wanted = slots.div_ceil(self.block_size) as usize;
        let missing = wanted.saturating_sub(self.blocks.len());
        if missing > pool.available() as usize {
            return false;
        }
        self.blocks.extend(
            (0..missing)
                .map(|_| pool.allocate().expect("the pool has as many blocks to give as it said just now")),
        );
        true
    }

    /// Gives back the blocks after those that `slots` slots need.
    pub fn shrink(&mut self, slots: u32, pool: &mut BlockPool) {
        let kept = slots.div_ceil(self.block_size) as usize;
        for block in self.blocks.drain(kept.min(self.blocks.len())..).rev() {
            pool.release(block);
        }
    }

    /// Gives all blocks back, the first last, so that a sequence alone gets its blocks in order again.
    pub fn release(&mut self, pool: &mut BlockPool) {
        for block in self.blocks.drain(..).rev() {
            pool.release(block);
        }
    }
}
