//! How a step's attention is divided among blocks of threads. The plan is made once a step and serves all layers.

use std::cmp::Reverse;

use super::{decode_shared_bytes, prefill_shared_bytes};
use crate::cuda::activations::ActivationDtype;
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
/// Rows of a tile of the prefill kernel for Hopper, and head dimensions that it is compiled for.
const HOPPER_ROWS: u32 = 128;
const HOPPER_HEAD_DIMS: [usize; 2] = [64, 128];

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
    /// What queries are.
    pub(crate) activations: ActivationDtype,
    /// Whether the card is a Hopper, whose matrix instructions a prefill kernel of its own uses.
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
            activations: device.activations(),
            hopper: card.capability == (9, 0),
            shared_bytes: card.shared_bytes_per_block,
        }
    }

    /// Whether prefills go to the kernel for Hopper. It does not depend on the batch, since the kernels' results differ
    /// in their last bits.
    pub(super) fn uses_hopper(&self, heads: HeadShape) -> bool {
        self.hopper && self.kv == self.activations.kv() && HOPPER_HEAD_DIMS.contains(&heads.head_dim)
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
        // Two CTAs run beside each other where registers and shared memory allow it. A multiprocessor has 1 KB more than a block may
        // have, and takes as much for each.
        let shared = 2 * (decode_shared_bytes(heads.head_dim, self.kv) + 1024) <= self.shared_bytes + 1024;
        let ctas = self.multiprocessors as usize * if heads.head_dim <= 128 && shared { 2 } else { 1 };
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
    if tuning.uses_hopper(heads) {
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug)]
    struct Case {
        heads: HeadShape,
        tuning: Tuning,
        query_start: Vec<u32>,
        context_len: Vec<u32>,
    }

    impl Case {
        fn plan(&self) -> AttentionPlan {
            let mut plan = AttentionPlan::default();
            plan.update(&self.query_start, &self.context_len, self.heads, &self.tuning);
            plan
        }
        fn group(&self) -> u32 {
            (self.heads.heads / self.heads.kv_heads) as u32
        }
        fn queries(&self, sequence: usize) -> u32 {
            self.query_start[sequence + 1] - self.query_start[sequence]
        }
    }

    fn cases() -> impl Strategy<Value = Case> {
        let heads = prop::sample::select(vec![(9, 3), (32, 8), (16, 1), (14, 2), (8, 8), (71, 1)]);
        let dims = prop::sample::select(vec![64, 80, 96, 128, 256]);
        let queries = prop_oneof![Just(0u32), Just(1), 1u32..20, 1u32..700];
        let sequence = (queries, prop_oneof![0u32..40, 0u32..9000]);
        let windows = prop::sample::select(vec![0u32, 1, 100, 4096]);
        let switches = any::<(bool, bool)>();
        (heads, dims, windows, switches, prop::collection::vec(sequence, 0..70)).prop_map(
            |((heads, kv_heads), head_dim, window, (one_order, hopper), sequences)| {
                let mut query_start = vec![0];
                query_start.extend(sequences.iter().scan(0, |sum, &(queries, _)| {
                    *sum += queries;
                    Some(*sum)
                }));
                Case {
                    heads: HeadShape { heads, kv_heads, head_dim },
                    tuning: Tuning {
                        multiprocessors: 132,
                        one_order,
                        window,
                        kv: KvDtype::Bf16,
                        activations: ActivationDtype::Bf16,
                        hopper,
                        shared_bytes: 232_448,
                    },
                    query_start,
                    context_len: sequences.iter().map(|&(queries, before)| before + queries).collect(),
                }
            },
        )
    }

    /// The decode items of a sequence, checked to cover what its rows see, in order.
    fn check_decode(case: &Case, items: &[&[u32; 8]], sequence: usize) {
        let context = case.context_len[sequence];
        let mut at = case.tuning.window_start(context - case.queries(sequence));
        for (split, item) in items.iter().enumerate() {
            assert_eq!(item[1..4], [case.query_start[sequence], case.queries(sequence), context]);
            assert_eq!((item[4], item[6]), (at, (items.len() << 16 | split) as u32));
            assert!(item[5] > at);
            assert_eq!(item[7], items[0][7]);
            at = item[5];
        }
        assert_eq!(at, context);
    }

    /// The prefill items of a sequence, checked to cover its rows and the positions that they see.
    fn check_prefill(case: &Case, tile: u32, items: &[&[u32; 8]], sequence: usize) {
        let (queries, context) = (case.queries(sequence), case.context_len[sequence]);
        let mut items = items.to_vec();
        items.sort_by_key(|item| item[4]);
        let all = queries * case.group();
        assert_eq!(items.len() as u32, all.div_ceil(tile));
        for (index, item) in (0..).zip(items) {
            assert_eq!(item[1..4], [case.query_start[sequence], queries, context]);
            assert_eq!(item[4], index * tile);
            let last = (item[4] + tile).min(all) - 1;
            let position = |row: u32| context - queries + row / case.group();
            assert_eq!(item[5], case.tuning.window_start(position(item[4])));
            assert_eq!(item[6], position(last) + 1);
        }
    }

    proptest! {
        #[test]
        fn every_row_is_computed_once(case in cases()) {
            let plan = case.plan();
            let of = |items: &'_ [[u32; 8]], sequence: usize| -> Vec<[u32; 8]> {
                items.iter().filter(|item| item[0] as usize == sequence).copied().collect()
            };
            for sequence in 0..case.context_len.len() {
                let (decode, prefill) = (of(&plan.decode_items, sequence), of(&plan.prefill_items, sequence));
                let queries = case.queries(sequence);
                let decodes = queries > 0 && case.tuning.is_decode(queries, case.group() as usize);
                prop_assert_eq!(!decode.is_empty(), decodes);
                prop_assert_eq!(!prefill.is_empty(), queries > 0 && !decodes);
                if decodes {
                    check_decode(&case, &decode.iter().collect::<Vec<_>>(), sequence);
                } else if queries > 0 {
                    check_prefill(&case, plan.prefill_rows, &prefill.iter().collect::<Vec<_>>(), sequence);
                }
            }
        }

        #[test]
        fn plans_keep_to_their_bounds(case in cases()) {
            let plan = case.plan();
            let sequences = case.context_len.len();
            let rows = *case.query_start.last().unwrap() as usize;
            let bounds = PlanBounds::new(case.heads, &case.tuning);
            prop_assert!(plan.decode_items.len() <= bounds.decode_items(sequences));
            prop_assert!(plan.partial_rows() <= bounds.partial_rows());
            prop_assert!(8 * plan.prefill_items.len() <= bounds.prefill_item_words(rows, sequences));
            prop_assert_eq!(plan.decode_teams.len(), case.tuning.teams(case.heads) + 1);
            prop_assert!(plan.decode_teams.is_sorted());
            prop_assert_eq!(plan.decode_teams[0], 0);
            prop_assert_eq!(*plan.decode_teams.last().unwrap() as usize, plan.decode_items.len());
            let lengths: Vec<u32> = plan.prefill_items.iter().map(|item| (item[6] - item[5]) / ROUND).collect();
            prop_assert!(lengths.is_sorted_by(|a, b| a >= b));
        }
    }

    /// Positions, with the cost of items, of the busiest team, over an equal share.
    fn imbalance(contexts: &[u32]) -> f64 {
        let heads = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
        let tuning = Tuning {
            multiprocessors: 132,
            one_order: false,
            window: 0,
            kv: KvDtype::Bf16,
            activations: ActivationDtype::Bf16,
            hopper: true,
            shared_bytes: 232_448,
        };
        let query_start: Vec<u32> = (0..=contexts.len() as u32).collect();
        let mut plan = AttentionPlan::default();
        plan.update(&query_start, contexts, heads, &tuning);
        let cost = |item: &[u32; 8]| u64::from(item[5] - item[4]) + ITEM_COST;
        let team =
            |range: &[u32]| plan.decode_items[range[0] as usize..range[1] as usize].iter().map(cost).sum();
        let busiest: u64 = plan.decode_teams.windows(2).map(team).max().unwrap();
        let total: u64 = plan.decode_items.iter().map(cost).sum();
        busiest as f64 * tuning.teams(heads) as f64 / total as f64
    }

    #[test]
    fn two_ctas_run_together_where_shared_memory_has_room() {
        let beside = |shared_bytes: u32, head_dim, kv| {
            let heads = HeadShape { heads: 8, kv_heads: 8, head_dim };
            let tuning = Tuning {
                multiprocessors: 80,
                one_order: false,
                window: 0,
                kv,
                activations: ActivationDtype::Bf16,
                hopper: false,
                shared_bytes,
            };
            tuning.teams(heads) / 10
        };
        for (kv, on_ada) in [(KvDtype::Bf16, [2, 1, 1, 1, 1]), (KvDtype::Fp8, [2, 2, 2, 2, 1])] {
            for (head_dim, on_ada) in [64, 80, 96, 128, 256].into_iter().zip(on_ada) {
                let on_others = if head_dim == 256 { 1 } else { 2 };
                let found = [227, 163, 99].map(|kilobytes| beside(kilobytes << 10, head_dim, kv));
                assert_eq!(found, [on_others, on_others, on_ada], "heads of {head_dim}, KV of {kv:?}");
            }
        }
    }

    #[test]
    fn teams_have_like_shares() {
        for (sequences, context) in [(1, 8192), (8, 4096), (32, 2048), (128, 1024), (256, 1024), (64, 8192)] {
            let imbalance = imbalance(&vec![context; sequences]);
            assert!(imbalance < 1.1, "{sequences} x {context}: {imbalance}");
        }
        let uneven: Vec<u32> = (0..200).map(|i| 1 + i * i % 977 * 7).collect();
        assert!(imbalance(&uneven) < 1.05, "{}", imbalance(&uneven));
    }
}
