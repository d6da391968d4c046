//! How one call's work is cut into tasks. The cut affects time alone: results do not depend on it.

use super::span::SPAN;
use super::task::{Item, STREAMED_QUERIES};
use crate::{AttentionBatch, HeadShape};

/// Queries of a block of rows: enough that reading keys and values costs little beside using them.
const BLOCK_QUERIES: usize = 48;
/// Tasks for each thread that are enough to balance.
const TASKS_PER_THREAD: usize = 4;
/// Products (query head x position x element) below which a parallel region costs more than it saves.
const INLINE_PRODUCTS: usize = 64 << 10;
/// Elements of a slot that are streamed together: more would not stay in the cache between being asked for and used.
const STREAMED_ELEMENTS: usize = 2048;

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
    /// Rows of one sequence, with all KV heads.
    blocks: Vec<Item>,
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
        let group = heads.heads / heads.kv_heads;
        self.cut_rows(heads, batch);
        let wanted = if threads == 1 || self.inline() { 1 } else { TASKS_PER_THREAD * threads };
        // Heads are kept together, and a sequence whole, where there are tasks enough.
        let mut together = (STREAMED_ELEMENTS / heads.head_dim).max(1);
        let heads_of = |block: &Item, together: usize| {
            if block.rows * group <= STREAMED_QUERIES { together.min(heads.kv_heads) } else { 1 }
        };
        let tasks = |block: &Item, together| heads.kv_heads.div_ceil(heads_of(block, together));
        let whole: usize = self.blocks.iter().map(|block| tasks(block, together)).sum();
        let by_span: usize =
            self.blocks.iter().map(|block| tasks(block, together) * block.spans().len()).sum();
        let split = whole < wanted && by_span > whole;
        if whole.max(if split { by_span } else { 0 }) < wanted {
            together = 1;
        }
        let mut blocks = std::mem::take(&mut self.blocks);
        for block in blocks.drain(..) {
            let at_once = heads_of(&block, together);
            if split {
                self.add_spans(block, group, at_once);
            } else {
                self.items.extend((0..block.heads).step_by(at_once).map(|head| part(block, head, at_once)));
            }
        }
        self.blocks = blocks;
        // The longest first, so that none starts last.
        self.items.sort_unstable_by_key(|item| std::cmp::Reverse(cost(item)));
    }

    fn cut_rows(&mut self, heads: HeadShape, batch: &AttentionBatch<'_>) {
        let group = heads.heads / heads.kv_heads;
        let (head_dim, block_rows) = (heads.head_dim, (BLOCK_QUERIES / group).max(1));
        let window = batch.window.map_or(usize::MAX, |window| window as usize);
        self.products = 0;
        for (sequence, range) in batch.query_start.windows(2).enumerate() {
            let (start, end) = (range[0] as usize, range[1] as usize);
            let before = batch.context_len[sequence] as usize - (end - start);
            for row in (start..end).step_by(block_rows) {
                let (rows, position) = ((end - row).min(block_rows), before + row - start);
                let heads = heads.kv_heads;
                let block = Item { sequence, row, position, rows, window, head: 0, heads, span: None };
                self.products += cost(&block) * group * head_dim;
                self.blocks.push(block);
            }
        }
    }

    /// Adds an item for each span of a block, and what it takes to merge them.
    fn add_spans(&mut self, block: Item, group: usize, at_once: usize) {
        let (first, spans, queries) = (self.partial_queries, block.spans(), block.rows * group);
        let at = |head: usize, span: usize| first + ((span - spans.start) * block.heads + head) * queries;
        for span in spans.clone() {
            let heads = (0..block.heads).step_by(at_once);
            self.items.extend(
                heads.map(|head| Item { span: Some((span, at(head, span))), ..part(block, head, at_once) }),
            );
        }
        self.partial_queries += block.heads * spans.len() * queries;
        for r in 0..block.rows {
            let seen = block.spans_of(r);
            self.merges.push(Merge { row: block.row + r, list: self.partials.len(), spans: seen.len() });
            for head in 0..block.heads {
                self.partials.extend(seen.clone().map(|span| at(head, span) + r * group));
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

/// The heads of `block` from `head` on, `at_once` or as many as are left.
fn part(block: Item, head: usize, at_once: usize) -> Item {
    Item { head, heads: at_once.min(block.heads - head), ..block }
}

/// Rows times heads times the positions that a row sees, about.
fn cost(item: &Item) -> usize {
    let whole = (item.position + item.rows.div_ceil(2)).min(item.window);
    let positions = item.span.map_or(whole, |(span, _)| (item.position + item.rows - span * SPAN).min(SPAN));
    item.rows * item.heads * positions
}
