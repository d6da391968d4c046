//! Where positions lie in the KV cache: the only thing that paged and contiguous attention differ in.

/// Gives the slots of runs of positions.
pub(crate) trait Addressing: Copy + Sync {
    /// Writes, for positions `start .. start + offsets.len()` of a sequence, slot times `stride`.
    fn offsets(self, sequence: usize, start: usize, stride: usize, offsets: &mut [usize]);
    /// The number of slots that must exist for the first `context` positions of a sequence, or `None` when the
    /// index is too short to say.
    fn slots_needed(self, sequence: usize, context: usize) -> Option<usize>;
}

/// Blocks of `block_size` slots, through a table for each sequence.
#[derive(Clone, Copy)]
pub(crate) struct Paged<'a> {
    pub(crate) block_size: usize,
    pub(crate) tables: &'a [u32],
    pub(crate) table_start: &'a [u32],
}

impl Addressing for Paged<'_> {
    #[inline(always)]
    fn offsets(self, sequence: usize, start: usize, stride: usize, offsets: &mut [usize]) {
        let table = &self.tables[self.table_start[sequence] as usize..];
        let (first, within) = (start / self.block_size, start % self.block_size);
        let (head, rest) = offsets.split_at_mut((self.block_size - within).min(offsets.len()));
        let base = table[first] as usize * self.block_size + within;
        for (i, offset) in head.iter_mut().enumerate() {
            *offset = (base + i) * stride;
        }
        for (block, offsets) in table[first + 1..].iter().zip(rest.chunks_mut(self.block_size)) {
            let base = *block as usize * self.block_size;
            for (i, offset) in offsets.iter_mut().enumerate() {
                *offset = (base + i) * stride;
            }
        }
    }

    fn slots_needed(self, sequence: usize, context: usize) -> Option<usize> {
        let start = *self.table_start.get(sequence)? as usize;
        let end = start.checked_add(context.div_ceil(self.block_size))?;
        let greatest = self.tables.get(start..end)?.iter().max()?;
        (*greatest as usize + 1).checked_mul(self.block_size)
    }
}

/// One region for each sequence.
#[derive(Clone, Copy)]
pub(crate) struct Contiguous<'a> {
    pub(crate) start: &'a [u32],
}

impl Addressing for Contiguous<'_> {
    #[inline(always)]
    fn offsets(self, sequence: usize, start: usize, stride: usize, offsets: &mut [usize]) {
        let base = self.start[sequence] as usize + start;
        for (i, offset) in offsets.iter_mut().enumerate() {
            *offset = (base + i) * stride;
        }
    }

    fn slots_needed(self, sequence: usize, context: usize) -> Option<usize> {
        (*self.start.get(sequence)? as usize).checked_add(context)
    }
}
