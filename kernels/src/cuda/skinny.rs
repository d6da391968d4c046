//! Products of few rows by kernels of our own (kernels/cuda/skinny.cu), which stream the weights faster than cuBLASLt
//! and do what follows the product at once. From Hopper on.

use super::device::{Arg, Device, Grid, Kernel};
use super::gemm::{Operands, Shape};
use crate::{HeadShape, KernelError};

/// Threads of a block that multiply.
const MULTIPLIERS: u32 = 256;
/// Shared memory before the sums.
const HEADER: usize = 512;
/// Stages that the kernels have barriers for.
const MOST_STAGES: usize = 16;
/// Shared memory a block takes at most: what is left of a multiprocessor's 228 KB lets the small kernels between two
/// products start beside it.
const MOST_SHARED: usize = 216 << 10;
/// Outputs that are worth a block of their own.
const LEAST_OUTPUTS: usize = 4;

/// Constants of the kernels for up to `most_rows` rows.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Weight rows of a pass.
    tile: usize,
    most_rows: usize,
    /// Elements of k in a stage.
    depth: usize,
    /// Blocks that share k.
    split: usize,
    /// Warps that copy.
    copiers: u32,
}

/// As at the end of skinny.cu.
const TILINGS: [Tiling; 3] = [
    Tiling { tile: 32, most_rows: 8, depth: 512, split: 1, copiers: 4 },
    Tiling { tile: 32, most_rows: 16, depth: 512, split: 1, copiers: 4 },
    Tiling { tile: 64, most_rows: 32, depth: 256, split: 2, copiers: 8 },
];

/// The kernels of one tiling.
#[derive(Debug)]
struct Variant {
    tiling: Tiling,
    element: Kernel,
    f32: Kernel,
    gated: Kernel,
    rotated: Kernel,
}

/// The kernels of all numbers of rows.
#[derive(Debug)]
pub(super) struct Skinny {
    variants: Vec<Variant>,
    multiprocessors: usize,
    shared: usize,
}

/// What [`Skinny::rotated`] needs besides the product's own operands: device addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rotation {
    pub(super) heads: HeadShape,
    pub(super) table: u64,
    pub(super) positions: u64,
    pub(super) slots: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
}

impl Skinny {
    /// The kernels, where the card can run them.
    pub(super) fn new(device: &Device) -> Result<Option<Self>, KernelError> {
        let info = device.info();
        let shared = MOST_SHARED.min(info.shared_bytes_per_block as usize);
        if info.capability < (9, 0) {
            return Ok(None);
        }
        let mut variants = Vec::new();
        // Two stages at least, so that copies and products overlap.
        for tiling in TILINGS.into_iter().filter(|t| t.stages(t.most_rows, shared) >= 2) {
            let kernel = |kind: &str| {
                let kernel = device.overlapping_kernel(&format!("skinny_{kind}_{}", tiling.most_rows))?;
                kernel.allow_shared(shared as u32)?;
                Ok::<_, KernelError>(kernel)
            };
            variants.push(Variant {
                tiling,
                element: kernel("element")?,
                f32: kernel("f32")?,
                gated: kernel("gated")?,
                rotated: kernel("rotated")?,
            });
        }
        Ok(Some(Self { variants, multiprocessors: info.multiprocessors as usize, shared }))
    }

    /// Whether there is a kernel for products of this shape.
    pub(super) fn serves(&self, shape: Shape) -> bool {
        shape.rows > 0 && shape.k.is_multiple_of(8) && self.variant(shape.rows).is_some()
    }

    fn variant(&self, rows: usize) -> Option<&Variant> {
        self.variants.iter().find(|variant| rows <= variant.tiling.most_rows)
    }

    /// Queues `out = x * weight^T + bias`.
    pub(super) fn product(&self, device: &Device, shape: Shape, operands: Operands) {
        let Operands { x, weight, bias, out } = operands;
        let variant = self.variant(shape.rows).expect("a served number of rows");
        let kernel = if shape.f32_out { &variant.f32 } else { &variant.element };
        let args = [
            Arg::Ptr(x),
            Arg::Ptr(weight),
            Arg::Ptr(bias),
            Arg::Ptr(out),
            Arg::U32(shape.rows as u32),
            Arg::U32(shape.n as u32),
            Arg::U32(shape.k as u32),
            Arg::U32(variant.tiling.stages(shape.rows, self.shared) as u32),
        ];
        device.launch(kernel, self.grid(variant.tiling, shape.rows, shape.n), &args);
    }

    /// Queues `out = silu(gate) * up` of the product `[gate, up] = x * weight^T`, whose shape is given.
    pub(super) fn gated(&self, device: &Device, shape: Shape, operands: Operands) {
        let Operands { x, weight, out, .. } = operands;
        let variant = self.variant(shape.rows).expect("a served number of rows");
        let args = [
            Arg::Ptr(x),
            Arg::Ptr(weight),
            Arg::Ptr(out),
            Arg::U32(shape.rows as u32),
            Arg::U32((shape.n / 2) as u32),
            Arg::U32(shape.k as u32),
            Arg::U32(variant.tiling.stages(shape.rows, self.shared) as u32),
        ];
        device.launch(&variant.gated, self.grid(variant.tiling, shape.rows, shape.n / 2), &args);
    }

    /// Queues the product of Q, K and V and their rotation and storing.
    pub(super) fn rotated(&self, device: &Device, shape: Shape, operands: Operands, rotation: Rotation) {
        let Operands { x, weight, bias, out } = operands;
        let variant = self.variant(shape.rows).expect("a served number of rows");
        let args = [
            Arg::Ptr(x),
            Arg::Ptr(weight),
            Arg::Ptr(bias),
            Arg::Ptr(out),
            Arg::U32(shape.rows as u32),
            Arg::U32(shape.k as u32),
            Arg::U32(variant.tiling.stages(shape.rows, self.shared) as u32),
            Arg::Ptr(rotation.table),
            Arg::Ptr(rotation.positions),
            Arg::Ptr(rotation.slots),
            Arg::Ptr(rotation.keys),
            Arg::Ptr(rotation.values),
            Arg::U32(rotation.heads.heads as u32),
            Arg::U32(rotation.heads.kv_heads as u32),
            Arg::U32(rotation.heads.head_dim as u32),
        ];
        device.launch(&variant.rotated, self.grid(variant.tiling, shape.rows, shape.n / 2), &args);
    }

    fn grid(&self, tiling: Tiling, rows: usize, outputs: usize) -> Grid {
        let groups = (self.multiprocessors / tiling.split).min(outputs.div_ceil(LEAST_OUTPUTS)).max(1);
        Grid {
            blocks: [(groups * tiling.split) as u32, 1, 1],
            threads: MULTIPLIERS + 32 * tiling.copiers,
            shared_bytes: tiling.shared_bytes(rows, tiling.stages(rows, self.shared)) as u32,
        }
    }
}

impl Tiling {
    /// Shared memory of a block, as skinny.cu says.
    fn shared_bytes(self, rows: usize, stages: usize) -> usize {
        let sums = 128 / self.tile * self.most_rows * (self.tile + 4);
        let inboxes = (self.split - 1) * self.tile * self.most_rows;
        HEADER + 4 * (sums + inboxes) + stages * (self.tile + rows) * (2 * self.depth + 64)
    }

    /// Stages that fit.
    fn stages(self, rows: usize, shared: usize) -> usize {
        let stage = self.shared_bytes(rows, 1) - self.shared_bytes(rows, 0);
        (shared.saturating_sub(self.shared_bytes(rows, 0)) / stage).min(MOST_STAGES)
    }
}

#[cfg(test)]
mod tests {
    use super::{MOST_SHARED, MOST_STAGES, TILINGS};

    #[test]
    fn stages_fill_shared_memory() {
        assert_eq!(TILINGS[0].shared_bytes(1, 6), 512 + 4608 + 6 * 33 * 1088);
        for tiling in TILINGS {
            for rows in 1..=tiling.most_rows {
                let stages = tiling.stages(rows, MOST_SHARED);
                assert!((2..=MOST_STAGES).contains(&stages), "{tiling:?}, {rows} rows: {stages}");
                assert!(tiling.shared_bytes(rows, stages) <= MOST_SHARED, "{tiling:?}, {rows} rows");
                // Stages begin at whole lines of 128 bytes.
                assert_eq!(tiling.shared_bytes(rows, 0) % 128, 0, "{tiling:?}");
            }
        }
    }
}
