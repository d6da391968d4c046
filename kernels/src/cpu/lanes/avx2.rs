//! AVX2 with FMA.

use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::{EXP2, Kernel, Lanes, MAX_LANES};

/// Proof that the machine has AVX2 and FMA.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// An expression of intrinsics that a value of [`Avx2`] proves supported.
macro_rules! proven {
    ($e:expr) => {
        // SAFETY: a token exists only where the instruction set was found (see `run`).
        unsafe { $e }
    };
}

/// Runs `kernel` compiled for AVX2.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    static FOUND: OnceLock<bool> = OnceLock::new();
    let found = *FOUND.get_or_init(|| is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
    assert!(found, "this machine has no AVX2 with FMA");
    // SAFETY: the features were found above.
    unsafe { run_with_features(kernel) }
}

#[target_feature(enable = "avx2,fma")]
fn run_with_features<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// Masks whose first `n` lanes are set start at `MASKS[8 - n]`.
static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
fn first(n: usize) -> __m256i {
    assert!(n <= 8, "a vector has 8 lanes");
    // SAFETY: eight words from `8 - n`, which is at most 8, lie inside the table; the loads are AVX's.
    unsafe { _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast()) }
}

impl Lanes for Avx2 {
    const N: usize = 8;
    const SCORE_QUERIES: usize = 4;
    const VALUE_QUERIES: usize = 4;
    const VALUE_UNITS: usize = 1;
    const PAIR_WORDS: usize = 2;
    type V = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        proven!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        proven!(_mm256_loadu_ps(p))
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> __m256 {
        proven!(_mm256_maskload_ps(p, first(n)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        proven!(_mm256_storeu_ps(p, v))
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: __m256) {
        proven!(_mm256_maskstore_ps(p, first(n), v))
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        proven!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_min_ps(a, b))
    }
    #[inline(always)]
    fn exp2(self, v: __m256) -> __m256 {
        // The bound comes first in `max` and `min`, so that NaN passes. At -127 the power's bits are those of zero,
        // at 128 those of infinity.
        let v = self.min(self.splat(128.0), self.max(self.splat(-127.0), v));
        proven!({
            let whole = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            let f = _mm256_sub_ps(v, whole);
            let mut p = _mm256_set1_ps(EXP2[0]);
            for c in &EXP2[1..] {
                p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
            }
            let mantissa = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0));
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
            let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased));
            let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(v, _mm256_set1_ps(-126.0));
            _mm256_and_ps(_mm256_mul_ps(mantissa, power), normal)
        })
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        proven!({
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn greatest(self, v: __m256) -> f32 {
        proven!({
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        })
    }
    #[inline(always)]
    fn even(self, units: __m256) -> __m256 {
        proven!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(units))))
    }
    #[inline(always)]
    fn odd(self, units: __m256) -> __m256 {
        proven!({
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(units), upper))
        })
    }
    #[inline(always)]
    fn interleave(self, even: __m256, odd: __m256) -> (__m256, __m256) {
        proven!({
            let low = _mm256_unpacklo_ps(even, odd);
            let high = _mm256_unpackhi_ps(even, odd);
            (_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
        })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize, v: __m256) {
        let mut lanes = [0.0f32; 8];
        // SAFETY: eight lanes fit the array.
        unsafe { self.store(lanes.as_mut_ptr(), v) };
        for (i, x) in lanes.into_iter().enumerate().take(n) {
            // SAFETY: the caller's `n` elements.
            unsafe { p.add(i).write(half::bf16::from_f32(x).to_bits()) };
        }
    }
    #[inline(always)]
    unsafe fn pack_pairs(self, src: *const f32, n: usize, scale: f32, dst: *mut f32) {
        for i in 0..n {
            // SAFETY: the caller's `n` elements on both sides.
            unsafe { dst.add(i).write(src.add(i).read() * scale) };
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, acc: __m256, units: __m256, query: *const f32) -> __m256 {
        proven!({
            let acc = _mm256_fmadd_ps(self.even(units), _mm256_broadcast_ss(&*query), acc);
            _mm256_fmadd_ps(self.odd(units), _mm256_broadcast_ss(&*query.add(1)), acc)
        })
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32; MAX_LANES], n: usize, dst: *mut f32) {
        proven!({
            let mut a = [_mm256_setzero_ps(); 8];
            for i in 0..8 {
                a[i] = if n == 8 { _mm256_loadu_ps(rows[i]) } else { self.load_first(rows[i], n) };
            }
            let mut b = a;
            for i in 0..4 {
                b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            // c[4 i + j]: in 128-bit lane k, word 4 k + j of rows 4 i .. 4 i + 4.
            let mut c = b;
            for i in 0..2 {
                c[4 * i] = _mm256_shuffle_ps::<0x44>(b[4 * i], b[4 * i + 2]);
                c[4 * i + 1] = _mm256_shuffle_ps::<0xee>(b[4 * i], b[4 * i + 2]);
                c[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b[4 * i + 1], b[4 * i + 3]);
                c[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b[4 * i + 1], b[4 * i + 3]);
            }
            let mut t = c;
            for j in 0..4 {
                t[j] = _mm256_permute2f128_ps::<0x20>(c[j], c[4 + j]);
                t[4 + j] = _mm256_permute2f128_ps::<0x31>(c[j], c[4 + j]);
            }
            for (i, v) in t.into_iter().enumerate().take(n) {
                _mm256_storeu_ps(dst.add(i * 8), v);
            }
        })
    }
    #[inline(always)]
    fn prefetch(self, p: *const f32) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(p.cast()))
    }
}
