//! Kernels for floating-point weights: one multiply-add for each activation and panel.

#![allow(clippy::needless_range_loop)] // Plain counted loops unroll; the accumulators stay in registers.

use super::simd::Simd;
use super::tile::{Kernel, TileArgs, load_step, prefetch_out, store};

/// f32 weights, f32 activations.
pub(super) struct F32;
/// f16 weights widened as they are loaded, f32 activations.
pub(super) struct F16;
/// bf16 weights in pairs along `k`; activations in pairs of bf16 or f32, as the instruction set has it.
pub(super) struct Bf16;

impl Kernel for F32 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(args: &TileArgs) {
        // SAFETY: as the caller promises; a step of a panel is 16 f32.
        unsafe { widened::<S, R, P, 64>(args) }
    }
}

impl Kernel for F16 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(args: &TileArgs) {
        // SAFETY: as the caller promises; a step of a panel is 16 f16.
        unsafe { widened::<S, R, P, 32>(args) }
    }
}

/// `STEP`: bytes of a panel for each element of `k`; 64 are f32, 32 are f16.
///
/// # Safety
/// As for [`super::tile::TileFn`].
#[inline(always)]
unsafe fn widened<S: Simd, const R: usize, const P: usize, const STEP: usize>(args: &TileArgs) {
    // SAFETY: the panels hold `cols` steps, the activations `cols * R` f32.
    unsafe {
        prefetch_out::<S, R, P>(args);
        let mut acc = [[S::zero(); P]; R];
        let acts = args.acts.cast::<f32>();
        for k in 0..args.cols {
            let mut weights = [S::zero(); P];
            for p in 0..P {
                let from = args.panels[p].add(args.weights_at + k * STEP);
                S::prefetch(from.wrapping_add(args.ahead));
                weights[p] = if STEP == 32 { S::load_f16(from) } else { S::load(from.cast()) };
            }
            for r in 0..R {
                let act = S::splat(*acts.add(k * R + r));
                for p in 0..P {
                    acc[r][p] = S::fma(weights[p], act, acc[r][p]);
                }
            }
        }
        store::<S, R, P>(args, &acc);
    }
}

impl Kernel for Bf16 {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(args: &TileArgs) {
        let pair_bytes = if S::BF16_PAIRS { 4 } else { 8 };
        // SAFETY: the panels hold `cols / 2` steps, rounded up, of 64 bytes, the activations as many pairs of R rows.
        unsafe {
            prefetch_out::<S, R, P>(args);
            let mut acc = [[S::zero(); P]; R];
            for k in 0..args.cols.div_ceil(2) {
                let weights = load_step::<S, P>(args, k);
                for r in 0..R {
                    let act = S::load_pair(args.acts.add((k * R + r) * pair_bytes));
                    for p in 0..P {
                        acc[r][p] = S::dot_pair(acc[r][p], weights[p], act);
                    }
                }
            }
            store::<S, R, P>(args, &acc);
        }
    }
}
