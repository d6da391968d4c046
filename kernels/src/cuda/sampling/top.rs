//! The most probable tokens of rows that want them: the launches of `kernels/cuda/sampling_top.cuh`.

use super::rules::SampleRequest;
use super::{Device, DeviceVec, Grid, Kernel, Pinned, TOP_ROOM, WHAT, grow, grow_pinned};
use crate::KernelError;
use crate::cuda::device::Arg;
use crate::sampling::Choice;

/// Words of what is wanted of a row, `TopRow` in `sampling_top.cuh`, and of a token found.
const WANTED_WORDS: usize = 4;
const FOUND_WORDS: usize = 2;
const THREADS: u32 = 512;

/// The device's side.
#[derive(Debug)]
pub(super) struct Top {
    kernel: Kernel,
    vocab: usize,
    wanted: DeviceVec<u32>,
    found: DeviceVec<u32>,
}

/// The host's side of a batch under way.
#[derive(Debug)]
pub(super) struct TopSlot {
    staging: Pinned<u32>,
    read: Pinned<u32>,
    /// How many are wanted of each row; empty where none are of any.
    counts: Vec<usize>,
}

impl TopSlot {
    pub(super) fn new(device: &Device, max_rows: usize) -> Result<Self, KernelError> {
        Ok(Self {
            staging: device.pinned(max_rows * WANTED_WORDS, WHAT)?,
            read: device.pinned(max_rows * TOP_ROOM * FOUND_WORDS, WHAT)?,
            counts: Vec::with_capacity(max_rows),
        })
    }

    /// What was found of each row, once the batch is done.
    pub(super) fn found(&self) -> impl Iterator<Item = Vec<Choice>> {
        let mut rest = self.read.values();
        self.counts.iter().map(move |&count| {
            let (row, behind) = rest.split_at(count * FOUND_WORDS);
            rest = behind;
            let choice = |words: &[u32]| Choice { token: words[0], logprob: f32::from_bits(words[1]) };
            row.chunks_exact(FOUND_WORDS).map(choice).collect()
        })
    }
}

impl Top {
    pub(super) fn new(device: &Device, max_rows: usize, vocab: usize) -> Result<Self, KernelError> {
        Ok(Self {
            kernel: device.kernel("sample_top")?,
            vocab,
            wanted: device.alloc(max_rows * WANTED_WORDS, WHAT)?,
            found: device.alloc(max_rows * TOP_ROOM * FOUND_WORDS, WHAT)?,
        })
    }

    /// Queues the search in the rows that want tokens, and the copy of what it finds to the slot.
    pub(super) fn queue(
        &mut self,
        device: &Device,
        logits: u64,
        requests: &[SampleRequest<'_>],
        slot: &mut TopSlot,
    ) -> Result<(), KernelError> {
        slot.counts.clear();
        if requests.iter().all(|request| request.top == 0) {
            return Ok(());
        }
        slot.counts.extend(requests.iter().map(|request| request.top.min(self.vocab)));
        let rows = slot.counts.iter().filter(|&&count| count > 0).count();
        let tokens: usize = slot.counts.iter().sum();
        let words = u32::try_from(tokens * FOUND_WORDS)
            .map_err(|_| KernelError::Shape(format!("{tokens} most probable tokens of a batch")))?;
        grow(device, &mut self.wanted, rows * WANTED_WORDS)?;
        grow(device, &mut self.found, words as usize)?;
        grow_pinned(device, &mut slot.staging, rows * WANTED_WORDS)?;
        grow_pinned(device, &mut slot.read, words as usize)?;
        pack(&slot.counts, slot.staging.values_mut());
        device.upload_pinned(&slot.staging, rows * WANTED_WORDS, self.wanted.ptr());
        device.launch(
            &self.kernel,
            Grid::of(rows as u32, 1, THREADS),
            &[
                Arg::Ptr(logits),
                Arg::Ptr(self.wanted.ptr()),
                Arg::Ptr(self.found.ptr()),
                Arg::U32(self.vocab as u32),
            ],
        );
        device.download_pinned(self.found.ptr(), &mut slot.read, 0..words as usize);
        Ok(())
    }
}

/// Packs the rows that want tokens: row, count, and the word from which on what is found of it is written.
fn pack(counts: &[usize], words: &mut [u32]) {
    let mut at = 0;
    let wanting = counts.iter().enumerate().filter(|&(_, &count)| count > 0);
    for ((row, &count), words) in wanting.zip(words.chunks_exact_mut(WANTED_WORDS)) {
        words.copy_from_slice(&[row as u32, count as u32, at, 0]);
        at += (count * FOUND_WORDS) as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::pack;

    #[test]
    fn rows_that_want_none_are_left_out() {
        let mut words = [9; 8];
        pack(&[0, 3, 0, 20], &mut words);
        assert_eq!(words, [1, 3, 0, 0, 3, 20, 6, 0]);
    }
}
