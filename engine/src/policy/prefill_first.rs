//! Iteration-level batching without chunked prefill: prompts go before decodes, in steps of their own.

use super::continuous::{admissions, decodes, prefills, proposals, spare_slots};
use super::{Plan, SchedulerPolicy, SchedulerView};

/// First come first served, whole prompts first, as the first vLLM had it (Kwon et al., SOSP'23); what Sarathi-Serve
/// (Agrawal et al., OSDI'24) compares chunked prefill with.
///
/// As long as a waiting prompt fits into a step and into memory, steps compute prompts alone and every decode waits: the
/// time to the first token is short and the time between tokens has a long tail. Otherwise all decodes go on, and
/// memory is taken and given as [`Continuous`](super::Continuous) does. A prompt longer than the token budget is computed
/// over several steps, before anything else: no step of these could take it whole.
///
/// Requests that end with their first token leave no place or memory taken: a stream of them that fills every step holds up all
/// decodes. [`Priority`](super::Priority) without chunks bounds that.
#[derive(Debug, Clone)]
pub struct PrefillFirst {
    watermark: f64,
}

impl PrefillFirst {
    /// Keeps `watermark` (a share, 0 to below 1) of growing KV memory free when it admits.
    pub fn new(watermark: f64) -> Self {
        Self { watermark }
    }
}

impl SchedulerPolicy for PrefillFirst {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        let mut kv = view.kv_trial();
        let mut budget = view.token_budget();
        prefills(view, view.running_len(), &mut budget, plan);
        let spare = spare_slots(&kv, self.watermark);
        let step = view.token_budget();
        admissions(view, &mut kv, spare, &mut budget, plan, |pending, left| fits_whole(pending, left, step));
        if plan.run.is_empty() {
            let alive = decodes(view, &mut kv, &mut budget, plan);
            proposals(view, (0..alive).map(|index| view.running(index)), &mut kv, &mut budget, plan);
        }
    }
}

/// Whether the rows `left` of a step's take a prompt whole; one that no step takes whole begins with a step of its own.
pub(super) fn fits_whole(pending: u32, left: u32, step: u32) -> bool {
    pending <= left || (left == step && pending > step)
}
