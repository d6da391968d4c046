//! K and V on the move: between slots of the cache, and to and from a swap space in pinned host memory, which kernels read and
//! write over the bus.

use cudarc::driver::CudaEvent;

use super::device::{Arg, Device, Grid, Kernel, Pinned};
use super::memory::CudaKvCache;
use crate::{KernelError, KvShape, SwapDirection};

/// Bytes that a thread copies at a time.
const VECTOR: usize = 16;

/// Threads that copy a row of one array.
const THREADS: u32 = 128;

/// Pairs of slots of a launch, at most.
const PAIRS: usize = 4096;

/// Launches that may be under way, behind a step that runs: for one more, the host waits for the oldest.
const LAUNCHES: usize = 4;

/// K and V of tokens in pinned host memory, arranged as in a cache.
#[derive(Debug)]
pub struct CudaKvHost {
    memory: Pinned<u8>,
    shape: KvShape,
}

impl CudaKvHost {
    pub(super) fn new(device: &Device, shape: KvShape) -> Result<Self, KernelError> {
        let memory = device.pinned(CudaKvCache::bytes(&shape), "the swap space: give it fewer bytes")?;
        Ok(Self { memory, shape })
    }
}

/// What queues copies.
#[derive(Debug)]
pub(super) struct SlotCopier {
    kernel: Kernel,
    launches: [Launch; LAUNCHES],
    /// That of the oldest, or one that none uses.
    next: usize,
}

/// What a launch under way holds.
#[derive(Debug)]
struct Launch {
    /// Its pairs, which the kernel reads where they lie.
    pairs: Pinned<u32>,
    /// When it is done with them.
    done: CudaEvent,
}

impl Launch {
    fn new(device: &Device) -> Result<Self, KernelError> {
        Ok(Self {
            pairs: device.pinned(2 * PAIRS, "copies of KV slots (pinned memory): free memory of the host")?,
            done: device.signal()?,
        })
    }
}

/// The arrays of a cache or of host memory.
#[derive(Debug, Clone, Copy)]
struct Arrays {
    address: u64,
    slots: usize,
}

impl SlotCopier {
    pub(super) fn new(device: &Device) -> Result<Self, KernelError> {
        let launch = || Launch::new(device);
        Ok(Self {
            kernel: device.overlapping_kernel("copy_slots")?,
            launches: [launch()?, launch()?, launch()?, launch()?],
            next: 0,
        })
    }

    /// Queues copies between a cache and host memory.
    pub(super) fn swap(
        &mut self,
        device: &Device,
        direction: SwapDirection,
        cache: &CudaKvCache,
        host: &CudaKvHost,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError> {
        cache.shape().check_swap(&host.shape, slots);
        let there = Arrays { address: host.memory.address(), slots: host.shape.slots };
        self.copy(device, cache, there, direction == SwapDirection::Out, slots)
    }

    /// Queues copies within a cache.
    pub(super) fn within(
        &mut self,
        device: &Device,
        cache: &CudaKvCache,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError> {
        cache.shape().check_swap(&cache.shape(), slots);
        self.copy(device, cache, arrays(cache), true, slots)
    }

    fn copy(
        &mut self,
        device: &Device,
        cache: &CudaKvCache,
        there: Arrays,
        out: bool,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError> {
        let (here, shape) = (arrays(cache), cache.shape());
        let row = shape.kv_heads * shape.head_dim * shape.dtype.bytes();
        assert!(row.is_multiple_of(VECTOR), "heads are multiples of {VECTOR} bytes");
        let words = |slots: usize| (slots * (row / VECTOR)) as u64;
        for slots in slots.chunks(PAIRS) {
            let Launch { pairs, done } = &mut self.launches[self.next];
            self.next = (self.next + 1) % LAUNCHES;
            // The launch that had these pairs last may still read them.
            device.wait(done)?;
            pairs.values_mut()[..2 * slots.len()].copy_from_slice(slots.as_flattened());
            device.launch(
                &self.kernel,
                Grid::of(slots.len() as u32, 2 * shape.layers as u32, THREADS),
                &[
                    Arg::Ptr(here.address),
                    Arg::Ptr(there.address),
                    Arg::Ptr(pairs.address()),
                    Arg::U64(words(here.slots)),
                    Arg::U64(words(there.slots)),
                    Arg::U32((row / VECTOR) as u32),
                    Arg::U32(u32::from(out)),
                ],
            );
            device.record(done);
        }
        device.check()
    }
}

fn arrays(cache: &CudaKvCache) -> Arrays {
    Arrays { address: cache.layer(0)[0], slots: cache.shape().slots }
}
