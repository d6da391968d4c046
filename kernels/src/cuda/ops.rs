//! The kernels of kernels/cuda/ops.cu and dummy.cu, and how they are launched.

use super::device::{Device, Grid, Kernel};
use crate::{HeadShape, KernelError, KvDtype};

#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed: Kernel,
    pub(super) rms_norm: Kernel,
    pub(super) add_rms_norm: Kernel,
    pub(super) gather_rows: Kernel,
    pub(super) rotate_and_store: Kernel,
    pub(super) silu_mul: Kernel,
    pub(super) zero_rows: Kernel,
    pub(super) fill_normal: Kernel,
}

impl Kernels {
    pub(super) fn new(device: &Device, kv: KvDtype) -> Result<Self, KernelError> {
        Ok(Self {
            embed: device.overlapping_kernel("embed")?,
            rms_norm: device.overlapping_kernel("rms_norm")?,
            add_rms_norm: device.overlapping_kernel("add_rms_norm")?,
            gather_rows: device.overlapping_kernel("gather_rows")?,
            rotate_and_store: device.overlapping_kernel(&format!("rotate_and_store_{}", kv.name()))?,
            silu_mul: device.overlapping_kernel("silu_mul")?,
            zero_rows: device.overlapping_kernel("zero_rows")?,
            fill_normal: device.kernel("fill_normal")?,
        })
    }
}

/// Threads for a row of `cols` elements, eight at a time: as kernels/cuda/ops.cu says, like the grids below.
pub(super) fn row_threads(cols: usize) -> u32 {
    (cols.div_ceil(8).next_multiple_of(32) as u32).clamp(32, 1024)
}

pub(super) fn silu_grid(rows: usize, cols: usize) -> Grid {
    Grid::of(cols.div_ceil(2048) as u32, rows as u32, 256)
}

pub(super) fn rotate_grid(rows: usize, heads: HeadShape) -> Grid {
    let half = heads.head_dim / 2;
    let lanes = if half.is_multiple_of(8) { (half / 8).next_power_of_two() } else { 32 };
    let units = heads.heads + 2 * heads.kv_heads;
    Grid::of((units * lanes).div_ceil(128) as u32, rows as u32, 128)
}
