//! A policy that plans at random whatever its trial of the KV memory allows: what the mechanism must bear.

use std::time::Instant;

use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView, SeqView};

/// Preempts, admits out of order, runs chunks of any size and pads, by a linear congruential generator.
pub(crate) struct Random {
    state: u64,
    /// Preemptions left to make at will.
    preemptions: u32,
    /// Whether the last plan ran nothing though something was running: memory is short, and the oldest must get it.
    stuck: bool,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed, preemptions: 20, stuck: false }
    }

    fn below(&mut self, bound: u32) -> u32 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % u64::from(bound)) as u32
    }
}

impl SchedulerPolicy for Random {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        plan.wait_until = Some(Instant::now());
        let mut kv = view.kv_trial();
        let mut stay: Vec<SeqView> = (0..view.running_len()).map(|index| view.running(index)).collect();
        while stay.len() > 1 && (self.stuck || (self.preemptions > 0 && self.below(12) == 0)) {
            let index = if self.stuck { stay.len() - 1 } else { self.below(stay.len() as u32) as usize };
            let victim = stay.remove(index);
            kv.release(&victim);
            plan.preempt.push(victim.key);
            self.preemptions = self.preemptions.saturating_sub(1);
        }
        if std::mem::take(&mut self.stuck) {
            // One that is idle waits for what was preempted.
            let oldest = stay.iter().filter(|oldest| oldest.pending() > 0);
            return plan.run.extend(oldest.map(|oldest| (oldest.key, 1)));
        }
        let mut waiting: Vec<SeqView> = view.waiting().collect();
        while !waiting.is_empty() && stay.len() < view.max_running() {
            let sequence = waiting.swap_remove(self.below(waiting.len() as u32) as usize);
            if self.below(3) > 0 && kv.admit(&sequence, sequence.len, self.below(8)) {
                plan.admit.push(sequence.key);
                stay.push(sequence);
            }
        }
        stay.retain(|sequence| sequence.pending() > 0);
        let mut budget = view.token_budget();
        while !stay.is_empty() && budget > 0 {
            let sequence = stay.swap_remove(self.below(stay.len() as u32) as usize);
            let tokens = 1 + self.below((sequence.pending() + sequence.drafted).min(budget));
            let admitted = plan.admit.contains(&sequence.key);
            if self.below(4) > 0 && (admitted || kv.grow(&sequence, sequence.computed + tokens)) {
                plan.run.push((sequence.key, tokens));
                budget -= tokens;
            }
        }
        if !plan.run.is_empty() {
            plan.padding = self.below(budget + 1);
        }
        self.stuck = plan.run.is_empty() && view.running_len() > 0;
    }
}
