//! AVX-512 with bf16 dot products.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::{EXP2, Kernel, Lanes, MAX_LANES};

/// Proof that the machine has AVX-512 F, BW, VL, DQ and BF16.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// An expression of intrinsics that a value of [`Avx512`] proves supported.
macro_rules! proven {
    ($e:expr) => {
        // SAFETY: a token exists only where the instruction set was found (see `run`).
        unsafe { $e }
    };
}

/// Runs `kernel` compiled for AVX-512.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("fma")
    });
    assert!(found, "this machine has no AVX-512 with bf16");
    // SAFETY: the features were found above.
    unsafe { run_with_features(kernel) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
fn run_with_features<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

#[inline(always)]
fn first(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

impl Lanes for Avx512 {
    const N: usize = 16;
    const SCORE_QUERIES: usize = 8;
    const VALUE_QUERIES: usize = 6;
    const VALUE_UNITS: usize = 2;
    const PAIR_WORDS: usize = 1;
    type V = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        proven!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        proven!(_mm512_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m512 {
        proven!(_mm512_maskz_loadu_ps(first(n), p))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        proven!(_mm512_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: __m512) {
        proven!(_mm512_mask_storeu_ps(p, first(n), v))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn exp2(self, v: __m512) -> __m512 {
        // The bound comes first in `max` and `min`, so that NaN passes.
        let v = self.min(self.splat(200.0), self.max(self.splat(-200.0), v));
        proven!({
            let whole = _mm512_roundscale_ps::<0>(v);
            let f = _mm512_sub_ps(v, whole);
            let mut p = _mm512_set1_ps(EXP2[0]);
            for c in &EXP2[1..] {
                p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
            }
            let r = _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0)), whole);
            // Subnormal results are slow to use and mean nothing here.
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(v, _mm512_set1_ps(-126.0));
            _mm512_maskz_mov_ps(normal, r)
        })
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        proven!(_mm512_reduce_add_ps(v))
    }
    #[inline(always)]
    fn greatest(self, v: __m512) -> f32 {
        proven!(_mm512_reduce_max_ps(v))
    }
    #[inline(always)]
    fn even(self, units: __m512) -> __m512 {
        proven!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(units))))
    }
    #[inline(always)]
    fn odd(self, units: __m512) -> __m512 {
        proven!({
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(units), upper))
        })
    }
    #[inline(always)]
    fn interleave(self, even: __m512, odd: __m512) -> (__m512, __m512) {
        proven!({
            let low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            (_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize, v: __m512) {
        proven!({
            let half: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(v));
            _mm256_mask_storeu_epi16(p.cast(), first(n), half)
        })
    }
    #[inline(always)]
    unsafe fn pack_pairs(self, src: *const f32, n: usize, scale: f32, dst: *mut f32) {
        let scale = self.splat(scale);
        for i in (0..n).step_by(16) {
            let count = (n - i).min(16);
            // SAFETY: the caller's `n` elements at `src`, and as many halves of words at `dst`.
            unsafe {
                let v = self.mul(self.load_first(src.add(i), count), scale);
                self.store_bf16(dst.cast::<u16>().add(i), count, v);
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, acc: __m512, units: __m512, query: *const f32) -> __m512 {
        proven!({
            let pair = _mm512_castsi512_ps(_mm512_set1_epi32(query.cast::<i32>().read()));
            let as_pairs = |v| std::mem::transmute::<__m512, __m512bh>(v);
            _mm512_dpbf16_ps(acc, as_pairs(units), as_pairs(pair))
        })
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32; MAX_LANES], n: usize, dst: *mut f32) {
        proven!({
            let mut a = [_mm512_setzero_si512(); 16];
            if n == 16 {
                for i in 0..16 {
                    a[i] = _mm512_castps_si512(_mm512_loadu_ps(rows[i]));
                }
            } else {
                for i in 0..16 {
                    a[i] = _mm512_castps_si512(_mm512_maskz_loadu_ps(first(n), rows[i]));
                }
            }
            let t = transpose_16x16(a);
            if n == 16 {
                for (i, v) in t.into_iter().enumerate() {
                    _mm512_storeu_ps(dst.add(i * 16), _mm512_castsi512_ps(v));
                }
            } else {
                for (i, v) in t.into_iter().enumerate().take(n) {
                    _mm512_storeu_ps(dst.add(i * 16), _mm512_castsi512_ps(v));
                }
            }
        })
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
}

/// Transposes a 16 x 16 matrix of words in registers: pairs of words, pairs of pairs, then 128-bit lanes twice.
///
/// # Safety
/// The machine has AVX-512F.
#[inline(always)]
unsafe fn transpose_16x16(a: [__m512i; 16]) -> [__m512i; 16] {
    proven!({
        let zero = _mm512_setzero_si512();
        let mut b = [zero; 16];
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        // c[4 i + j]: in each 128-bit lane k, word 4 k + j of rows 4 i .. 4 i + 4.
        let mut c = [zero; 16];
        for i in 0..4 {
            c[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
            c[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
            c[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
            c[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
        }
        let mut t = [zero; 16];
        for j in 0..4 {
            let d0 = _mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]);
            let d1 = _mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]);
            let d2 = _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j]);
            let d3 = _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j]);
            t[j] = _mm512_shuffle_i32x4::<0x88>(d0, d2);
            t[8 + j] = _mm512_shuffle_i32x4::<0xdd>(d0, d2);
            t[4 + j] = _mm512_shuffle_i32x4::<0x88>(d1, d3);
            t[12 + j] = _mm512_shuffle_i32x4::<0xdd>(d1, d3);
        }
        t
    })
}
