//! The interface between the driver and the kernels: one tile of rows by panels, over all of `k`.

use super::simd::Simd;
use crate::cpu::Isa;
use crate::cpu::gemm::float::{Bf16, F16, F32};
use crate::cpu::gemm::int::Int;
use crate::cpu::gemm::packed::Scheme;

/// One tile: some rows of activations by one or two panels.
pub(super) struct TileArgs {
    /// The panels. Where a tile of two has only one to compute, the second is the first again, with no lanes.
    pub(super) panels: [*const u8; 2],
    /// Offset of a panel's weights from its start, behind its scales.
    pub(super) weights_at: usize,
    /// How far ahead of its reads, in bytes, the kernel asks for a panel's weights; 0 when they are cached.
    pub(super) ahead: usize,
    /// Length of `k`, in elements.
    pub(super) cols: usize,
    /// The rows' activations, interleaved.
    pub(super) acts: *const u8,
    /// Integer kernels: scale of each group and row, interleaved.
    pub(super) scales: *const f32,
    /// Integer kernels: the sums of each group and row (see `activations::Kind`), interleaved.
    pub(super) sums: *const u32,
    /// First output of the first row, one element a panel's lane.
    pub(super) out: *mut f32,
    /// Elements between two rows of the output.
    pub(super) out_stride: usize,
    /// Lanes of each panel that are outputs; the others are padding.
    pub(super) lanes: [usize; 2],
    /// Added to the outputs, unless null; as long as the lanes.
    pub(super) bias: *const f32,
}

/// Computes a tile.
///
/// # Safety
/// The machine has the instruction set that the function was compiled for, and the arguments are what their
/// documentation says for the function's number of rows.
pub(super) type TileFn = unsafe fn(&TileArgs);

/// A kernel, written once for all instruction sets.
pub(super) trait Kernel {
    /// Computes a tile of `R` rows and `P` panels.
    ///
    /// # Safety
    /// As for [`TileFn`].
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(args: &TileArgs);
}

/// Elements of a page of memory.
const PAGE: usize = 1024;

/// Asks for the output's cache lines where rows lie pages apart, so that they are there when the tile is done. (Rows
/// that are close come by themselves.)
///
/// # Safety
/// As for [`TileFn`].
#[inline(always)]
pub(super) unsafe fn prefetch_out<S: Simd, const R: usize, const P: usize>(args: &TileArgs) {
    if args.out_stride < PAGE {
        return;
    }
    for r in 0..R {
        for p in 0..P {
            // SAFETY: as the caller promises.
            unsafe { S::prefetch(args.out.wrapping_add(r * args.out_stride + p * 16).cast()) };
        }
    }
}

/// Reads the 64 bytes of step `step` of each panel, and asks for those further ahead.
///
/// # Safety
/// As for [`TileFn`]; the panels have such a step.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // As below.
pub(super) unsafe fn load_step<S: Simd, const P: usize>(args: &TileArgs, step: usize) -> [S::B; P] {
    // SAFETY: as the caller promises.
    unsafe {
        let at = args.weights_at + step * 64;
        let mut bytes = [S::load_bytes(args.panels[0].add(at)); P];
        for p in 0..P {
            S::prefetch(args.panels[p].wrapping_add(at + args.ahead));
            bytes[p] = S::load_bytes(args.panels[p].add(at));
        }
        bytes
    }
}

/// Adds the bias to the finished accumulators and stores them.
///
/// # Safety
/// As for [`TileFn`].
#[inline(always)]
#[allow(clippy::needless_range_loop)] // Plain counted loops unroll; the accumulators stay in registers.
pub(super) unsafe fn store<S: Simd, const R: usize, const P: usize>(args: &TileArgs, acc: &[[S::F; P]; R]) {
    for p in 0..P {
        let lanes = args.lanes[p];
        if lanes == 0 {
            continue;
        }
        // SAFETY: the caller vouches for the pointers; `out` has `lanes` elements here in each row.
        unsafe {
            let bias =
                if args.bias.is_null() { S::zero() } else { S::load_some(args.bias.add(p * 16), lanes) };
            for r in 0..R {
                S::store_some(args.out.add(r * args.out_stride + p * 16), S::add(acc[r][p], bias), lanes);
            }
        }
    }
}

/// What the driver needs to know of a format's kernel on an instruction set.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Most rows in a tile.
    pub(super) rows: usize,
    /// Panels in a tile.
    pub(super) panels: usize,
    /// Whether bf16 weights take bf16 activations.
    pub(super) bf16_pairs: bool,
}

/// The tile shape of `scheme` on `isa`.
pub(super) fn shape(isa: Isa, scheme: Scheme) -> Shape {
    macro_rules! of {
        ($isa:ident, $simd:ident) => {
            Shape {
                rows: if scheme.is_int() { super::$isa::INT_ROWS } else { super::$isa::FLOAT_ROWS },
                panels: super::$isa::PANELS,
                bf16_pairs: super::$isa::$simd::BF16_PAIRS,
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => of!(avx512, Avx512),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => of!(avx2, Avx2),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => of!(neon, Neon),
        _ => of!(portable, Portable),
    }
}

/// The function that computes a tile of `rows` rows of `scheme` on `isa`.
pub(super) fn tile_fn(isa: Isa, scheme: Scheme, rows: usize) -> TileFn {
    macro_rules! of {
        ($isa:ident) => {
            match scheme {
                Scheme::F32 => super::$isa::float_tile::<F32>(rows),
                Scheme::F16 => super::$isa::float_tile::<F16>(rows),
                Scheme::Bf16 => super::$isa::float_tile::<Bf16>(rows),
                Scheme::Int8 => super::$isa::int_tile::<Int<8, 32, false>>(rows),
                Scheme::Int4 => super::$isa::int_tile::<Int<4, 32, false>>(rows),
                Scheme::Int4Min => super::$isa::int_tile::<Int<4, 32, true>>(rows),
                Scheme::Int6 => super::$isa::int_tile::<Int<6, 16, false>>(rows),
            }
        };
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => of!(avx512),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => of!(avx2),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => of!(neon),
        _ => of!(portable),
    }
}
