//! The two element types of a KV cache, seen as 32-bit units.

use half::bf16;

use crate::cpu::Plain;
use crate::cpu::lanes::Lanes;

/// An element of the KV cache. Kernels read it in *units* of 32 bits: one f32, or two bf16.
pub(crate) trait KvElement: Plain {
    /// Elements in a unit.
    const PER_UNIT: usize;

    /// `f32` words of a packed query for each unit.
    fn query_words<L: Lanes>() -> usize;
    /// Writes a query of `n` elements, times `scale`, as [`KvElement::dot`] reads it.
    ///
    /// # Safety
    /// `src` points at `n` readable elements, `dst` at `n / PER_UNIT * query_words` writable words.
    unsafe fn pack_query<L: Lanes>(l: L, src: *const f32, n: usize, scale: f32, dst: *mut f32);
    /// Adds to each lane the product of its unit with the query's unit.
    ///
    /// # Safety
    /// `query` points at `query_words` words that [`KvElement::pack_query`] wrote.
    unsafe fn dot<L: Lanes>(l: L, acc: L::V, units: L::V, query: *const f32) -> L::V;
    /// The elements of the units, as f32: `PER_UNIT` vectors, of which bf16's are the even and the odd elements.
    fn expand<L: Lanes>(l: L, units: L::V) -> [L::V; 2];
    /// Stores the first `n <= N * PER_UNIT` elements of expanded vectors, in order.
    ///
    /// # Safety
    /// `dst` points at `n` writable elements.
    unsafe fn collapse<L: Lanes>(l: L, v: [L::V; 2], dst: *mut f32, n: usize);
    /// Stores `n <= N` elements, rounded to nearest even.
    ///
    /// # Safety
    /// `dst` points at `n` writable elements.
    unsafe fn store<L: Lanes>(l: L, dst: *mut Self, n: usize, v: L::V);
}

impl KvElement for bf16 {
    const PER_UNIT: usize = 2;

    #[inline(always)]
    fn query_words<L: Lanes>() -> usize {
        L::PAIR_WORDS
    }
    #[inline(always)]
    unsafe fn pack_query<L: Lanes>(l: L, src: *const f32, n: usize, scale: f32, dst: *mut f32) {
        // SAFETY: the caller's.
        unsafe { l.pack_pairs(src, n, scale, dst) }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(l: L, acc: L::V, units: L::V, query: *const f32) -> L::V {
        // SAFETY: the caller's.
        unsafe { l.dot_pairs(acc, units, query) }
    }
    #[inline(always)]
    fn expand<L: Lanes>(l: L, units: L::V) -> [L::V; 2] {
        [l.even(units), l.odd(units)]
    }
    #[inline(always)]
    unsafe fn collapse<L: Lanes>(l: L, v: [L::V; 2], dst: *mut f32, n: usize) {
        let (low, high) = l.interleave(v[0], v[1]);
        // SAFETY: the caller's `n` elements.
        unsafe {
            l.store_first(dst, n.min(L::N), low);
            if n > L::N {
                l.store_first(dst.add(L::N), n - L::N, high);
            }
        }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(l: L, dst: *mut Self, n: usize, v: L::V) {
        // SAFETY: the caller's; bf16 is a transparent u16.
        unsafe { l.store_bf16(dst.cast(), n, v) }
    }
}

impl KvElement for f32 {
    const PER_UNIT: usize = 1;

    #[inline(always)]
    fn query_words<L: Lanes>() -> usize {
        1
    }
    #[inline(always)]
    unsafe fn pack_query<L: Lanes>(_: L, src: *const f32, n: usize, scale: f32, dst: *mut f32) {
        for i in 0..n {
            // SAFETY: the caller's `n` elements.
            unsafe { dst.add(i).write(src.add(i).read() * scale) };
        }
    }
    #[inline(always)]
    unsafe fn dot<L: Lanes>(l: L, acc: L::V, units: L::V, query: *const f32) -> L::V {
        // SAFETY: the caller's one word.
        l.fma(units, l.splat(unsafe { query.read() }), acc)
    }
    #[inline(always)]
    fn expand<L: Lanes>(_: L, units: L::V) -> [L::V; 2] {
        [units; 2]
    }
    #[inline(always)]
    unsafe fn collapse<L: Lanes>(l: L, v: [L::V; 2], dst: *mut f32, n: usize) {
        // SAFETY: the caller's `n` elements.
        unsafe { l.store_first(dst, n, v[0]) }
    }
    #[inline(always)]
    unsafe fn store<L: Lanes>(l: L, dst: *mut Self, n: usize, v: L::V) {
        // SAFETY: the caller's.
        unsafe { l.store_first(dst, n, v) }
    }
}
