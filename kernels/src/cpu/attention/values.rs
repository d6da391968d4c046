//! Weighted sums of values.

use std::ops::Range;

use super::KvElement;
use super::span::{HeadUnits, Rows, SPAN, Stream};
use crate::cpu::lanes::Lanes;

/// Adds to each query's accumulator the values of a range of positions, as far as it sees them, times their weights.
///
/// # Safety
/// `weights` is as [`softmax`](super::span::softmax) leaves it, `acc` has `acc_len` words for each query; `values` has `rows.positions`
/// positions.
#[inline(always)]
pub(super) unsafe fn accumulate<L: Lanes, E: KvElement>(
    l: L,
    head: HeadUnits,
    rows: Rows,
    range: Range<usize>,
    values: Stream<'_, E>,
    weights: *const f32,
    acc: *mut f32,
) {
    let mut unit = 0;
    while unit < head.units {
        let vectors = (head.units - unit).div_ceil(L::N).min(L::VALUE_UNITS);
        let block = Block { head, values, weights, acc, unit, vectors };
        let mut query = rows.first * rows.group;
        while query < rows.queries() {
            let count = (rows.queries() - query).min(L::VALUE_QUERIES);
            // What the first of these sees, all see; the others go on alone.
            let common = range.start.max(rows.sees(query / rows.group).min(range.end));
            // SAFETY: `count` queries from `query` see the positions up to `common`, and each those of its row.
            unsafe {
                block.run(l, query, count, range.start..common);
                for query in query + 1..query + count {
                    let sees = rows.sees(query / rows.group).min(range.end);
                    if sees > common {
                        block.run(l, query, 1, common..sees);
                    }
                }
            }
            query += count;
        }
        unit += vectors * L::N;
    }
}

/// A block of the head's columns: `vectors` vectors of units from `unit` on.
struct Block<'a, E> {
    head: HeadUnits,
    values: Stream<'a, E>,
    weights: *const f32,
    acc: *mut f32,
    unit: usize,
    vectors: usize,
}

impl<E: KvElement> Block<'_, E> {
    /// # Safety
    /// `count <= 6` queries from `query` and the positions exist.
    #[inline(always)]
    unsafe fn run<L: Lanes>(&self, l: L, query: usize, count: usize, positions: Range<usize>) {
        // SAFETY: the caller's. A block of one vector of units serves narrow registers and the heads' remainders.
        unsafe {
            if self.vectors == 2 {
                self.run_queries::<L, 2>(l, query, count, positions);
            } else {
                self.run_queries::<L, 1>(l, query, count, positions);
            }
        }
    }

    /// # Safety
    /// As [`Block::run`].
    #[inline(always)]
    unsafe fn run_queries<L: Lanes, const U: usize>(
        &self,
        l: L,
        query: usize,
        count: usize,
        positions: Range<usize>,
    ) {
        // SAFETY: the caller's.
        unsafe {
            match count {
                1 => self.tile::<L, 1, U>(l, query, positions),
                2 => self.tile::<L, 2, U>(l, query, positions),
                3 => self.tile::<L, 3, U>(l, query, positions),
                4 => self.tile::<L, 4, U>(l, query, positions),
                5 => self.tile::<L, 5, U>(l, query, positions),
                _ => self.tile::<L, 6, U>(l, query, positions),
            }
        }
    }

    /// # Safety
    /// `Q` queries from `query`, `U` vectors of units and the positions exist.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const Q: usize, const U: usize>(
        &self,
        l: L,
        query: usize,
        positions: Range<usize>,
    ) {
        let width = L::N * E::PER_UNIT;
        // SAFETY: the caller's.
        unsafe {
            let acc = self.acc.add(query * self.head.acc_len + self.unit * E::PER_UNIT);
            let weights = self.weights.add(query * SPAN);
            let last = (self.head.units - self.unit - (U - 1) * L::N).min(L::N);
            let mut sums = [[[l.splat(0.0); 2]; U]; Q];
            for (q, sums) in sums.iter_mut().enumerate() {
                for (u, sums) in sums.iter_mut().enumerate() {
                    for (e, sum) in sums.iter_mut().enumerate().take(E::PER_UNIT) {
                        *sum = l.load(acc.add(q * self.head.acc_len + u * width + e * L::N));
                    }
                }
            }
            if last == L::N {
                self.sum::<L, Q, U, false>(l, weights, last, positions, &mut sums);
            } else {
                self.sum::<L, Q, U, true>(l, weights, last, positions, &mut sums);
            }
            for (q, sums) in sums.into_iter().enumerate() {
                for (u, sums) in sums.into_iter().enumerate() {
                    for (e, sum) in sums.into_iter().enumerate().take(E::PER_UNIT) {
                        l.store(acc.add(q * self.head.acc_len + u * width + e * L::N), sum);
                    }
                }
            }
        }
    }

    /// The inner loop; with `TAIL`, the last vector has `last` units only.
    ///
    /// # Safety
    /// As [`Block::tile`].
    #[inline(always)]
    unsafe fn sum<L: Lanes, const Q: usize, const U: usize, const TAIL: bool>(
        &self,
        l: L,
        weights: *const f32,
        last: usize,
        positions: Range<usize>,
        out: &mut [[[L::V; 2]; U]; Q],
    ) {
        let mut sums = *out;
        for position in positions {
            // SAFETY: the caller's.
            unsafe {
                let row = self.values.at(position).add(self.unit);
                let mut values = [[l.splat(0.0); 2]; U];
                for (u, value) in values.iter_mut().enumerate() {
                    let p = row.add(u * L::N);
                    let units = if TAIL && u == U - 1 { l.load_first(p, last) } else { l.load(p) };
                    *value = E::expand(l, units);
                }
                for (q, sums) in sums.iter_mut().enumerate() {
                    let weight = l.splat(weights.add(q * SPAN + position).read());
                    for (sums, values) in sums.iter_mut().zip(values) {
                        for (sum, value) in sums.iter_mut().zip(values).take(E::PER_UNIT) {
                            *sum = l.fma(weight, value, *sum);
                        }
                    }
                }
            }
        }
        *out = sums;
    }
}
