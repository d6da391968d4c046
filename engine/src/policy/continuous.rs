//! Continuous batching: what runs is decided anew in every step (Yu et al., Orca, OSDI'22; Kwon et al., SOSP'23).

use super::{Plan, SchedulerPolicy, SchedulerView, SeqView};
use crate::kv::KvTrial;

/// Iteration-level batching, first come first served.
///
/// In each step every decode comes first; prefill takes what the token budget leaves, oldest first, split where it
/// ends. When a decode finds no KV memory, the sequence that arrived last is preempted, and recomputed later. A
/// waiting request is admitted only when all its known tokens fit and a small share of the memory stays free for the
/// others' growth, and never past one that arrived before it. The oldest sequence is never preempted for another,
/// and one alone fits by the mechanism's rules, so there is always progress.
#[derive(Debug, Clone)]
pub struct Continuous {
    watermark: f64,
}

impl Continuous {
    /// Keeps `watermark` (a share, 0 to below 1) of growing KV memory free when it admits.
    pub fn new(watermark: f64) -> Self {
        Self { watermark }
    }
}

impl SchedulerPolicy for Continuous {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        let mut kv = view.kv_trial();
        let mut budget = view.token_budget();
        let alive = decodes(view, &mut kv, &mut budget, plan);
        prefills(view, alive, &mut budget, plan);
        if plan.preempt.is_empty() {
            let spare = spare_slots(&kv, self.watermark);
            admissions(view, &mut kv, spare, &mut budget, plan, |_, _| true);
        }
        proposals(view, (0..alive).map(|index| view.running(index)), &mut kv, &mut budget, plan);
    }
}

/// Slots that stay free when requests are admitted: a share of memory that grows.
pub(super) fn spare_slots(kv: &KvTrial, watermark: f64) -> u32 {
    if kv.grows() { (f64::from(kv.total_slots()) * watermark) as u32 } else { 0 }
}

/// Plans a token for every sequence with one pending, oldest first, and preempts from the other end when memory is
/// short. Returns how many of the running sequences are left.
pub(super) fn decodes(
    view: &SchedulerView<'_>,
    kv: &mut KvTrial,
    budget: &mut u32,
    plan: &mut Plan,
) -> usize {
    let mut alive = view.running_len();
    let mut next = 0;
    while next < alive && *budget > 0 {
        let sequence = view.running(next);
        next += 1;
        if sequence.pending() != 1 {
            continue;
        }
        while !kv.grow(&sequence, sequence.len) {
            alive -= 1;
            let victim = view.running(alive);
            plan.preempt.push(victim.key);
            kv.release(&victim);
            if victim.key == sequence.key {
                return alive;
            }
        }
        plan.run.push((sequence.key, 1));
        *budget -= 1;
    }
    alive
}

/// Adds proposals to the decodes that the plan begins with, with the rows and the memory that nothing else takes: none
/// where memory was short. `alive` are the running sequences in the order in which the decodes were planned.
pub(super) fn proposals(
    view: &SchedulerView<'_>,
    alive: impl Iterator<Item = SeqView>,
    kv: &mut KvTrial,
    budget: &mut u32,
    plan: &mut Plan,
) {
    if !view.speculates || !plan.preempt.is_empty() {
        return;
    }
    let decodes = alive.filter(|sequence| sequence.pending() == 1);
    for (sequence, (_, tokens)) in decodes.zip(&mut plan.run) {
        let drafted = sequence.drafted.min(*budget);
        if drafted > 0 && kv.grow_further(&sequence, sequence.len, sequence.len + drafted) {
            *tokens += drafted;
            *budget -= drafted;
        }
    }
}

/// Plans chunks of the prefills under way. Their memory was taken at admission.
pub(super) fn prefills(view: &SchedulerView<'_>, alive: usize, budget: &mut u32, plan: &mut Plan) {
    if plan.run.len() == alive {
        // All of them decode.
        return;
    }
    for index in 0..alive {
        if *budget == 0 {
            return;
        }
        let sequence = view.running(index);
        if sequence.pending() > 1 {
            let tokens = sequence.pending().min(*budget);
            plan.run.push((sequence.key, tokens));
            *budget -= tokens;
        }
    }
}

/// Admits waiting requests in order while rows, places and memory last, and `fits` takes their pending tokens in the rows
/// that are left.
pub(super) fn admissions(
    view: &SchedulerView<'_>,
    kv: &mut KvTrial,
    spare: u32,
    budget: &mut u32,
    plan: &mut Plan,
    fits: impl Fn(u32, u32) -> bool,
) {
    for (running, sequence) in (view.running_len()..).zip(view.waiting()) {
        // With nothing else to grow, a request may take all there is.
        let spare = if running == 0 { 0 } else { spare };
        if *budget == 0 || running == view.max_running() || !fits(sequence.pending(), *budget) {
            return;
        }
        if !kv.admit(&sequence, sequence.len, spare) {
            return;
        }
        let tokens = sequence.pending().min(*budget);
        plan.admit.push(sequence.key);
        plan.run.push((sequence.key, tokens));
        *budget -= tokens;
    }
}
