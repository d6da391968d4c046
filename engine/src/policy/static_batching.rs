//! Static batching: requests start together and end together.

use std::time::Duration;

use super::{Plan, SchedulerPolicy, SchedulerView};

/// Waits for a batch or a timeout, pads, and runs all until the longest ends.
///
/// Prompts are padded on the left to the longest, so that all get their first token in the same step; a prefill
/// larger than the token budget is cut by columns. A sequence that ended goes on as one padding row a step. The
/// batch is limited by the memory that its sequences could need at their longest, for nothing is preempted.
#[derive(Debug, Clone)]
pub struct StaticBatching {
    batch_size: u32,
    timeout: Duration,
}

impl StaticBatching {
    /// Batches of up to `batch_size`; a smaller one starts when the oldest request waited for `timeout`.
    pub fn new(batch_size: u32, timeout: Duration) -> Self {
        Self { batch_size, timeout }
    }
}

impl SchedulerPolicy for StaticBatching {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        // Each member of the batch with its pending tokens; a member that ended has none.
        let batch: Vec<_> = if view.running_len() > 0 {
            (0..view.running_len()).map(|index| view.running(index)).map(|s| (s.key, s.pending())).collect()
        } else {
            self.form(view, plan)
        };
        let longest = batch.iter().map(|&(_, pending)| pending).max().unwrap_or(0);
        if longest == 0 {
            return;
        }
        // All columns are aligned at the right end: those this step leaves are the same for every sequence.
        let columns = (view.token_budget() / batch.len() as u32).max(1).min(longest);
        let left = longest - columns;
        for &(key, pending) in &batch {
            let tokens = pending.saturating_sub(left);
            if tokens > 0 {
                plan.run.push((key, tokens));
            }
            plan.padding += columns - tokens;
        }
    }

    fn ends_together(&self) -> bool {
        true
    }
}

impl StaticBatching {
    /// Admits the next batch if it is full or its oldest request waited long enough, else says when that will be.
    fn form(&self, view: &SchedulerView<'_>, plan: &mut Plan) -> Vec<(super::SeqKey, u32)> {
        let Some(oldest) = view.waiting().next() else { return Vec::new() };
        let size = (self.batch_size.min(view.token_budget()) as usize).min(view.max_running());
        // A timeout past the end of time never comes.
        let due = oldest.arrival.checked_add(self.timeout);
        if view.waiting_len() < size && due.is_none_or(|due| view.now() < due) {
            plan.wait_until = due;
            return Vec::new();
        }
        let mut kv = view.kv_trial();
        let mut batch = Vec::with_capacity(size.min(view.waiting_len()));
        for sequence in view.waiting().take(size) {
            if !kv.admit(&sequence, sequence.max_len.min(view.kv_largest()), 0) {
                break;
            }
            plan.admit.push(sequence.key);
            batch.push((sequence.key, sequence.pending()));
        }
        batch
    }
}
