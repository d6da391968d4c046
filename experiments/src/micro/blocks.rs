//! Where contexts lie in the memory of a micro-benchmark.

use quire_kernels::KvIndex;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// Blocks of one size at random places: each use takes those that were not used for the longest time, so that K and V come
/// from memory.
#[derive(Debug)]
pub(super) struct Places {
    block_size: u32,
    blocks: Vec<u32>,
    next: usize,
    in_order: bool,
}

/// Contexts of one length each, at places of their own.
#[derive(Debug)]
pub(super) enum Contexts {
    /// One region a sequence.
    Contiguous { start: Vec<u32> },
    /// Blocks.
    Paged { block_size: u32, tables: Vec<u32>, start: Vec<u32> },
}

impl Places {
    /// Blocks of `block_size` slots in a memory of `slots`, shuffled by `seed`.
    pub(super) fn shuffled(slots: usize, block_size: u32, seed: u64) -> Self {
        let mut blocks: Vec<u32> = (0..slots as u32 / block_size).collect();
        blocks.shuffle(&mut StdRng::seed_from_u64(seed));
        Self { block_size, blocks, next: 0, in_order: false }
    }

    /// Regions of `size` slots in a memory of `slots`, in order.
    pub(super) fn in_order(slots: usize, size: u32) -> Self {
        Self { block_size: size, blocks: (0..slots as u32 / size).collect(), next: 0, in_order: true }
    }

    /// The next `count` blocks.
    fn take(&mut self, count: usize) -> Vec<u32> {
        assert!(count <= self.blocks.len(), "the memory was made for the largest point");
        if self.next + count > self.blocks.len() {
            self.next = 0;
        }
        self.next += count;
        self.blocks[self.next - count..self.next].to_vec()
    }

    /// The next contexts, of `len` tokens each: blocks, or regions that are as many blocks in a row.
    pub(super) fn contexts(&mut self, sequences: usize, len: u32) -> Contexts {
        let each = len.div_ceil(self.block_size) as usize;
        let blocks = self.take(sequences * each);
        match self.in_order {
            true => Contexts::Contiguous {
                start: blocks.iter().step_by(each).map(|block| block * self.block_size).collect(),
            },
            false => Contexts::Paged {
                block_size: self.block_size,
                tables: blocks,
                start: (0..sequences).map(|sequence| (sequence * each) as u32).collect(),
            },
        }
    }
}

impl Contexts {
    /// As kernels take it.
    pub(super) fn index(&self) -> KvIndex<'_> {
        match self {
            Self::Contiguous { start } => KvIndex::Contiguous { start },
            Self::Paged { block_size, tables, start } => {
                KvIndex::Paged { block_size: *block_size, tables, table_start: start }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_all_used_before_one_is_again() {
        let mut places = Places::shuffled(1024, 16, 3);
        let mut seen: Vec<u32> = Vec::new();
        for _ in 0..8 {
            let Contexts::Paged { tables, start, .. } = places.contexts(2, 60) else {
                panic!("they are paged")
            };
            assert_eq!(start, [0, 4]);
            seen.extend(tables);
        }
        assert_ne!(seen, (0..64).collect::<Vec<_>>(), "they are shuffled");
        seen.sort_unstable();
        assert_eq!(seen, (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn regions_do_not_overlap() {
        let mut places = Places::in_order(2048, 256);
        let mut starts = Vec::new();
        for _ in 0..2 {
            let Contexts::Contiguous { start } = places.contexts(2, 500) else { panic!("they are not") };
            starts.extend(start);
        }
        assert_eq!(starts, [0, 512, 1024, 1536]);
    }
}
