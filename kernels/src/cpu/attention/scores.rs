//! Products of queries and keys.

use std::ops::Range;

use super::KvElement;
use super::span::{HeadUnits, Rows, SPAN, Stream};
use crate::cpu::lanes::{Lanes, MAX_LANES};

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
