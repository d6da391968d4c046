//! NEON: four registers for each sixteen lanes.
//!
//! Only the baseline of 64-bit Arm: bytes are widened to 16 bits and multiplied there. (The byte dot products of
//! later processors are not in stable Rust.)

use super::simd::{LANES, Simd};
use super::tile::{Kernel, TileArgs, TileFn};
use half::f16;
use std::arch::aarch64::*;

pub(super) struct Neon;

/// Rows in a tile of one panel: 16 accumulators, for integers of both kinds, of 32 registers.
pub(super) const FLOAT_ROWS: usize = 4;
pub(super) const INT_ROWS: usize = 2;
pub(super) const PANELS: usize = 1;

impl Simd for Neon {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];
    type Pair = [float32x4_t; 2];
    const BF16_PAIRS: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        // SAFETY: NEON is part of the architecture; so for all functions here.
        unsafe { [vdupq_n_f32(0.0); 4] }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    unsafe fn mul(mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..4 {
            // SAFETY: see `zero`.
            a[i] = unsafe { vmulq_f32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    unsafe fn add(mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..4 {
            // SAFETY: see `zero`.
            a[i] = unsafe { vaddq_f32(a[i], b[i]) };
        }
        a
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, mut c: Self::F) -> Self::F {
        for i in 0..4 {
            // SAFETY: see `zero`.
            c[i] = unsafe { vfmaq_f32(c[i], a[i], b[i]) };
        }
        c
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        // SAFETY: see `zero`; the caller vouches for 16 elements.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12))] }
    }
    /// One by one: the conversion of vectors is not in stable Rust.
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::F {
        // SAFETY: the caller vouches for 16 elements.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        let values = bits.map(|bits| f16::from_bits(bits).to_f32_const());
        // SAFETY: 16 elements.
        unsafe { Self::load(values.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, lanes: usize) -> Self::F {
        let mut values = [0.0; LANES];
        // SAFETY: the caller vouches for `lanes` elements, and there are no more than 16.
        unsafe {
            from.copy_to_nonoverlapping(values.as_mut_ptr(), lanes);
            Self::load(values.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, value: Self::F, lanes: usize) {
        let mut values = [0.0f32; LANES];
        // SAFETY: see `zero`; the caller vouches for `lanes` elements, and there are no more than 16.
        unsafe {
            for (i, &four) in value.iter().enumerate() {
                vst1q_f32(values.as_mut_ptr().add(4 * i), four);
            }
            values.as_ptr().copy_to_nonoverlapping(to, lanes);
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::I {
        // SAFETY: see `zero`.
        unsafe { [vdupq_n_s32(value); 4] }
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        // SAFETY: see `zero`.
        unsafe {
            [
                vcvtq_f32_s32(value[0]),
                vcvtq_f32_s32(value[1]),
                vcvtq_f32_s32(value[2]),
                vcvtq_f32_s32(value[3]),
            ]
        }
    }
    /// The instruction is not in stable Rust.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: see `zero`; the caller vouches for 64 bytes.
        unsafe { [vld1q_u8(from), vld1q_u8(from.add(16)), vld1q_u8(from.add(32)), vld1q_u8(from.add(48))] }
    }
    #[inline(always)]
    unsafe fn low_nibbles(mut bytes: Self::B) -> Self::B {
        for sixteen in &mut bytes {
            // SAFETY: see `zero`.
            *sixteen = unsafe { vandq_u8(*sixteen, vdupq_n_u8(15)) };
        }
        bytes
    }
    #[inline(always)]
    unsafe fn high_nibbles(mut bytes: Self::B) -> Self::B {
        for sixteen in &mut bytes {
            // SAFETY: see `zero`.
            *sixteen = unsafe { vshrq_n_u8::<4>(*sixteen) };
        }
        bytes
    }
    #[inline(always)]
    unsafe fn dot_small(mut acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        for i in 0..4 {
            // SAFETY: see `zero`. Weights below 64 are the same signed, and their products fit 16 bits.
            unsafe {
                let (w, a) = (vreinterpretq_s8_u8(weights[i]), vreinterpretq_s8_s32(acts[i]));
                let low = vmull_s8(vget_low_s8(w), vget_low_s8(a));
                let high = vmull_s8(vget_high_s8(w), vget_high_s8(a));
                // Each output's four products, two by two, then together.
                acc[i] = vaddq_s32(acc[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
            }
        }
        acc
    }
    #[inline(always)]
    unsafe fn dot(mut acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        for i in 0..4 {
            // SAFETY: see `zero`.
            unsafe {
                let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(weights[i])));
                let high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(weights[i])));
                // All fours are the same: eight of the activations do for both halves.
                let a = vmovl_s8(vget_low_s8(vreinterpretq_s8_s32(acts[i])));
                let product = |w: int16x8_t| {
                    let first = vmull_s16(vget_low_s16(w), vget_low_s16(a));
                    let second = vmull_s16(vget_high_s16(w), vget_high_s16(a));
                    vpaddq_s32(first, second)
                };
                acc[i] = vaddq_s32(acc[i], vpaddq_s32(product(low), product(high)));
            }
        }
        acc
    }
    #[inline(always)]
    unsafe fn load_pair(from: *const u8) -> Self::Pair {
        let from = from.cast::<f32>();
        // SAFETY: see `zero`; the caller vouches for two f32.
        unsafe { [vdupq_n_f32(from.read_unaligned()), vdupq_n_f32(from.add(1).read_unaligned())] }
    }
    #[inline(always)]
    unsafe fn dot_pair(mut acc: Self::F, weights: Self::B, acts: Self::Pair) -> Self::F {
        for i in 0..4 {
            // SAFETY: see `zero`. A bf16 is the upper half of an f32.
            unsafe {
                let pairs = vreinterpretq_u32_u8(weights[i]);
                let first = vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs));
                let second = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)));
                acc[i] = vfmaq_f32(vfmaq_f32(acc[i], first, acts[0]), second, acts[1]);
            }
        }
        acc
    }
}

/// # Safety
/// `args` are as [`TileArgs`] says for `R` rows.
#[target_feature(enable = "neon")]
unsafe fn tile<K: Kernel, const R: usize>(args: &TileArgs) {
    // SAFETY: as the caller promises.
    unsafe { K::tile::<Neon, R, PANELS>(args) }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn float_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        2 => tile::<K, 2>,
        3 => tile::<K, 3>,
        FLOAT_ROWS => tile::<K, FLOAT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn int_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        INT_ROWS => tile::<K, INT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}
