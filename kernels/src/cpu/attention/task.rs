//! A task of attention: some rows of one sequence, some KV heads, all spans or one.

use std::ops::Range;

use super::span::{self, HeadUnits, Partial, Rows, SPAN, Stream};
use super::{Addressing, KvElement, scores, values};
use crate::HeadShape;
use crate::cpu::disjoint::Disjoint;
use crate::cpu::lanes::{Kernel, Lanes};

/// Rows of one sequence at consecutive positions, and what of them to compute.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    pub(super) sequence: usize,
    /// First row in the batch, and its position.
    pub(super) row: usize,
    pub(super) position: usize,
    pub(super) rows: usize,
    /// Positions that each row sees, its own included.
    pub(super) window: usize,
    /// KV heads.
    pub(super) head: usize,
    pub(super) heads: usize,
    /// One span, whose result goes to the partials from this query on; otherwise all, to the output.
    pub(super) span: Option<(usize, usize)>,
}

impl Item {
    /// Spans of which some row sees something.
    pub(super) fn spans(&self) -> Range<usize> {
        self.spans_of(0).start..(self.position + self.rows).div_ceil(SPAN)
    }

    /// Spans of which row `row` sees something.
    pub(super) fn spans_of(&self, row: usize) -> Range<usize> {
        let end = self.position + row + 1;
        end.saturating_sub(self.window) / SPAN..end.div_ceil(SPAN)
    }
}

/// What all tasks of a call share.
pub(super) struct Job<'a, E, A> {
    pub(super) heads: HeadShape,
    /// Applied to the scores, which are in units of log 2.
    pub(super) scale: f32,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`
    pub(super) qkv: &'a [f32],
    /// `[slots][kv_heads][head_dim]`
    pub(super) k: &'a [E],
    pub(super) v: &'a [E],
    pub(super) addressing: A,
    /// `[rows, heads * head_dim]`
    pub(super) out: Disjoint<'a, f32>,
    /// `[query][max, sum, acc]`, for items of one span.
    pub(super) partials: Disjoint<'a, f32>,
}

/// Words before a partial result's accumulator: its greatest score and sum, padded to a line.
const PARTIAL_HEADER: usize = 16;

/// Words of one partial result: enough for every instruction set.
pub(super) fn partial_len(head_dim: usize) -> usize {
    PARTIAL_HEADER + head_dim.next_multiple_of(2 * crate::cpu::lanes::MAX_LANES)
}

fn partial_at(words: *mut f32) -> Partial {
    Partial { max: words, sum: words.wrapping_add(1), acc: words.wrapping_add(PARTIAL_HEADER) }
}

/// A thread's working memory; grows as needed.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    words: Vec<f32>,
    offsets: Vec<usize>,
}

/// Parts of [`Scratch`] for one item.
struct Memory<'a> {
    queries: *mut f32,
    scores: *mut f32,
    tile: *mut f32,
    /// Results of the current span.
    span: Partial,
    /// Results over the spans so far.
    total: Partial,
    offsets: &'a mut [usize],
    next_offsets: &'a mut [usize],
}

impl Scratch {
    fn divide<L: Lanes>(&mut self, head: HeadUnits, queries: usize) -> Memory<'_> {
        let results = [queries, queries, queries * head.acc_len];
        let sizes = [queries * head.query_len, queries * SPAN, head.units * L::N];
        // Each part starts on a line of its own.
        let line = |n: usize| n.next_multiple_of(16);
        let words = sizes.map(line).iter().sum::<usize>() + 2 * results.map(line).iter().sum::<usize>() + 16;
        if self.words.len() < words {
            self.words.resize(words, 0.0);
        }
        self.offsets.resize(2 * SPAN, 0);
        let start = self.words.as_mut_ptr();
        let mut at = start.wrapping_add(start.align_offset(64));
        let mut part = |n: usize| {
            let part = at;
            at = at.wrapping_add(line(n));
            part
        };
        let [queries, scores, tile] = sizes.map(&mut part);
        let [[span_max, span_sum, span_acc], [max, sum, acc]] =
            [results.map(&mut part), results.map(&mut part)];
        let (offsets, next_offsets) = self.offsets.split_at_mut(SPAN);
        Memory {
            queries,
            scores,
            tile,
            span: Partial { max: span_max, sum: span_sum, acc: span_acc },
            total: Partial { max, sum, acc },
            offsets,
            next_offsets,
        }
    }
}

/// Computes one item.
pub(super) struct RunItem<'a, E, A> {
    pub(super) job: &'a Job<'a, E, A>,
    pub(super) item: Item,
    pub(super) scratch: &'a mut Scratch,
}

/// Queries of one KV head up to which memory, not arithmetic, bounds the time: keys and values are then gone through
/// in the order in which they lie, all heads of a few positions at a time, and asked for ahead.
pub(super) const STREAMED_QUERIES: usize = 16;
/// Positions asked for ahead.
const AHEAD: usize = 48;
/// Positions whose values are added at a time, when streaming.
const VALUE_RUN: usize = 32;

impl<E: KvElement, A: Addressing> Kernel for RunItem<'_, E, A> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Self { job, item, scratch } = self;
        let head = HeadUnits::new::<L, E>(job.heads.head_dim);
        let group = job.heads.heads / job.heads.kv_heads;
        let mut memory = scratch.divide::<L>(head, item.heads * item.rows * group);
        // SAFETY: the memory was just divided for these sizes.
        unsafe { pack_queries(l, job, item, head, memory.queries) };

        let spans = item.span.map_or(item.spans(), |(span, _)| span..span + 1);
        let stride = job.heads.kv_heads * job.heads.head_dim;
        let end = item.position + item.rows;
        let fill = |span: usize, offsets: &mut [usize]| {
            let n = (end - span * SPAN).min(SPAN);
            job.addressing.offsets(item.sequence, span * SPAN, stride, &mut offsets[..n]);
            n
        };
        let mut n = fill(spans.start, memory.offsets);
        for span in spans.clone() {
            let next_n = if span + 1 < spans.end { fill(span + 1, memory.next_offsets) } else { 0 };
            let work = SpanWork {
                head,
                rows: Rows::new(item.rows, group, item.position, item.window, span * SPAN),
                heads: item.heads,
                keys: job.stream(job.k, item.head, &memory.offsets[..n]),
                values: job.stream(job.v, item.head, &memory.offsets[..n]),
                next_keys: job.stream(job.k, item.head, &memory.next_offsets[..next_n]),
            };
            // SAFETY: the memory is divided for these sizes, and the streams have `rows.positions` positions.
            unsafe { work.run(l, &memory, span == spans.start) };
            std::mem::swap(&mut memory.offsets, &mut memory.next_offsets);
            n = next_n;
        }
        // SAFETY: every query's total is computed, and the item's output belongs to this task.
        unsafe { job.deliver(l, head, item, memory.total) };
    }
}

/// # Safety
/// `queries` has room for the item's.
#[inline(always)]
unsafe fn pack_queries<L: Lanes, E: KvElement, A: Addressing>(
    l: L,
    job: &Job<'_, E, A>,
    item: Item,
    head: HeadUnits,
    queries: *mut f32,
) {
    let HeadShape { heads, kv_heads, head_dim } = job.heads;
    let group = heads / kv_heads;
    let mut to = queries;
    for h in item.head..item.head + item.heads {
        for row in item.row..item.row + item.rows {
            let of_row = &job.qkv[row * (heads + 2 * kv_heads) * head_dim..][..heads * head_dim];
            for query in of_row[h * group * head_dim..(h + 1) * group * head_dim].chunks_exact(head_dim) {
                // SAFETY: as many queries as the caller made room for.
                unsafe { E::pack_query(l, query.as_ptr(), head_dim, job.scale, to) };
                to = to.wrapping_add(head.query_len);
            }
        }
    }
}

/// One span of some KV heads.
struct SpanWork<'a, E> {
    head: HeadUnits,
    rows: Rows,
    heads: usize,
    /// Of the first head; the others follow it at each position.
    keys: Stream<'a, E>,
    values: Stream<'a, E>,
    /// Of the span after this one, if any.
    next_keys: Stream<'a, E>,
}

impl<E: KvElement> SpanWork<'_, E> {
    /// The span's result becomes the total, or is merged into it.
    ///
    /// # Safety
    /// `memory` is divided for these sizes; the streams have `rows.positions` positions.
    #[inline(always)]
    unsafe fn run<L: Lanes>(&self, l: L, memory: &Memory<'_>, first: bool) {
        let Self { head, rows, heads, .. } = *self;
        let (of_head, from) = (rows.queries(), rows.first * rows.group);
        let streamed = of_head <= STREAMED_QUERIES;
        // All rows reach the first span, though the windows of the last ones may have left it behind.
        let result = if first { memory.total } else { memory.span };
        let step = if streamed { L::N } else { SPAN };
        let begin = rows.from(L::N);
        if streamed && first {
            self.keys.prefetch(l, self.row_bytes(), begin..begin + AHEAD);
        }
        // SAFETY: the caller's; each head has `of_head` queries.
        unsafe {
            for start in (begin..rows.positions).step_by(step) {
                for h in 0..heads {
                    if streamed {
                        self.prefetch_share(l, (self.keys, self.values), start, step, h);
                    }
                    let queries = memory.queries.add(h * of_head * head.query_len);
                    let out = memory.scores.add(h * of_head * SPAN);
                    let keys = self.keys.of_head(h, head);
                    scores::score(l, head, rows, start..start + step, keys, queries, memory.tile, out);
                }
            }
            for h in 0..heads {
                let at = offset(result, head, h * of_head);
                span::softmax(l, rows, memory.scores.add(h * of_head * SPAN), at.max, at.sum);
                at.acc.add(from * head.acc_len).write_bytes(0, (of_head - from) * head.acc_len);
            }
            let step = if streamed { VALUE_RUN } else { SPAN };
            for start in (begin..rows.positions).step_by(step) {
                for h in 0..heads {
                    if streamed {
                        self.prefetch_share(l, (self.values, self.next_keys), start, step, h);
                    }
                    let weights = memory.scores.add(h * of_head * SPAN);
                    let at = offset(result, head, h * of_head);
                    let values = self.values.of_head(h, head);
                    values::accumulate(l, head, rows, start..start + step, values, weights, at.acc);
                }
            }
            if !first {
                for query in (0..heads).flat_map(|h| h * of_head + from..(h + 1) * of_head) {
                    span::merge(l, head, offset(memory.total, head, query), offset(memory.span, head, query));
                }
            }
        }
    }

    fn row_bytes(&self) -> usize {
        self.heads * self.head.head_dim * size_of::<E>()
    }

    /// Asks for the `h`-th of `heads` shares of what will be needed when the `step` positions from `start` on are
    /// [`AHEAD`] positions back: of the first stream, or past its end of the second. In shares, so that the asking
    /// is spread over the work.
    #[inline(always)]
    fn prefetch_share<L: Lanes>(
        &self,
        l: L,
        (now, then): (Stream<'_, E>, Stream<'_, E>),
        start: usize,
        step: usize,
        h: usize,
    ) {
        let from = AHEAD + start + step * h / self.heads;
        let to = AHEAD + start + step * (h + 1) / self.heads;
        let len = self.rows.positions;
        now.prefetch(l, self.row_bytes(), from..to.min(len));
        then.prefetch(l, self.row_bytes(), from.max(len) - len..to.max(len) - len);
    }
}

#[inline(always)]
fn offset(partial: Partial, head: HeadUnits, query: usize) -> Partial {
    Partial {
        max: partial.max.wrapping_add(query),
        sum: partial.sum.wrapping_add(query),
        acc: partial.acc.wrapping_add(query * head.acc_len),
    }
}

impl<E: KvElement, A: Addressing> Job<'_, E, A> {
    #[inline(always)]
    fn stream<'s>(&self, cache: &[E], head: usize, offsets: &'s [usize]) -> Stream<'s, E> {
        Stream { base: cache.as_ptr().wrapping_add(head * self.heads.head_dim), offsets }
    }

    /// Writes the item's results to the output or the partials.
    ///
    /// # Safety
    /// `total` holds every query's result; no other task has this item.
    #[inline(always)]
    unsafe fn deliver<L: Lanes>(&self, l: L, head: HeadUnits, item: Item, total: Partial) {
        let group = self.heads.heads / self.heads.kv_heads;
        let mut query = 0;
        for h in item.head..item.head + item.heads {
            for row in item.row..item.row + item.rows {
                for g in 0..group {
                    let from = offset(total, head, query);
                    // SAFETY: the caller's; the parts are this row's and query's own.
                    unsafe {
                        if let Some((_, first)) = item.span {
                            let len = partial_len(head.head_dim);
                            let to = partial_at(self.partials.part((first + query) * len, len).as_mut_ptr());
                            to.max.write(from.max.read());
                            to.sum.write(from.sum.read());
                            to.acc.copy_from_nonoverlapping(from.acc, head.acc_len);
                        } else {
                            let out = self.output(row, h * group + g);
                            span::finish::<L, E>(l, head, from, out.as_mut_ptr());
                        }
                    }
                    query += 1;
                }
            }
        }
    }

    /// # Safety
    /// No other task writes this head of this row.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "each head of each row has one task")]
    unsafe fn output(&self, row: usize, query_head: usize) -> &mut [f32] {
        let HeadShape { heads, head_dim, .. } = self.heads;
        // SAFETY: the caller's.
        unsafe { self.out.part((row * heads + query_head) * head_dim, head_dim) }
    }
}

/// Merges the partial results of one row and KV head, span by span, and writes the output.
pub(super) struct MergeSpans<'a, E, A> {
    pub(super) job: &'a Job<'a, E, A>,
    pub(super) row: usize,
    pub(super) head: usize,
    /// The partial result of this row's first query in each span that the row sees, in order.
    pub(super) first: &'a [usize],
}

impl<E: KvElement, A: Addressing> Kernel for MergeSpans<'_, E, A> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let job = self.job;
        let head = HeadUnits::new::<L, E>(job.heads.head_dim);
        let group = job.heads.heads / job.heads.kv_heads;
        let len = partial_len(head.head_dim);
        for g in 0..group {
            let Some((&first, rest)) = self.first.split_first() else { return };
            // SAFETY: the partials of this row and head, and its output, belong to this task.
            unsafe {
                let total = partial_at(job.partials.part((first + g) * len, len).as_mut_ptr());
                for &next in rest {
                    let next = partial_at(job.partials.part((next + g) * len, len).as_mut_ptr());
                    span::merge(l, head, total, next);
                }
                let out = job.output(self.row, self.head * group + g);
                span::finish::<L, E>(l, head, total, out.as_mut_ptr());
            }
        }
    }
}
