//! Spans of positions: the softmax of one, and the merge of several.
//!
//! Scores ([`super::scores`]): [`Lanes::N`] positions at a time; their keys are transposed in registers so that a lane
//! is a position, and each lane sums its products in the order of the head's elements. Values ([`super::values`]): a
//! lane is an element of the head, and each sums over the positions in order. Neither order depends on what is
//! computed beside it.

use std::ops::Range;

use crate::cpu::attention::KvElement;
use crate::cpu::lanes::Lanes;

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
    /// Row `r` sees nothing of the span's first `before + r` positions, which its window has left behind.
    before: isize,
}

impl Rows {
    /// `rows` rows from position `first_position`, each of which sees `window` positions, against the span that starts at
    /// `start`.
    #[inline(always)]
    pub(super) fn new(rows: usize, group: usize, first_position: usize, window: usize, start: usize) -> Self {
        let first = start.saturating_sub(first_position);
        let base = first_position as isize + 1 - start as isize;
        let positions = (base + rows as isize - 1).clamp(0, SPAN as isize) as usize;
        let before = base - window.min(isize::MAX as usize / 2) as isize;
        Self { rows, group, first, base, positions, before }
    }

    /// Positions of the span that `row` (at least `first`) sees.
    #[inline(always)]
    pub(super) fn sees(&self, row: usize) -> usize {
        (self.base + row as isize).clamp(0, self.positions as isize) as usize
    }
    /// Of these, the first ones, which its window has left behind.
    #[inline(always)]
    pub(super) fn hidden(&self, row: usize) -> usize {
        (self.before + row as isize).clamp(0, self.sees(row) as isize) as usize
    }
    /// A multiple of `tile` before which no row sees a position.
    #[inline(always)]
    pub(super) fn from(&self, tile: usize) -> usize {
        self.hidden(self.first) / tile * tile
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
    pub(super) unsafe fn at(&self, position: usize) -> *const f32 {
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

/// Turns the scores (in units of log 2) of each query into weights that sum to `sum[query]`, the greatest score
/// `max[query]` having weight 1; of a query that sees nothing of the span, they are 0 and minus infinity.
///
/// # Safety
/// `scores` holds the scores of all positions that each query sees, from `rows.from(N)` on; `max` and `sum` have a word for each query.
#[inline(always)]
pub(super) unsafe fn softmax<L: Lanes>(l: L, rows: Rows, scores: *mut f32, max: *mut f32, sum: *mut f32) {
    let from = rows.from(L::N) / L::N;
    for query in rows.first * rows.group..rows.queries() {
        let row = query / rows.group;
        let (hidden, sees) = (rows.hidden(row), rows.sees(row));
        let vectors = from..sees.div_ceil(L::N);
        // SAFETY: the vectors lie inside the query's `SPAN` words.
        unsafe {
            let scores = scores.add(query * SPAN);
            if hidden == sees {
                scores.add(from * L::N).write_bytes(0, vectors.len() * L::N);
                max.add(query).write(f32::NEG_INFINITY);
                sum.add(query).write(0.0);
                continue;
            }
            // What the query does not see of its last vector, and what its window has left behind.
            for position in (from * L::N..hidden).chain(sees..vectors.end * L::N) {
                scores.add(position).write(f32::NEG_INFINITY);
            }
            let mut greatest = l.splat(f32::NEG_INFINITY);
            for i in vectors.clone() {
                greatest = l.max(l.load(scores.add(i * L::N)), greatest);
            }
            let m = l.greatest(greatest);
            let shift = l.splat(m);
            let mut total = l.splat(0.0);
            for i in vectors {
                let weight = l.exp2(l.sub(l.load(scores.add(i * L::N)), shift));
                l.store(scores.add(i * L::N), weight);
                total = l.add(total, weight);
            }
            max.add(query).write(m);
            sum.add(query).write(l.sum(total));
        }
    }
}

/// The result over the spans so far: greatest score, sum of weights, weighted sum of values.
#[derive(Clone, Copy)]
pub(super) struct Partial {
    pub(super) max: *mut f32,
    pub(super) sum: *mut f32,
    pub(super) acc: *mut f32,
}

/// Merges the next span's result into `into`. At least one of the two is of a span of which the query sees something.
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
