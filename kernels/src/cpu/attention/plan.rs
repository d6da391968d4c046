//! How one call's work is cut into tasks. The cut affects time alone: results do not depend on it.

use super::span::SPAN;
use super::task::Item;
use crate::{AttentionBatch, HeadShape};

/// Queries of a block of rows: enough that reading keys and values costs little beside using them.
const BLOCK_QUERIES: usize = 48;
/// Tasks for each thread that are enough to balance.
const TASKS_PER_THREAD: usize = 4;
/// Products (query head x position x element) below which a parallel region costs more than it saves.
const INLINE_PRODUCTS: usize = 64 << 10;

/// A row whose spans are computed apart and merged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Merge {
    pub(super) row: usize,
    /// Where the row's partial results are listed: spans of head 0, then of head 1...
    list: usize,
    spans: usize,
}

/// The tasks of a call; kept for its allocations.
#[derive(Debug, Default)]
pub(super) struct Plan {
    items: Vec<Item>,
    merges: Vec<Merge>,
    /// First partial query of each (row, head, span).
    partials: Vec<usize>,
    partial_queries: usize,
    products: usize,
}

impl Plan {
    /// Cuts the batch up.
    pub(super) fn make(&mut self, heads: HeadShape, batch: &AttentionBatch<'_>, threads: usize) {
        self.items.clear();
        self.merges.clear();
        self.partials.clear();
        self.partial_queries = 0;
        self.products = 0;
        let group = heads.heads / heads.kv_heads;
        let block_rows = (BLOCK_QUERIES / group).max(1);
        for (sequence, range) in batch.query_start.windows(2).enumerate() {
            let (start, end) = (range[0] as usize, range[1] as usize);
            let before = batch.context_len[sequence] as usize - (end - start);
            for row in (start..end).step_by(block_rows) {
                let (rows, position) = ((end - row).min(block_rows), before + row - start);
                let item = Item { sequence, row, position, rows, head: 0, heads: heads.kv_heads, span: None };
                self.products += cost(&item) * group * heads.head_dim;
                self.items.push(item);
            }
        }
        let wanted = if threads == 1 || self.inline() { 1 } else { TASKS_PER_THREAD * threads };
        let blocks = self.items.len();
        if blocks < 2 * wanted {
            self.split_heads();
        }
        if blocks * heads.kv_heads < wanted && self.items.iter().any(|item| item.spans() > 1) {
            self.split_spans(group, heads.kv_heads);
        }
        // The longest first, so that none starts last.
        self.items.sort_unstable_by_key(|item| std::cmp::Reverse(cost(item)));
    }

    /// One KV head an item.
    fn split_heads(&mut self) {
        for i in 0..self.items.len() {
            let heads = std::mem::replace(&mut self.items[i].heads, 1);
            let item = self.items[i];
            self.items.extend((1..heads).map(|head| Item { head, ..item }));
        }
    }

    /// One span an item; the items have one KV head each.
    fn split_spans(&mut self, group: usize, kv_heads: usize) {
        let whole = std::mem::take(&mut self.items);
        // `split_heads` leaves head 0 of every block first, then the others block by block.
        for item in whole.iter().take(whole.len() / kv_heads).copied() {
            let (first, spans) = (self.partial_queries, item.spans());
            let queries = item.rows * group;
            let at = |head: usize, span: usize| first + (head * spans + span) * queries;
            for head in 0..kv_heads {
                let span_item = |span| Item { head, span: Some((span, at(head, span))), ..item };
                self.items.extend((0..spans).map(span_item));
            }
            self.partial_queries += kv_heads * spans * queries;
            for r in 0..item.rows {
                let seen = (item.position + r + 1).div_ceil(SPAN);
                self.merges.push(Merge { row: item.row + r, list: self.partials.len(), spans: seen });
                for head in 0..kv_heads {
                    self.partials.extend((0..seen).map(|span| at(head, span) + r * group));
                }
            }
        }
    }

    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }
    pub(super) fn merges(&self) -> &[Merge] {
        &self.merges
    }
    /// The partial results of a row and KV head, in the order of spans.
    pub(super) fn partials_of(&self, merge: &Merge, head: usize) -> &[usize] {
        &self.partials[merge.list + head * merge.spans..][..merge.spans]
    }
    /// Queries with partial results.
    pub(super) fn partial_queries(&self) -> usize {
        self.partial_queries
    }
    /// Whether the whole is too little for a parallel region.
    pub(super) fn inline(&self) -> bool {
        self.products < INLINE_PRODUCTS
    }
}

/// Rows times heads times the positions that a row sees, about.
fn cost(item: &Item) -> usize {
    let whole = item.position + item.rows.div_ceil(2);
    let positions = item.span.map_or(whole, |(span, _)| (item.position + item.rows - span * SPAN).min(SPAN));
    item.rows * item.heads * positions
}
