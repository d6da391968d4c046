//! Attention on the GPU: the kernels of one model's heads and their launches.
//!
//! Sequences with few query rows go to the decode kernel, which divides contexts among teams of CTAs; all others to
//! the prefill kernel, which divides query rows: on Hopper to one of its own.

mod plan;

use super::device::{Arg, Device, DeviceVec, Grid, Kernel};
use super::step::CudaStep;
use crate::{HeadShape, KernelError, KvDtype};

pub(super) use plan::{AttentionPlan, PlanBounds, Tuning};

/// Threads of a CTA of the decode kernel, and of the prefill kernel.
const THREADS: u32 = 128;
/// Threads of a CTA of the prefill kernel for Hopper.
const HOPPER_THREADS: u32 = 384;
/// Head dimensions that the kernels are compiled for.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

/// The kernels of one layout of the KV cache.
#[derive(Debug)]
struct Layout {
    decode: Kernel,
    prefill: Prefill,
}

/// The prefill kernels of one layout.
#[derive(Debug)]
enum Prefill {
    /// By 64 and 128 rows a tile.
    General([Kernel; 2]),
    Hopper(Kernel),
}

impl Layout {
    fn new(device: &Device, heads: HeadShape, tuning: &Tuning, name: &str) -> Result<Self, KernelError> {
        let head_dim = heads.head_dim;
        let kv = tuning.kv.name();
        let ready = |kernel: Kernel, shared_bytes| {
            if shared_bytes > tuning.shared_bytes {
                return Err(KernelError::Shape(format!(
                    "attention over heads of {head_dim} elements takes {shared_bytes} bytes of shared memory a block, and this \
                     card has {}",
                    tuning.shared_bytes
                )));
            }
            kernel.allow_shared(shared_bytes)?;
            Ok::<_, KernelError>(kernel)
        };
        let load = |name: String, shared_bytes| ready(device.kernel(&name)?, shared_bytes);
        let decode = device.overlapping_kernel(&format!("attention_decode_{kv}_d{head_dim}_{name}"))?;
        let decode = ready(decode, decode_shared_bytes(head_dim, tuning.kv))?;
        let prefill = |rows: u32| {
            load(
                format!("attention_prefill_{kv}_d{head_dim}_r{rows}_{name}"),
                prefill_shared_bytes(head_dim, tuning.kv, rows),
            )
        };
        let prefill = if tuning.hopper {
            let name = format!("attention_prefill_hopper_{kv}_d{head_dim}_{name}");
            Prefill::Hopper(load(name, hopper_shared_bytes(head_dim, tuning.kv))?)
        } else {
            Prefill::General([prefill(64)?, prefill(tuning.most_prefill_rows(head_dim))?])
        };
        Ok(Self { decode, prefill })
    }
}

/// Dynamic shared memory of a CTA of the decode kernel: the warps' tiles, and what their merging needs.
fn decode_shared_bytes(head_dim: usize, kv: KvDtype) -> u32 {
    let row = row_bytes(head_dim, kv);
    let columns = if head_dim.is_multiple_of(64) { 64 } else { head_dim };
    let merge = 4 * 8 * (columns + 8) * 4 + 4 * 16 * 8 + 16 * 8 + 16;
    let stages = if head_dim * kv.bytes() <= 256 { 2 } else { 1 };
    // For each of four warps, 16 keys and 16 values a stage.
    (4 * stages * 2 * 16 * row + merge) as u32
}

/// Bytes of a head's row in shared memory, an odd number of pieces of 16.
fn row_bytes(head_dim: usize, kv: KvDtype) -> usize {
    let pieces = head_dim * kv.bytes() / 16;
    (pieces + 1 - pieces % 2) * 16
}

/// Dynamic shared memory of a CTA of the prefill kernel: queries, two tiles of keys and values as the cache holds them
/// (bytes without padding), and one that they are widened to if they are bytes.
fn prefill_shared_bytes(head_dim: usize, kv: KvDtype, rows: u32) -> u32 {
    let tile = if head_dim <= 128 { 64 } else { 32 };
    let wide = row_bytes(head_dim, KvDtype::Bf16);
    let (stored, widened) = if kv.bytes() == 1 { (head_dim, 2 * tile * wide) } else { (wide, 0) };
    (rows as usize * wide + 2 * 2 * tile * stored + widened) as u32
}

/// Dynamic shared memory of a CTA of the prefill kernel for Hopper: queries, the stages of keys and of values, two tiles
/// of bytes that wait to be widened if the cache holds bytes, what is computed on and the barriers, from a multiple of
/// 1024 bytes on.
fn hopper_shared_bytes(head_dim: usize, kv: KvDtype) -> u32 {
    let row = 2 * head_dim.next_multiple_of(64);
    let (queries, tile) = if head_dim > 128 { (1, 64) } else { (2, 128) };
    let stages = if head_dim > 64 { 2 } else { 4 };
    let stored = if kv.bytes() == 1 { tile * head_dim.next_power_of_two() } else { 0 };
    let barriers = 8 * (2 * queries + 4 * stages);
    (1024 + (128 * queries + 2 * stages * tile) * row + 2 * stored + 4 * 32 + barriers) as u32
}

/// The kernels for one model's heads, and the memory that they merge in.
#[derive(Debug)]
pub(crate) struct AttentionKernels {
    heads: HeadShape,
    tuning: Tuning,
    paged: Layout,
    contiguous: Layout,
    partial_sums: DeviceVec<f32>,
    partial_stats: DeviceVec<[f32; 2]>,
    /// Zero between launches: the last of those that arrive sets it back.
    arrivals: DeviceVec<u32>,
}

impl AttentionKernels {
    /// For steps of up to `sequences` sequences.
    pub(crate) fn new(
        device: &Device,
        heads: HeadShape,
        sequences: usize,
        tuning: &Tuning,
        bounds: &PlanBounds,
    ) -> Result<Self, KernelError> {
        let HeadShape { heads: query_heads, kv_heads, head_dim } = heads;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(KernelError::Shape(format!("no attention kernel for heads of {head_dim} elements")));
        }
        if !query_heads.is_multiple_of(kv_heads) {
            return Err(KernelError::Shape(format!("{query_heads} query heads for {kv_heads} KV heads")));
        }
        let partial_rows = bounds.partial_rows() * kv_heads;
        let what =
            "attention's partial results: lower the number of sequences, or end other programs on the GPU";
        Ok(Self {
            heads,
            tuning: *tuning,
            paged: Layout::new(device, heads, tuning, "paged")?,
            contiguous: Layout::new(device, heads, tuning, "contiguous")?,
            partial_sums: device.alloc(partial_rows * head_dim, what)?,
            partial_stats: device.alloc(partial_rows, what)?,
            arrivals: device.zeroed(sequences * Tuning::team_size(heads), what)?,
        })
    }

    /// Queues the attention of one layer; the pointers are those of Q K V, the layer's keys and values, and the output.
    pub(crate) fn run(&self, device: &Device, step: &CudaStep, [qkv, k, v, out]: [u64; 4], scale: f32) {
        let layout = if step.block_size.is_some() { &self.paged } else { &self.contiguous };
        let HeadShape { heads, kv_heads, head_dim } = self.heads;
        let data = [out, qkv, k, v, step.tables, step.start].map(Arg::Ptr);
        let shape = [
            Arg::U32(heads as u32),
            Arg::U32(kv_heads as u32),
            Arg::U32(step.block_size.unwrap_or(1)),
            Arg::U32(step.window),
            Arg::F32(scale),
        ];
        if step.decodes && !self.tuning.one_order {
            let work = [
                step.decode_items,
                step.decode_teams,
                self.partial_sums.ptr(),
                self.partial_stats.ptr(),
                self.arrivals.ptr(),
            ];
            let ctas = self.tuning.teams(self.heads) * Tuning::team_size(self.heads);
            let grid = Grid {
                blocks: [ctas as u32, 1, 1],
                threads: THREADS,
                shared_bytes: decode_shared_bytes(head_dim, self.tuning.kv),
            };
            device.launch(&layout.decode, grid, &join::<16>(&[&data, &work.map(Arg::Ptr), &shape]));
        }
        if step.prefills > 0 {
            let pieces = step.prefills * kv_heads as u32;
            let items = [Arg::Ptr(step.prefill_items)];
            match &layout.prefill {
                Prefill::General(kernels) => {
                    let kernel = &kernels[usize::from(step.prefill_rows == 128)];
                    let shared_bytes = prefill_shared_bytes(head_dim, self.tuning.kv, step.prefill_rows);
                    let grid = Grid { blocks: [pieces, 1, 1], threads: THREADS, shared_bytes };
                    device.launch(kernel, grid, &join::<12>(&[&data, &items, &shape]));
                }
                // Its blocks go on to another piece when they are done with one.
                Prefill::Hopper(kernel) => {
                    let blocks = [pieces.min(self.tuning.multiprocessors), 1, 1];
                    let shared_bytes = hopper_shared_bytes(head_dim, self.tuning.kv);
                    let grid = Grid { blocks, threads: HOPPER_THREADS, shared_bytes };
                    device.launch(kernel, grid, &join::<13>(&[&data, &items, &shape, &[Arg::U32(pieces)]]));
                }
            }
        }
    }
}

/// The arguments of a launch, one after another.
fn join<const N: usize>(parts: &[&[Arg]]) -> [Arg; N] {
    let mut args = parts.iter().copied().flatten().copied();
    std::array::from_fn(|_| args.next().expect("as many arguments as the kernel has"))
}

#[cfg(test)]
mod tests {
    use super::{HEAD_DIMS, decode_shared_bytes, prefill_shared_bytes};
    use crate::KvDtype;

    /// What blocks of cards of compute capability 8.6, 8.9 and 12.0 have.
    #[test]
    fn heads_of_every_size_run_within_99_kilobytes() {
        for head_dim in HEAD_DIMS {
            for kv in [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8] {
                let most = decode_shared_bytes(head_dim, kv).max(prefill_shared_bytes(head_dim, kv, 64));
                assert!(most <= 99 << 10, "{head_dim} {kv:?}: {most}");
            }
        }
    }
}
