//! The softmax of a few queries over one span of positions.
//!
//! Scores: [`Lanes::N`] positions at a time; their keys are transposed in registers so that a lane is a position, and
//! each lane sums its products in the order of the head's elements. Values: a lane is an element of the head, and
//! each sums over the positions in order. Neither order depends on what is computed beside it.

use std::ops::Range;

use crate::cpu::attention::KvElement;
use crate::cpu::lanes::{Lanes, MAX_LANES};

/// Positions in a span. Spans start at multiples of it; a result is the merge of its spans in order, so this number
/// is part of the order of operations.
pub(super) const SPAN: usize = 256;
/// A cache line.
const LINE: usize = 64;

/// Dimensions of a head in units and vectors.
#[derive(Clone, Copy)]
pub(super) struct HeadUnits {
    pub(super) head_dim: usize,
    /// Units of a head.
    pub(super) units: usize,
    /// Elements of an accumulator: the head's, rounded up to whole vectors of units.
    pub(super) acc_len: usize,
    /// Words of a packed query.
    pub(super) query_len: usize,
}

impl HeadUnits {
    #[inline(always)]
    pub(super) fn new<L: Lanes, E: KvElement>(head_dim: usize) -> Self {
        let units = head_dim / E::PER_UNIT;
        let acc_len = units.next_multiple_of(L::N) * E::PER_UNIT;
        Self { head_dim, units, acc_len, query_len: units * E::query_words::<L>() }
    }
}

/// Consecutive queries of one KV head, `group` to a row, the rows at consecutive positions.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) rows: usize,
    pub(super) group: usize,
    /// The first row that reaches the span.
    pub(super) first: usize,
    /// The span's positions that row 0 may see, less one for each row above it that sees fewer: row `r` sees
    /// `min(base + r, positions)`.
    pub(super) base: isize,
    /// Positions of the span that the last row sees.
    pub(super) positions: usize,
}

impl Rows {
    /// `rows` rows from position `first_position`, against the span that starts at `start`.
    #[inline(always)]
    pub(super) fn new(rows: usize, group: usize, first_position: usize, start: usize) -> Self {
        let first = start.saturating_sub(first_position);
        let base = first_position as isize + 1 - start as isize;
        let positions = (base + rows as isize - 1).clamp(0, SPAN as isize) as usize;
        Self { rows, group, first, base, positions }
    }

    /// Positions of the span that `row` (at least `first`) sees.
    #[inline(always)]
    pub(super) fn sees(&self, row: usize) -> usize {
        (self.base + row as isize).clamp(0, self.positions as isize) as usize
    }
    #[inline(always)]
    pub(super) fn queries(&self) -> usize {
        self.rows * self.group
    }
}

/// One head's keys or values over the span.
#[derive(Clone, Copy)]
pub(super) struct Stream<'a, E> {
    /// The head's element 0 at slot 0.
    pub(super) base: *const E,
    /// Slot times stride of each position.
    pub(super) offsets: &'a [usize],
}

impl<E: KvElement> Stream<'_, E> {
    /// The stream of the head that lies `heads` further on.
    #[inline(always)]
    pub(super) fn of_head(self, heads: usize, head: HeadUnits) -> Self {
        Self { base: self.base.wrapping_add(heads * head.head_dim), ..self }
    }

    /// # Safety
    /// `position` is one of the stream's.
    #[inline(always)]
    unsafe fn at(&self, position: usize) -> *const f32 {
        // SAFETY: the offsets were checked against the cache when the batch was taken in.
        unsafe { self.base.add(*self.offsets.get_unchecked(position)).cast() }
    }

    /// Asks for the cache lines of `bytes` bytes at each position, as far as there are positions.
    #[inline(always)]
    pub(super) fn prefetch<L: Lanes>(&self, l: L, bytes: usize, positions: Range<usize>) {
        for position in positions.start..positions.end.min(self.offsets.len()) {
            // SAFETY: the position is inside.
            let p = unsafe { self.at(position) };
            for line in (0..bytes).step_by(LINE) {
                l.prefetch(p.wrapping_byte_add(line));
            }
        }
    }
}

/// Writes the score of each query with each position of a range (whole tiles of it) that the query sees, to
/// `scores[query][position]`.
///
/// # Safety
/// `queries` holds a packed query for each, `tile` a transposed head of `N` positions, `scores` `SPAN` words for each
/// query; `keys` has `rows.positions` positions.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn score<L: Lanes, E: KvElement>(
    l: L,
    head: HeadUnits,
    rows: Rows,
    range: Range<usize>,
    keys: Stream<'_, E>,
    queries: *const f32,
    tile: *mut f32,
    scores: *mut f32,
) {
    for start in (range.start..range.end.min(rows.positions)).step_by(L::N) {
        // SAFETY: `tile` as the caller says; the last position stands in for those past the end.
        unsafe { transpose_keys(l, head, keys, start, rows.positions, tile) };
        // The first row that sees into this tile.
        let first = rows.first.max((start as isize + 1 - rows.base).max(0) as usize);
        let mut query = first * rows.group;
        while query < rows.queries() {
            let count = (rows.queries() - query).min(L::SCORE_QUERIES);
            // SAFETY: `count` queries from `query` exist, and so does this tile of their scores.
            unsafe {
                let q = queries.add(query * head.query_len);
                let out = scores.add(query * SPAN + start);
                match count {
                    1 => score_tile::<L, E, 1>(l, head, q, tile, out),
                    2 => score_tile::<L, E, 2>(l, head, q, tile, out),
                    3 => score_tile::<L, E, 3>(l, head, q, tile, out),
                    4 => score_tile::<L, E, 4>(l, head, q, tile, out),
                    5 => score_tile::<L, E, 5>(l, head, q, tile, out),
                    6 => score_tile::<L, E, 6>(l, head, q, tile, out),
                    7 => score_tile::<L, E, 7>(l, head, q, tile, out),
                    _ => score_tile::<L, E, 8>(l, head, q, tile, out),
                }
            }
            query += count;
        }
    }
}

/// # Safety
/// `tile` has room for `N` positions of a head; `start < positions`, and the stream has `positions`.
#[inline(always)]
unsafe fn transpose_keys<L: Lanes, E: KvElement>(
    l: L,
    head: HeadUnits,
    keys: Stream<'_, E>,
    start: usize,
    positions: usize,
    tile: *mut f32,
) {
    let mut pointers = [std::ptr::null(); MAX_LANES];
    for (i, pointer) in pointers.iter_mut().enumerate().take(L::N) {
        // SAFETY: below `positions`.
        *pointer = unsafe { keys.at((start + i).min(positions - 1)) };
    }
    for unit in (0..head.units).step_by(L::N) {
        let count = (head.units - unit).min(L::N);
        // SAFETY: `count` units from `unit` lie inside the head, and the tile has room for them.
        unsafe { l.transpose(&pointers, count, tile.add(unit * L::N)) };
        for pointer in &mut pointers {
            *pointer = pointer.wrapping_add(L::N);
        }
    }
}

/// # Safety
/// `queries` points at `Q` packed queries, `out` at `N` words in `Q` rows of `SPAN`.
#[inline(always)]
unsafe fn score_tile<L: Lanes, E: KvElement, const Q: usize>(
    l: L,
    head: HeadUnits,
    queries: *const f32,
    tile: *const f32,
    out: *mut f32,
) {
    let mut acc = [l.splat(0.0); Q];
    for unit in 0..head.units {
        // SAFETY: the unit is inside the tile and the queries.
        unsafe {
            let keys = l.load(tile.add(unit * L::N));
            for (q, acc) in acc.iter_mut().enumerate() {
                let query = queries.add(q * head.query_len + unit * E::query_words::<L>());
                *acc = E::dot(l, *acc, keys, query);
            }
        }
    }
    for (q, acc) in acc.into_iter().enumerate() {
        // SAFETY: as the caller says.
        unsafe { l.store(out.add(q * SPAN), acc) };
    }
}

/// Turns the scores (in units of log 2) of each query into weights that sum to `sum[query]`, the greatest score
/// `max[query]` having weight 1.
///
/// # Safety
/// `scores` holds the scores of all positions that each query sees; `max` and `sum` have a word for each query.
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(l: L, rows: Rows, scores: *mut f32, max: *mut f32, sum: *mut f32) {
    for query in rows.first * rows.group..rows.queries() {
        let vectors = rows.sees(query / rows.group).div_ceil(L::N);
        // SAFETY: the vectors lie inside the query's `SPAN` words.
        unsafe {
            let scores = scores.add(query * SPAN);
            // What the query does not see of its last vector.
            for position in rows.sees(query / rows.group)..vectors * L::N {
                scores.add(position).write(f32::NEG_INFINITY);
            }
            let mut greatest = l.splat(f32::NEG_INFINITY);
            for i in 0..vectors {
                greatest = l.max(l.load(scores.add(i * L::N)), greatest);
            }
            let m = l.greatest(greatest);
            let shift = l.splat(m);
            let mut total = l.splat(0.0);
            for i in 0..vectors {
                let weight = l.exp2(l.sub(l.load(scores.add(i * L::N)), shift));
                l.store(scores.add(i * L::N), weight);
                total = l.add(total, weight);
            }
            max.add(query).write(m);
            sum.add(query).write(l.sum(total));
        }
    }
}

/// Adds to each query's accumulator the values of a range of positions, as far as it sees them, times their weights.
///
/// # Safety
/// `weights` is as [`softmax`] leaves it, `acc` has `acc_len` words for each query; `values` has `rows.positions`
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

/// The result over the spans so far: greatest score, sum of weights, weighted sum of values.
#[derive(Clone, Copy)]
pub(super) struct Partial {
    pub(super) max: *mut f32,
    pub(super) sum: *mut f32,
    pub(super) acc: *mut f32,
}

/// Merges the next span's result into `into`.
///
/// # Safety
/// Both have one word of `max` and `sum` and `acc_len` words of `acc`.
#[inline(always)]
pub(super) unsafe fn merge<L: Lanes>(l: L, head: HeadUnits, into: Partial, from: Partial) {
    // SAFETY: the caller's.
    unsafe {
        let (a, b) = (into.max.read(), from.max.read());
        let greatest = if a > b { a } else { b };
        let (keep, add) = (l.exp2(l.splat(a - greatest)), l.exp2(l.splat(b - greatest)));
        into.max.write(greatest);
        let sum = l.fma(l.splat(from.sum.read()), add, l.mul(l.splat(into.sum.read()), keep));
        l.store_first(into.sum, 1, sum);
        for i in (0..head.acc_len).step_by(L::N) {
            let kept = l.mul(l.load(into.acc.add(i)), keep);
            l.store(into.acc.add(i), l.fma(l.load(from.acc.add(i)), add, kept));
        }
    }
}

/// Divides by the sum of weights and writes the head's elements in order.
///
/// # Safety
/// `from` is whole, `out` has `head_dim` words.
#[inline(always)]
pub(super) unsafe fn finish<L: Lanes, E: KvElement>(l: L, head: HeadUnits, from: Partial, out: *mut f32) {
    let width = L::N * E::PER_UNIT;
    // SAFETY: the caller's.
    unsafe {
        let scale = l.splat(1.0 / from.sum.read());
        for start in (0..head.head_dim).step_by(width) {
            let mut v = [l.splat(0.0); 2];
            for (e, v) in v.iter_mut().enumerate().take(E::PER_UNIT) {
                *v = l.mul(l.load(from.acc.add(start + e * L::N)), scale);
            }
            E::collapse(l, v, out.add(start), (head.head_dim - start).min(width));
        }
    }
}
