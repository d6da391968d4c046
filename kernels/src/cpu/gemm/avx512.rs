//! AVX-512: one register for each sixteen lanes. `vpdpbusd` for integers, `vdpbf16ps` for bf16.

use super::simd::{LANES, Simd};
use super::tile::{Kernel, TileArgs, TileFn};
use std::arch::x86_64::*;

pub(super) struct Avx512;

/// Rows in a tile of two panels: 24 accumulators, and for integers 12 of each kind, of 32 registers.
pub(super) const FLOAT_ROWS: usize = 12;
pub(super) const INT_ROWS: usize = 6;
pub(super) const PANELS: usize = 2;

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type Pair = __m512i;
    const BF16_PAIRS: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller has AVX-512; so for all functions here.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: see `zero`; the caller vouches for 16 elements.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m512 {
        // SAFETY: see `zero`; the caller vouches for 16 elements.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_some(from: *const f32, lanes: usize) -> __m512 {
        // SAFETY: see `zero`; masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(first(lanes), from) }
    }
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, value: __m512, lanes: usize) {
        if lanes == LANES {
            // SAFETY: see `zero`; the caller vouches for 16 elements.
            unsafe { _mm512_storeu_ps(to, value) }
        } else {
            // SAFETY: see `zero`; masked lanes are not written.
            unsafe { _mm512_mask_storeu_ps(to, first(lanes), value) }
        }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> __m512i {
        // SAFETY: see `zero`.
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn to_float(value: __m512i) -> __m512 {
        // SAFETY: see `zero`.
        unsafe { _mm512_cvtepi32_ps(value) }
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        // SAFETY: prefetching reads nothing, so any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        // SAFETY: see `zero`; the caller vouches for 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(bytes: __m512i) -> __m512i {
        // SAFETY: see `zero`.
        unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(bytes: __m512i) -> __m512i {
        // SAFETY: see `zero`.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn dot_small(acc: __m512i, weights: __m512i, acts: __m512i) -> __m512i {
        // SAFETY: see `zero`.
        unsafe { _mm512_dpbusd_epi32(acc, weights, acts) }
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512i, weights: __m512i, acts: __m512i) -> __m512i {
        // SAFETY: see `zero`.
        unsafe { _mm512_dpbusd_epi32(acc, weights, acts) }
    }
    #[inline(always)]
    unsafe fn load_pair(from: *const u8) -> __m512i {
        // SAFETY: see `zero`; the caller vouches for 4 bytes.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn dot_pair(acc: __m512, weights: __m512i, acts: __m512i) -> __m512 {
        // SAFETY: see `zero`; both types are 64 bytes of bf16 pairs.
        unsafe {
            let (weights, acts) = (
                std::mem::transmute::<__m512i, __m512bh>(weights),
                std::mem::transmute::<__m512i, __m512bh>(acts),
            );
            _mm512_dpbf16_ps(acc, weights, acts)
        }
    }
}

fn first(lanes: usize) -> __mmask16 {
    ((1u32 << lanes) - 1) as __mmask16
}

/// # Safety
/// The machine has the instruction set, and `args` are as [`TileArgs`] says for `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
unsafe fn tile<K: Kernel, const R: usize>(args: &TileArgs) {
    // SAFETY: as the caller promises.
    unsafe { K::tile::<Avx512, R, PANELS>(args) }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn float_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        2 => tile::<K, 2>,
        3 => tile::<K, 3>,
        4 => tile::<K, 4>,
        5 => tile::<K, 5>,
        6 => tile::<K, 6>,
        7 => tile::<K, 7>,
        8 => tile::<K, 8>,
        9 => tile::<K, 9>,
        10 => tile::<K, 10>,
        11 => tile::<K, 11>,
        FLOAT_ROWS => tile::<K, FLOAT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}

/// The function that computes a tile of `rows` rows.
pub(super) fn int_tile<K: Kernel>(rows: usize) -> TileFn {
    match rows {
        1 => tile::<K, 1>,
        2 => tile::<K, 2>,
        3 => tile::<K, 3>,
        4 => tile::<K, 4>,
        5 => tile::<K, 5>,
        INT_ROWS => tile::<K, INT_ROWS>,
        _ => unreachable!("no tile of {rows} rows"),
    }
}

/// Runs `copy` with the instruction set enabled, for the compiler to vectorize.
///
/// # Safety
/// The machine has the instruction set, and `copy` is as [`RowCopy::run`](super::activations::RowCopy::run) says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(super) unsafe fn copy_row(copy: &super::activations::RowCopy<'_>) {
    // SAFETY: as the caller promises.
    unsafe { copy.run() };
}
