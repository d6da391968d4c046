//! Plain Rust, for any processor; the compiler vectorizes what it can.

use super::simd::{LANES, Simd};
use super::tile::{Kernel, TileArgs, TileFn};
use half::{bf16, f16};

pub(super) struct Portable;

pub(super) const FLOAT_ROWS: usize = 2;
pub(super) const INT_ROWS: usize = 2;
pub(super) const PANELS: usize = 1;

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [[u8; 4]; LANES];
    type Pair = [f32; 2];
    const BF16_PAIRS: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    /// In two roundings: without the instruction, one rounding is a call into the C library.
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        // SAFETY: the caller vouches for 16 elements.
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::F {
        // SAFETY: the caller vouches for 16 elements.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f16::from_bits(bits).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, lanes: usize) -> Self::F {
        let mut values = [0.0; LANES];
        // SAFETY: the caller vouches for `lanes` elements, and there are no more than 16.
        unsafe { from.copy_to_nonoverlapping(values.as_mut_ptr(), lanes) };
        values
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, value: Self::F, lanes: usize) {
        // SAFETY: the caller vouches for `lanes` elements, and there are no more than 16.
        unsafe { value.as_ptr().copy_to_nonoverlapping(to, lanes) };
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        value.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { from.cast::<Self::B>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: Self::B) -> Self::B {
        bytes.map(|four| four.map(|b| b & 15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: Self::B) -> Self::B {
        bytes.map(|four| four.map(|b| b >> 4))
    }
    #[inline(always)]
    unsafe fn dot_small(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        // SAFETY: as the caller promises.
        unsafe { Self::dot(acc, weights, acts) }
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        // All lanes of `acts` are the same four bytes.
        let acts = acts[0].to_ne_bytes().map(|a| i32::from(a as i8));
        std::array::from_fn(|i| {
            let w = weights[i].map(i32::from);
            acc[i] + w[0] * acts[0] + w[1] * acts[1] + w[2] * acts[2] + w[3] * acts[3]
        })
    }
    #[inline(always)]
    unsafe fn load_pair(from: *const u8) -> Self::Pair {
        // SAFETY: the caller vouches for two f32.
        unsafe { from.cast::<[f32; 2]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot_pair(acc: Self::F, weights: Self::B, acts: Self::Pair) -> Self::F {
        std::array::from_fn(|i| {
            let [a, b, c, d] = weights[i];
            let (first, second) = (bf16::from_le_bytes([a, b]), bf16::from_le_bytes([c, d]));
            acc[i] + first.to_f32() * acts[0] + second.to_f32() * acts[1]
        })
    }
}

/// # Safety
/// `args` are as [`TileArgs`] says for `R` rows.
unsafe fn tile<K: Kernel, const R: usize>(args: &TileArgs) {
    // SAFETY: as the caller promises.
    unsafe { K::tile::<Portable, R, PANELS>(args) }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn float_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
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
