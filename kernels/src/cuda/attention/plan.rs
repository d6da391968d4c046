//! How a step's attention is divided among blocks of threads. The plan is made once a step and serves all layers.

use std::cmp::Reverse;

use super::{decode_shared_bytes, prefill_shared_bytes};
use crate::cuda::device::Device;
use crate::{HeadShape, KvDtype};

/// Rows (queries times the heads of a group) that one CTA of the decode kernel holds.
const DECODE_ROWS: usize = 16;
/// What an item of the decode kernel costs beside its positions, in positions.
const ITEM_COST: u64 = 48;
/// Positions that the four warps of a CTA take in one round: contexts are cut at multiples of this.
const ROUND: u32 = 64;
/// Positions of a piece that are enough to pay for merging it, where a team has room left or a context has a rest.
const LEAST_PIECE: u32 = 192;
/// The same for a team that has nothing yet.
const LEAST_FIRST_PIECE: u32 = 256;
/// Rows of a tile of the prefill kernel for Hopper.
const HOPPER_ROWS: u32 = 128;

/// What plans depend on beside the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tuning {
    /// Multiprocessors of the card.
    pub(crate) multiprocessors: u32,
    /// Whether every row goes to the prefill kernel, which takes positions in one order for any number of rows: results
    /// are then the same in any batch, and however a sequence is cut into steps.
    pub(crate) one_order: bool,
    /// Tokens that a row attends to, its own included, as each step says; 0 for all.
    pub(crate) window: u32,
    /// What the KV cache holds.
    pub(crate) kv: KvDtype,
    /// Whether the card is a Hopper, whose matrix instructions a prefill kernel of its own uses, for all prefills: the
    /// kernels' results differ in their last bits.
    pub(crate) hopper: bool,
    /// Bytes of shared memory that a block may have: too few on some cards for the larger tiles.
    pub(crate) shared_bytes: u32,
}

impl Tuning {
    /// For a card.
    pub(crate) fn new(device: &Device, kv: KvDtype, batch_invariant: bool) -> Self {
        let card = device.info();
        Self {
            multiprocessors: card.multiprocessors,
            one_order: batch_invariant,
            window: 0,
            kv,
            hopper: card.capability == (9, 0),
            shared_bytes: card.shared_bytes_per_block,
        }
    }

    /// Rows of the largest tile of the prefill kernel that serves all cards.
    pub(super) fn most_prefill_rows(&self, head_dim: usize) -> u32 {
        let fits = prefill_shared_bytes(head_dim, self.kv, 128) <= self.shared_bytes;
        // Those of bytes have no registers left to widen with in the largest tile.
        let widest = if self.kv == KvDtype::Fp8 { 96 } else { 128 };
        if head_dim <= widest && fits { 128 } else { 64 }
    }

    /// CTAs of a team: one for each KV head and each 16 heads of its group.
    pub(super) fn team_size(heads: HeadShape) -> usize {
        heads.kv_heads * (heads.heads / heads.kv_heads).div_ceil(DECODE_ROWS)
    }

    /// Teams that run at one time.
    pub(super) fn teams(&self, heads: HeadShape) -> usize {
        // Two CTAs run beside each other where shared memory allows it. A multiprocessor has 1 KB more than a block may have, and
        // takes as much for each.
        let shared = 2 * (decode_shared_bytes(heads.head_dim, self.kv) + 1024) <= self.shared_bytes + 1024;
        let ctas = self.multiprocessors as usize * if shared { 2 } else { 1 };
        (ctas / Self::team_size(heads)).max(1)
    }

    /// Whether the decode kernel takes this many queries of a sequence.
    fn is_decode(&self, queries: u32, group: usize) -> bool {
        !self.one_order && (queries == 1 || queries as usize * group <= DECODE_ROWS)
    }

    /// First position that the row at `position` attends to.
    fn window_start(&self, position: u32) -> u32 {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }
}

/// How large plans get.
///
/// Every boundary between two teams cuts at most one context in two, so that `sequences` of them make at most
/// `sequences + teams - 1` items, and those that were cut at most `2 * (teams - 1)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PlanBounds {
    heads: HeadShape,
    teams: usize,
}

impl PlanBounds {
    pub(crate) fn new(heads: HeadShape, tuning: &Tuning) -> Self {
        Self { heads, teams: tuning.teams(heads) }
    }

    /// Items of the decode kernel for this many sequences.
    pub(crate) fn decode_items(&self, sequences: usize) -> usize {
        sequences + self.teams - 1
    }

    /// Words of those items and of the list of teams.
    pub(crate) fn decode_item_words(&self, sequences: usize) -> usize {
        8 * self.decode_items(sequences) + (self.teams + 1).next_multiple_of(8)
    }

    /// Words of the prefill kernel's items for this many rows and sequences.
    pub(crate) fn prefill_item_words(&self, rows: usize, sequences: usize) -> usize {
        8 * ((rows * self.group()).div_ceil(64) + sequences)
    }

    /// Rows of partial results, each of all KV heads.
    pub(super) fn partial_rows(&self) -> usize {
        2 * (self.teams - 1) * self.group().max(DECODE_ROWS)
    }

    fn group(&self) -> usize {
        self.heads.heads / self.heads.kv_heads
    }
}

/// How one step's attention is divided; kept for its allocations.
#[derive(Debug, Default)]
pub(crate) struct AttentionPlan {
    /// Sequence, first query row, queries, context; first position, end, split and number of splits (low and high
    /// half), first row of the sequence's partial results.
    pub(crate) decode_items: Vec<[u32; 8]>,
    /// First item of each team, and one past the last item.
    pub(crate) decode_teams: Vec<u32>,
    /// Sequence, first query row, queries, context; first row of the tile (queries times the heads of a group), first
    /// position, end, nothing. The longest first; every item is computed for each KV head.
    pub(crate) prefill_items: Vec<[u32; 8]>,
    /// Rows of a prefill tile.
    pub(crate) prefill_rows: u32,
    partial_rows: usize,
}

/// The rows of one sequence.
#[derive(Clone, Copy)]
struct Rows {
    sequence: u32,
    first_row: u32,
    queries: u32,
    context: u32,
}

impl Rows {
    /// Position of query `query`.
    fn position(&self, query: u32) -> u32 {
        self.context - self.queries + query
    }

    fn item(&self, last: [u32; 4]) -> [u32; 8] {
        let [a, b, c, d] = last;
        [self.sequence, self.first_row, self.queries, self.context, a, b, c, d]
    }
}

/// The sequences of a batch that have rows.
fn rows_of<'a>(query_start: &'a [u32], context_len: &'a [u32]) -> impl Iterator<Item = Rows> + 'a {
    query_start.windows(2).zip(context_len).zip(0..).filter(|((range, _), _)| range[1] > range[0]).map(
        |((range, &context), sequence)| {
            let queries = range[1] - range[0];
            assert!(queries <= context, "sequence {sequence} has {queries} rows in a context of {context}");
            Rows { sequence, first_row: range[0], queries, context }
        },
    )
}

impl AttentionPlan {
    /// Plans a step.
    pub(crate) fn update(
        &mut self,
        query_start: &[u32],
        context_len: &[u32],
        heads: HeadShape,
        tuning: &Tuning,
    ) {
        let group = heads.heads / heads.kv_heads;
        let rows = || rows_of(query_start, context_len);
        self.decode_items.clear();
        self.partial_rows = 0;
        let left = rows()
            .filter(|rows| tuning.is_decode(rows.queries, group))
            .map(|rows| u64::from(rows.context - tuning.window_start(rows.position(0))) + ITEM_COST)
            .sum();
        let mut teams = Teams::new(std::mem::take(&mut self.decode_teams), tuning.teams(heads), left);
        for rows in rows().filter(|rows| tuning.is_decode(rows.queries, group)) {
            self.add_decode(rows, group, tuning, &mut teams);
        }
        self.decode_teams = teams.finish(self.decode_items.len());
        self.prefill_items.clear();
        self.prefill_rows = prefill_rows(rows(), heads, tuning);
        for rows in rows().filter(|rows| !tuning.is_decode(rows.queries, group)) {
            self.add_prefill(rows, group as u32, tuning);
        }
        self.prefill_items
            .sort_unstable_by_key(|item| (Reverse((item[6] - item[5]) / ROUND), item[0], item[4]));
    }

    /// Rows of partial results that the plan needs, each of all KV heads.
    #[cfg(test)]
    fn partial_rows(&self) -> usize {
        self.partial_rows
    }

    /// Cuts one sequence's context among teams.
    fn add_decode(&mut self, rows: Rows, group: usize, tuning: &Tuning, teams: &mut Teams) {
        let first_item = self.decode_items.len();
        let mut at = tuning.window_start(rows.position(0));
        while at < rows.context {
            let end = teams.cut(at, rows.context, self.decode_items.len());
            teams.take(end - at, end == rows.context);
            self.decode_items.push(rows.item([at, end, 0, 0]));
            at = end;
        }
        let pieces = &mut self.decode_items[first_item..];
        let splits = u32::from(u16::try_from(pieces.len()).expect("at most 65535 pieces of a context"));
        for (piece, split) in pieces.iter_mut().zip(0..) {
            piece[6] = splits << 16 | split;
            piece[7] = self.partial_rows as u32;
        }
        if splits > 1 {
            self.partial_rows += splits as usize * rows.queries as usize * group;
        }
    }

    /// Cuts one sequence's rows into tiles.
    fn add_prefill(&mut self, rows: Rows, group: u32, tuning: &Tuning) {
        let all = rows.queries * group;
        for first in (0..all).step_by(self.prefill_rows as usize).rev() {
            let last = (first + self.prefill_rows).min(all) - 1;
            let from = tuning.window_start(rows.position(first / group));
            self.prefill_items.push(rows.item([first, from, rows.position(last / group) + 1, 0]));
        }
    }
}

/// Rows of a prefill tile: of the kernel that serves all cards, 128 where such tiles can fill the card, else 64.
/// Results do not depend on it.
fn prefill_rows(rows: impl Iterator<Item = Rows>, heads: HeadShape, tuning: &Tuning) -> u32 {
    if tuning.hopper {
        return HOPPER_ROWS;
    }
    let group = heads.heads / heads.kv_heads;
    let prefills = rows.filter(|rows| !tuning.is_decode(rows.queries, group));
    let tiles: usize = prefills.map(|rows| (rows.queries as usize * group).div_ceil(128)).sum();
    let filled = tiles * heads.kv_heads >= 2 * tuning.multiprocessors as usize;
    if filled { tuning.most_prefill_rows(heads.head_dim) } else { 64 }
}

/// Fills one team after another with like shares of the work.
struct Teams {
    /// First item of each team so far.
    starts: Vec<u32>,
    teams: usize,
    /// Cost given to the current team, and what it should have.
    used: u64,
    budget: u64,
    /// Cost of what no team has yet.
    left: u64,
}

impl Teams {
    fn new(mut starts: Vec<u32>, teams: usize, left: u64) -> Self {
        starts.clear();
        starts.push(0);
        let mut this = Self { starts, teams, used: 0, budget: 0, left };
        this.open();
        this
    }

    /// The current team's share of what is left, with the cost of one more cut for every team after it.
    fn open(&mut self) {
        let teams = (self.teams + 1 - self.starts.len()) as u64;
        self.used = 0;
        self.budget = (self.left + (teams - 1) * ITEM_COST).div_ceil(teams);
    }

    fn next(&mut self, items: usize) {
        self.starts.push(items as u32);
        self.open();
    }

    fn is_last(&self) -> bool {
        self.starts.len() == self.teams
    }

    /// Where the piece from `at` of a context that ends at `end` should end, going on to the next team if the current
    /// one is full.
    fn cut(&mut self, at: u32, end: u32, items: usize) -> u32 {
        let rest = end - at;
        if self.used > 0 && rest > self.room() && self.room() < LEAST_PIECE && !self.is_last() {
            self.next(items);
        }
        let wanted = self.room().max(if self.used > 0 { 0 } else { LEAST_FIRST_PIECE });
        if self.is_last() || rest <= wanted {
            return end;
        }
        let cut = (at + wanted + ROUND / 2) / ROUND * ROUND;
        if cut + LEAST_PIECE <= end { cut } else { end }
    }

    /// Positions of one more piece that the current team has room for.
    fn room(&self) -> u32 {
        u32::try_from(self.budget.saturating_sub(self.used + ITEM_COST)).unwrap_or(u32::MAX / 2)
    }

    /// Gives a piece to the current team.
    fn take(&mut self, positions: u32, ends: bool) {
        self.used += u64::from(positions) + ITEM_COST;
        self.left = self.left.saturating_sub(u64::from(positions) + if ends { ITEM_COST } else { 0 });
    }

    /// The list, with the teams that got nothing.
    fn finish(mut self, items: usize) -> Vec<u32> {
        self.starts.resize(self.teams + 1, items as u32);
        self.starts
    }
}

#[cfg(test)]
mod tests;
