//! Weights from host memory to the device through pinned buffers: while one is on its way, threads fill the other.

use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::device::{Device, Pinned};
use crate::KernelError;

/// Bytes of each buffer: long enough copies to reach the bus's rate, little enough memory to pin.
const BUFFER: usize = 64 << 20;
/// Bytes that are worth a thread.
const SHARE: usize = 4 << 20;
/// Threads that copy, at most: reading memory (or the page cache) must outrun the bus.
const MOST_THREADS: usize = 8;

/// Copies to the device through two pinned buffers.
pub(super) struct Uploader {
    device: Arc<Device>,
    buffers: [(Pinned<u8>, CudaEvent); 2],
    next: usize,
    threads: usize,
}

impl Uploader {
    pub(super) fn new(device: Arc<Device>) -> Result<Self, KernelError> {
        let what = "loading weights (pinned memory): free memory of the host";
        let buffer = || Ok::<_, KernelError>((device.pinned(BUFFER, what)?, device.event()?));
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        Ok(Self { buffers: [buffer()?, buffer()?], device, next: 0, threads: cores.min(MOST_THREADS) })
    }

    /// Queues copies of all of `bytes` to `at`. What is returned to was read from `bytes`, but may still be on its way.
    pub(super) fn copy(&mut self, bytes: &[u8], at: u64) -> Result<(), KernelError> {
        for (index, piece) in bytes.chunks(BUFFER).enumerate() {
            let (buffer, sent) = &mut self.buffers[self.next];
            self.next ^= 1;
            sent.synchronize().map_err(|e| KernelError::Device(format!("a copy to the device: {e}")))?;
            fill(&mut buffer.values_mut()[..piece.len()], piece, self.threads);
            self.device.upload_pinned(buffer, piece.len(), at + (index * BUFFER) as u64);
            self.device.record(sent);
        }
        self.device.check()
    }
}

impl std::fmt::Debug for Uploader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploader").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// Copies with several threads: one alone does not fault in and read mapped pages as fast as the bus takes them.
fn fill(to: &mut [u8], from: &[u8], threads: usize) {
    let share = from.len().div_ceil(threads).max(SHARE);
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(share).zip(from.chunks(share)) {
            scope.spawn(move || to.copy_from_slice(from));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::fill;

    #[test]
    fn every_byte_is_copied() {
        let from: Vec<u8> = (0..9_000_001u32).map(|i| ((i * 31) >> 3) as u8).collect();
        let mut to = vec![0; from.len()];
        fill(&mut to, &from, 3);
        assert!(to == from);
    }
}
