//! Vectors of `f32` lanes: one source for every instruction set.
//!
//! A kernel is written once as a [`Kernel`] over [`Lanes`], and [`dispatch`] runs the instance of the instruction set
//! asked for. A lane type is a token: a value of it exists only where its instructions do, so its methods are safe to
//! call. Everything on the way from [`dispatch`] to an instruction is `#[inline(always)]`, so that it is compiled
//! with the instruction set's features.
//!
//! A vector also carries *units*, 32-bit words of KV memory: one f32 element or a pair of bf16 ones.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::Isa;

/// The most lanes of any instruction set.
pub(crate) const MAX_LANES: usize = 16;

/// Operations on vectors of `N` lanes. Every one is exact or correctly rounded but [`Lanes::exp2`].
pub(crate) trait Lanes: Copy {
    /// Lanes in a vector.
    const N: usize;
    /// Queries scored at once, and queries and unit vectors accumulated at once: as many as the registers hold.
    const SCORE_QUERIES: usize;
    /// See [`Lanes::SCORE_QUERIES`].
    const VALUE_QUERIES: usize;
    /// See [`Lanes::SCORE_QUERIES`].
    const VALUE_UNITS: usize;
    /// `f32` words that the query's part of a pair of bf16 elements takes, as [`Lanes::pack_pairs`] writes it.
    const PAIR_WORDS: usize;
    /// A vector.
    type V: Copy;

    fn splat(self, x: f32) -> Self::V;
    /// Loads `N` lanes.
    ///
    /// # Safety
    /// `p` points at `N` readable elements.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Loads `n <= N` lanes, the others zero.
    ///
    /// # Safety
    /// `p` points at `n` readable elements.
    unsafe fn load_first(self, p: *const f32, n: usize) -> Self::V;
    /// Stores `N` lanes.
    ///
    /// # Safety
    /// `p` points at `N` writable elements.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Stores the first `n <= N` lanes.
    ///
    /// # Safety
    /// `p` points at `n` writable elements.
    unsafe fn store_first(self, p: *mut f32, n: usize, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the machine can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a` where `a > b`, else `b`: a NaN in `a` gives `b`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a` where `a < b`, else `b`.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `2^v`, relative error below 2.5e-7; zero below 2^-126, NaN for NaN.
    fn exp2(self, v: Self::V) -> Self::V;
    /// Sum of the lanes, always in the same order.
    fn sum(self, v: Self::V) -> f32;
    /// Greatest lane.
    fn greatest(self, v: Self::V) -> f32;

    /// The lower (even) bf16 element of each unit.
    fn even(self, units: Self::V) -> Self::V;
    /// The upper (odd) bf16 element of each unit.
    fn odd(self, units: Self::V) -> Self::V;
    /// Puts even and odd elements back in order: the first and the second `N` elements.
    fn interleave(self, even: Self::V, odd: Self::V) -> (Self::V, Self::V);
    /// Stores the first `n <= N` lanes as bf16, rounded to nearest even.
    ///
    /// # Safety
    /// `p` points at `n` writable elements.
    unsafe fn store_bf16(self, p: *mut u16, n: usize, v: Self::V);
    /// Writes `n` elements of a query (even; a multiple of 2), times `scale`, for [`Lanes::dot_pairs`].
    ///
    /// # Safety
    /// `src` points at `n` readable elements, `dst` at `n / 2 * PAIR_WORDS` writable ones.
    unsafe fn pack_pairs(self, src: *const f32, n: usize, scale: f32, dst: *mut f32);
    /// Adds to each lane of `acc` the product of its pair in `units` with the pair at `query`.
    ///
    /// # Safety
    /// `query` points at `PAIR_WORDS` readable words that [`Lanes::pack_pairs`] wrote.
    unsafe fn dot_pairs(self, acc: Self::V, units: Self::V, query: *const f32) -> Self::V;
    /// Transposes `n <= N` words of each of `N` rows: `dst[word * N + row]`.
    ///
    /// # Safety
    /// Each of the `N` first pointers of `rows` points at `n` readable words, `dst` at `n * N` writable ones.
    unsafe fn transpose(self, rows: &[*const f32; MAX_LANES], n: usize, dst: *mut f32);
    /// Asks for the cache line at `p` to be brought to the second-level cache. Not to the first: each line on its
    /// way there holds one of the few buffers for misses until memory answers, and half the bandwidth is lost.
    fn prefetch(self, p: *const f32);
}

/// A computation written once for all instruction sets. `run` must be `#[inline(always)]`.
pub(crate) trait Kernel {
    /// What it gives.
    type Output;
    /// The computation.
    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// Runs `kernel` with the instructions of `isa`. NEON runs the portable source, which the compiler vectorizes with
/// it: it is part of the base of aarch64.
///
/// # Panics
/// When this machine lacks `isa`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::run(kernel),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::run(kernel),
        _ => kernel.run(portable::Portable),
    }
}

/// Coefficients of `2^f - 1 = f * p(f)` on [-0.5, 0.5], highest power first (Cephes' `exp2f`).
const EXP2: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

#[cfg(test)]
mod tests;
