//! AVX2 with FMA: two registers for each sixteen lanes.
//!
//! There is no dot product of bytes: `vpmaddubsw` adds two products in 16 bits with saturation, which is exact for
//! weights below 64; larger ones are split into even and odd bytes and multiplied in 16 bits.

use super::simd::{LANES, Simd};
use super::tile::{Kernel, TileArgs, TileFn};
use std::arch::x86_64::*;

pub(super) struct Avx2;

/// Rows in a tile of one panel: twelve accumulator registers of sixteen, for integers of both kinds.
pub(super) const FLOAT_ROWS: usize = 6;
pub(super) const INT_ROWS: usize = 3;
pub(super) const PANELS: usize = 1;

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    type Pair = [__m256; 2];
    const BF16_PAIRS: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self::F {
        // SAFETY: the caller has AVX2 and FMA; so for all functions here.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        // SAFETY: see `zero`; the caller vouches for 16 elements.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::F {
        // SAFETY: see `zero`; the caller vouches for 16 elements.
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(16).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
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
        // SAFETY: see `zero`; the caller vouches for `lanes` elements.
        unsafe {
            if lanes == LANES {
                _mm256_storeu_ps(to, value[0]);
                _mm256_storeu_ps(to.add(8), value[1]);
            } else {
                let mut values = [0.0; LANES];
                _mm256_storeu_ps(values.as_mut_ptr(), value[0]);
                _mm256_storeu_ps(values.as_mut_ptr().add(8), value[1]);
                values.as_ptr().copy_to_nonoverlapping(to, lanes);
            }
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::I {
        // SAFETY: see `zero`.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    unsafe fn to_float(value: Self::I) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [_mm256_cvtepi32_ps(value[0]), _mm256_cvtepi32_ps(value[1])] }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: prefetching reads nothing, so any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::B {
        // SAFETY: see `zero`; the caller vouches for 64 bytes.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: Self::B) -> Self::B {
        // SAFETY: see `zero`.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(bytes[0], mask), _mm256_and_si256(bytes[1], mask)]
        }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: Self::B) -> Self::B {
        // SAFETY: see `zero`.
        unsafe { Self::low_nibbles([_mm256_srli_epi16::<4>(bytes[0]), _mm256_srli_epi16::<4>(bytes[1])]) }
    }
    #[inline(always)]
    unsafe fn dot_small(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        // SAFETY: see `zero`.
        unsafe { [dot_small(acc[0], weights[0], acts[0]), dot_small(acc[1], weights[1], acts[1])] }
    }
    #[inline(always)]
    unsafe fn dot(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I {
        // SAFETY: see `zero`.
        unsafe { [dot(acc[0], weights[0], acts[0]), dot(acc[1], weights[1], acts[1])] }
    }
    #[inline(always)]
    unsafe fn load_pair(from: *const u8) -> Self::Pair {
        // SAFETY: see `zero`; the caller vouches for two f32.
        unsafe {
            let from = from.cast::<f32>();
            [_mm256_set1_ps(from.read_unaligned()), _mm256_set1_ps(from.add(1).read_unaligned())]
        }
    }
    #[inline(always)]
    unsafe fn dot_pair(acc: Self::F, weights: Self::B, acts: Self::Pair) -> Self::F {
        // SAFETY: see `zero`.
        unsafe { [dot_pair(acc[0], weights[0], acts), dot_pair(acc[1], weights[1], acts)] }
    }
}

/// # Safety
/// The caller has AVX2.
#[inline(always)]
unsafe fn dot_small(acc: __m256i, weights: __m256i, acts: __m256i) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let pairs = _mm256_maddubs_epi16(weights, acts);
        _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

/// # Safety
/// The caller has AVX2.
#[inline(always)]
unsafe fn dot(acc: __m256i, weights: __m256i, acts: __m256i) -> __m256i {
    // SAFETY: as the caller promises.
    unsafe {
        let even_weights = _mm256_and_si256(weights, _mm256_set1_epi16(255));
        let odd_weights = _mm256_srli_epi16::<8>(weights);
        let even_acts = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(acts));
        let odd_acts = _mm256_srai_epi16::<8>(acts);
        let even = _mm256_madd_epi16(even_weights, even_acts);
        let odd = _mm256_madd_epi16(odd_weights, odd_acts);
        _mm256_add_epi32(acc, _mm256_add_epi32(even, odd))
    }
}

/// # Safety
/// The caller has AVX2 and FMA.
#[inline(always)]
unsafe fn dot_pair(acc: __m256, weights: __m256i, acts: [__m256; 2]) -> __m256 {
    // SAFETY: as the caller promises.
    unsafe {
        let first = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(weights));
        let second =
            _mm256_castsi256_ps(_mm256_and_si256(weights, _mm256_set1_epi32(0xffff_0000_u32 as i32)));
        _mm256_fmadd_ps(second, acts[1], _mm256_fmadd_ps(first, acts[0], acc))
    }
}

/// # Safety
/// The machine has the instruction set, and `args` are as [`TileArgs`] says for `R` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<K: Kernel, const R: usize>(args: &TileArgs) {
    // SAFETY: as the caller promises.
    unsafe { K::tile::<Avx2, R, PANELS>(args) }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn float_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        2 => tile::<K, 2>,
        3 => tile::<K, 3>,
        4 => tile::<K, 4>,
        5 => tile::<K, 5>,
        FLOAT_ROWS => tile::<K, FLOAT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn int_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        2 => tile::<K, 2>,
        INT_ROWS => tile::<K, INT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}

/// Runs `copy` with the instruction set enabled, for the compiler to vectorize.
///
/// # Safety
/// The machine has the instruction set, and `copy` is as [`RowCopy::run`](super::activations::RowCopy::run) says.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn copy_row(copy: &super::activations::RowCopy<'_>) {
    // SAFETY: as the caller promises.
    unsafe { copy.run() };
}
