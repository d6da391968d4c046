//! Priority classes: the better class first, by preempting worse ones where memory or places are short.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::continuous::{proposals, spare_slots};
use super::prefill_first::fits_whole;
use super::{Plan, SchedulerPolicy, SchedulerView, SeqView};
use crate::kv::KvTrial;

/// Continuous batching by classes of requests ([`Request::priority`](crate::Request::priority), 0 is the best).
///
/// Sequences rank by class and within one by arrival. In that order they get KV memory, and rows: decodes first, then
/// prefills. A waiting request preempts running ones of a worse class, the worst first, when it fits in no other way; one of
/// its own class never. A request gains a class for every `aging` it has been there, so that after as many as its class
/// says it ranks among the best by arrival and nothing that comes later passes it: starvation is bounded by that time and
/// what is before it then.
///
/// Without chunked prefill, steps compute prompts alone, whole and before any decode, as
/// [`PrefillFirst`](super::PrefillFirst) does (and where there is one class and no aging, exactly so): what Sarathi-Serve
/// (Agrawal et al., OSDI'24) compares chunks with. Prompts go in order of class, and the decodes of the best class wait for the
/// prompts of the worst too, until no place or memory is left for these. Requests that end with their first token leave none
/// taken, and a stream of them could fill every step: so decodes that have waited for `aging` get a step before further prompts.
#[derive(Debug, Clone)]
pub struct Priority {
    watermark: f64,
    aging: Duration,
    chunked: bool,
    /// Since when steps of prompts have held up decodes.
    held_since: Option<Instant>,
}

impl Priority {
    /// Keeps `watermark` (a share, 0 to below 1) of growing KV memory free when it admits; requests gain a class each
    /// `aging`, never when it is zero. Prompts are `chunked` beside decodes, or whole and before them until decodes have waited
    /// for `aging`.
    pub fn new(watermark: f64, aging: Duration, chunked: bool) -> Self {
        Self { watermark, aging, chunked, held_since: None }
    }

    /// Whether decodes have waited for prompts as long as they may.
    fn held_too_long(&self, now: Instant) -> bool {
        let waited = self.held_since.map(|since| now.saturating_duration_since(since));
        !self.aging.is_zero() && waited.is_some_and(|waited| waited >= self.aging)
    }

    /// The class now of a sequence of this priority that came then.
    fn class(&self, now: Instant, (priority, arrival): (u8, Instant)) -> u32 {
        let class = u32::from(priority);
        if self.aging.is_zero() {
            return class;
        }
        let there = now.saturating_duration_since(arrival);
        let gained = there.as_nanos() / self.aging.as_nanos();
        class.saturating_sub(u32::try_from(gained).unwrap_or(u32::MAX))
    }

    /// Running sequences with their classes, the best first and of a class by arrival.
    fn ranked(&self, view: &SchedulerView<'_>) -> Vec<(u32, SeqView)> {
        let running = (0..view.running_len()).map(|index| view.running(index));
        let class = |sequence: &SeqView| self.class(view.now(), (sequence.priority, sequence.arrival));
        let mut ranked: Vec<_> = running.map(|sequence| (class(&sequence), sequence)).collect();
        ranked.sort_by_key(|&(class, _)| class);
        ranked
    }

    /// Admits waiting requests in order, as long as the next one fits, if need be in the place of worse ones.
    fn admit(
        &self,
        view: &SchedulerView<'_>,
        alive: &mut Vec<(u32, SeqView)>,
        kv: &mut KvTrial,
        plan: &mut Plan,
    ) {
        let spare = spare_slots(kv, self.watermark);
        // The best first and of a class by arrival. Few are looked at, of a queue that may be long.
        let waiting = 0..view.waiting_len();
        let mut waiting: BinaryHeap<_> =
            waiting.map(|index| Reverse((self.class(view.now(), view.waiting_rank(index)), index))).collect();
        while let Some(Reverse((class, index))) = waiting.pop() {
            let sequence = view.waiting_at(index);
            // Memory is of no use to one for whom no row is left: decodes have theirs first, prefills those of its class too. In
            // a step of prompts they have all rows.
            let before = |&&(other, ref sequence): &&(u32, SeqView)| match self.chunked {
                true => sequence.pending() == 1 || other <= class,
                false => is_prompt(sequence) && other <= class,
            };
            let rows = alive
                .iter()
                .filter(before)
                .fold(view.token_budget(), |rows, (_, sequence)| rows.saturating_sub(sequence.pending()));
            if !self.chunked && !fits_whole(sequence.pending(), rows, view.token_budget()) {
                return;
            }
            // Those admitted just now rank before this one.
            let worse = alive.iter().rev().take_while(|&&(other, _)| other > class).count();
            let mut trial = kv.clone();
            let fits = (0..=worse).find(|&victims| {
                let left = alive.len() - victims;
                if victims > 0 {
                    trial.release(&alive[left].1);
                }
                let spare = if left == 0 { 0 } else { spare };
                left < view.max_running() && trial.admit(&sequence, sequence.len, spare)
            });
            let Some(victims) = fits else { return };
            if rows == 0 && victims == 0 {
                return;
            }
            for (_, victim) in alive.drain(alive.len() - victims..) {
                plan.preempt.push(victim.key);
            }
            *kv = trial;
            plan.admit.push(sequence.key);
            let place = alive.partition_point(|&(other, _)| other <= class);
            alive.insert(place, (class, sequence));
        }
    }
}

impl SchedulerPolicy for Priority {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        let mut kv = view.kv_trial();
        let mut budget = view.token_budget();
        let mut alive = self.ranked(view);
        if !self.chunked {
            if !(self.held_too_long(view.now()) && any_decodes(&alive)) {
                self.admit(view, &mut alive, &mut kv, plan);
                rows(alive.iter().filter(|(_, sequence)| is_prompt(sequence)), &mut budget, plan);
                if !plan.run.is_empty() {
                    let since = self.held_since.unwrap_or(view.now());
                    self.held_since = any_decodes(&alive).then_some(since);
                    return;
                }
            }
            self.held_since = None;
        }
        grow(view, &mut alive, &mut kv, plan);
        // Who was preempted for want of memory would come back at once.
        if self.chunked && plan.preempt.is_empty() {
            self.admit(view, &mut alive, &mut kv, plan);
        }
        let decodes = alive.iter().filter(|(_, sequence)| sequence.pending() == 1);
        rows(decodes, &mut budget, plan);
        // Beside decodes that waited too long no prompt goes on, unless memory was so short that none of them runs.
        if self.chunked || plan.run.is_empty() {
            rows(alive.iter().filter(|(_, sequence)| sequence.pending() > 1), &mut budget, plan);
        }
        proposals(view, alive.iter().map(|&(_, sequence)| sequence), &mut kv, &mut budget, plan);
    }
}

/// Whether steps of prompts compute it: it is in a prefill, or admitted just now, so that it holds no memory yet.
fn is_prompt(sequence: &SeqView) -> bool {
    sequence.pending() > 1 || sequence.kv_slots == 0
}

/// Whether any of these decodes.
fn any_decodes(alive: &[(u32, SeqView)]) -> bool {
    alive.iter().any(|(_, sequence)| sequence.pending() == 1 && !is_prompt(sequence))
}

/// Takes memory for the tokens of decodes that there are rows for, the best first; where it is short the worst is preempted.
/// That of prefills was taken at their admission.
fn grow(view: &SchedulerView<'_>, alive: &mut Vec<(u32, SeqView)>, kv: &mut KvTrial, plan: &mut Plan) {
    let mut rows = view.token_budget();
    let mut next = 0;
    while next < alive.len() && rows > 0 {
        let (_, sequence) = alive[next];
        next += 1;
        if sequence.pending() != 1 {
            continue;
        }
        while !kv.grow(&sequence, sequence.len) {
            let Some((_, victim)) = alive.pop() else { return };
            plan.preempt.push(victim.key);
            kv.release(&victim);
            if victim.key == sequence.key {
                return;
            }
        }
        rows -= 1;
    }
}

/// Gives out rows, the first ones first.
fn rows<'a>(sequences: impl Iterator<Item = &'a (u32, SeqView)>, budget: &mut u32, plan: &mut Plan) {
    for (_, sequence) in sequences {
        let tokens = sequence.pending().min(*budget);
        if tokens > 0 {
            plan.run.push((sequence.key, tokens));
            *budget -= tokens;
        }
    }
}
