//! The figures of one cell: one system at one rate with one seed.

use quire_workloads::StepRecord;
use serde::{Deserialize, Serialize};

use super::classes::{ClassMetrics, by_class};
use super::request::{Ending, Observed, Slo};
use super::window::{Window, is_saturated, queue_growth};
use crate::stats::{Distribution, Sampler};

/// Figures over a stretch of a cell. Requests count by their intended arrival, tokens by their emission, steps by
/// the part of them that lies inside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellMetrics {
    /// The stretch.
    pub window: Window,
    /// Requests that arrived.
    pub requests: u64,
    /// Of these, finished.
    pub finished: u64,
    /// Not ended when the cell did.
    pub censored: u64,
    /// Refused.
    pub rejected: u64,
    /// Broken off by the system.
    pub failed: u64,
    /// Taken back by the client.
    pub cancelled: u64,
    /// Finished with fewer tokens than they were to have ([`Observed::cut`]).
    pub cut: u64,
    /// Finished with a single token, so that TPOT is undefined.
    pub single_token: u64,
    /// Seconds a token; censored requests count with their lower bounds.
    pub normalized_latency: Distribution,
    /// Time to first token; censored requests without a token count with their lower bounds.
    pub ttft: Distribution,
    /// Time per output token after the first; censored requests with a token count with their lower bounds.
    pub tpot: Distribution,
    /// Gaps between emissions; the open ones of censored requests count with their lower bounds.
    pub itl: Distribution,
    /// Gaps with the zeros of tokens that came together.
    pub itl_all_tokens: Distribution,
    /// Requests a second that met every limit; none without limits.
    pub goodput_rps: Option<f64>,
    /// Requests a second that finished.
    pub finished_rps: f64,
    /// Output tokens a second.
    pub throughput_tps: f64,
    /// By how many requests the queue (arrived, without a token) grew.
    pub queue_growth: f64,
    /// Whether it grew by so much that the system does not keep up.
    pub saturated: bool,
    /// Of the prompt tokens of finished requests, the share that was found in a cache; none without a finished request.
    pub cached_share: Option<f64>,
    /// Figures of each priority class, the best first; empty without classes.
    pub classes: Vec<ClassMetrics>,
    /// What steps tell; none for a system that does not report steps.
    pub steps: Option<StepMetrics>,
}

/// Share of a cell's requests, rejected or failed, above which the system counts as overloaded there: the others' latencies
/// are of a lighter load than the one that was offered.
pub const LOSS_SHARE: f64 = 0.01;

impl CellMetrics {
    /// Requests that were refused or broken off.
    pub fn lost(&self) -> u64 {
        self.rejected + self.failed
    }

    /// Whether these are too many for the latencies of the others to stand for the offered load.
    pub fn loses(&self) -> bool {
        self.lost() as f64 > LOSS_SHARE * self.requests as f64
    }

    /// Share of the requests that met every limit; those that did not finish did not. None without requests or limits.
    pub fn attainment(&self) -> Option<f64> {
        let met = (self.goodput_rps? * self.window.length()).round();
        (self.requests > 0).then(|| met / self.requests as f64)
    }
}

/// Means over time; a moment in which no step ran counts as nothing running and no KV in use. Shares are of all KV
/// slots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps that overlap the stretch.
    pub steps: u64,
    /// Sequences running.
    pub running: f64,
    /// Requests waiting.
    pub waiting: f64,
    /// Slots that hold a token.
    pub kv_used: f64,
    /// Slots kept for tokens to come.
    pub kv_reserved: f64,
    /// Slots that will never be filled.
    pub kv_internal: f64,
    /// Slots kept for reuse.
    pub kv_cached: f64,
    /// Free slots, over the time in which requests waited all the same. None in runs packed by older programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_unusable: Option<f64>,
    /// Of the slots given to sequences, the share that holds a token: averages of both over time, divided.
    pub kv_efficiency: Option<f64>,
    /// Of the slots that would hold a token if every sequence had its own, the share that sharing saves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_saved: Option<f64>,
    /// Share of time in which a step ran.
    pub busy: f64,
    /// Share of computed rows that were padding.
    pub padding: f64,
    /// Sequences preempted.
    pub preempted: u64,
    /// Tokens swapped out to host memory.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub swapped_out: u64,
    /// Tokens swapped in from there.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub swapped_in: u64,
    /// Tokens that were proposed and computed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub drafted: u64,
    /// Of the proposals that were looked at, the share that was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceptance: Option<f64>,
}

/// Computes the figures of `requests` and `steps` over `window`. `end_s` is when the cell ended.
pub fn cell_metrics(
    requests: &[Observed],
    steps: &[StepRecord],
    window: Window,
    slo: Option<&Slo>,
) -> CellMetrics {
    let inside: Vec<&Observed> = requests.iter().filter(|r| window.contains(r.intended_s)).collect();
    let count = |ending| inside.iter().filter(|r| r.ending == ending).count() as u64;
    let gaps = |all| {
        let mut sampler = Sampler::default();
        inside.iter().flat_map(|r| r.gaps(all)).for_each(|gap| sampler.add(gap));
        inside.iter().filter_map(|r| r.open_gap()).for_each(|gap| sampler.add_lower_bound(gap));
        sampler.finish()
    };
    let per_second = |n: f64| if window.length() > 0.0 { n / window.length() } else { 0.0 };
    let goodput = |requests: &[&Observed]| {
        slo.map(|slo| per_second(requests.iter().filter(|r| r.meets(slo)).count() as f64))
    };
    let emitted: u64 = requests
        .iter()
        .flat_map(|r| &r.emissions)
        .filter(|e| window.contains(e.at_s))
        .map(|e| u64::from(e.tokens))
        .sum();
    let ended_inside = |r: &&Observed| r.ending == Ending::Finished && window.contains(r.end_s);
    // In the queue from the intended arrival to the first token.
    let waits = requests.iter().map(|r| {
        let ended = if r.ending == Ending::Censored { f64::INFINITY } else { r.end_s };
        (r.intended_s, r.emissions.first().map_or(ended, |e| e.at_s))
    });
    let growth = queue_growth(waits, &window);
    let finished = || inside.iter().filter(|r| r.ending == Ending::Finished);
    let prompts: u64 = finished().map(|r| u64::from(r.prompt_tokens)).sum();
    let cached: u64 = finished().map(|r| u64::from(r.cached_tokens)).sum();
    CellMetrics {
        window,
        requests: inside.len() as u64,
        finished: count(Ending::Finished),
        censored: count(Ending::Censored),
        rejected: count(Ending::Rejected),
        failed: count(Ending::Failed),
        cancelled: count(Ending::Cancelled),
        cut: inside.iter().filter(|r| r.cut).count() as u64,
        single_token: inside.iter().filter(|r| r.e2e().is_some() && r.tokens() == 1).count() as u64,
        normalized_latency: normalized_latency(&inside),
        ttft: ttft(&inside),
        tpot: distribution(&inside, Observed::tpot, Observed::tpot_bound),
        itl: gaps(false),
        itl_all_tokens: gaps(true),
        goodput_rps: goodput(&inside),
        finished_rps: per_second(requests.iter().filter(ended_inside).count() as f64),
        throughput_tps: per_second(emitted as f64),
        queue_growth: growth,
        saturated: is_saturated(growth, inside.len() as u64),
        cached_share: (prompts > 0).then(|| cached as f64 / prompts as f64),
        classes: by_class(&inside, goodput),
        steps: step_metrics(steps, &window),
    }
}

/// Values of requests, and lower bounds of those that have none yet.
fn distribution(
    requests: &[&Observed],
    value: fn(&Observed) -> Option<f64>,
    bound: fn(&Observed) -> Option<f64>,
) -> Distribution {
    let mut sampler = Sampler::default();
    for request in requests {
        match (value(request), bound(request)) {
            (Some(value), _) => sampler.add(value),
            (None, Some(bound)) => sampler.add_lower_bound(bound),
            (None, None) => {}
        }
    }
    sampler.finish()
}

/// Seconds a token of `requests`.
pub(super) fn normalized_latency(requests: &[&Observed]) -> Distribution {
    distribution(requests, Observed::normalized_latency, Observed::normalized_latency_bound)
}

/// Times to first token of `requests`.
pub(super) fn ttft(requests: &[&Observed]) -> Distribution {
    distribution(requests, Observed::ttft, Observed::ttft_bound)
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Figures of `steps` over `window`; none without steps.
pub fn step_metrics(steps: &[StepRecord], window: &Window) -> Option<StepMetrics> {
    if steps.is_empty() || window.length() <= 0.0 {
        return None;
    }
    let mut sums = StepMetrics::default();
    let (mut rows, mut padding, mut given, mut unusable, mut shared) = (0u64, 0u64, 0.0, 0.0, 0.0);
    let (mut accepted, mut looked_at) = (0u64, 0u64);
    for step in steps {
        let lasted = step.schedule_s + step.execute_s + step.sample_s + step.commit_s;
        let seconds = window.overlap(step.start_s, step.start_s + lasted);
        if seconds <= 0.0 {
            continue;
        }
        let slots = step.kv_used + step.kv_reserved + step.kv_internal + step.kv_cached + step.kv_free;
        let share = |n: u64| if slots > 0 { seconds * n as f64 / slots as f64 } else { 0.0 };
        sums.steps += 1;
        sums.busy += seconds;
        sums.running += seconds * f64::from(step.running);
        sums.waiting += seconds * f64::from(step.waiting);
        sums.kv_used += share(step.kv_used);
        sums.kv_reserved += share(step.kv_reserved);
        sums.kv_internal += share(step.kv_internal);
        sums.kv_cached += share(step.kv_cached);
        shared += share(step.kv_shared);
        given += share(step.kv_used + step.kv_reserved + step.kv_internal);
        if step.waiting > 0 {
            unusable += share(step.kv_free);
        }
        sums.preempted += u64::from(step.preempted);
        sums.swapped_out += u64::from(step.swapped_out);
        sums.swapped_in += u64::from(step.swapped_in);
        sums.drafted += u64::from(step.drafted_tokens);
        accepted += u64::from(step.accepted_tokens);
        looked_at += u64::from(step.accepted_tokens) + u64::from(step.refused_drafts);
        padding += u64::from(step.padding_tokens);
        rows += u64::from(step.prefill_tokens)
            + u64::from(step.decode_tokens)
            + u64::from(step.drafted_tokens)
            + u64::from(step.padding_tokens);
    }
    let length = window.length();
    Some(StepMetrics {
        steps: sums.steps,
        running: sums.running / length,
        waiting: sums.waiting / length,
        kv_used: sums.kv_used / length,
        kv_reserved: sums.kv_reserved / length,
        kv_internal: sums.kv_internal / length,
        kv_cached: sums.kv_cached / length,
        kv_unusable: Some(unusable / length),
        kv_efficiency: (given > 0.0).then(|| sums.kv_used / given),
        kv_saved: (sums.kv_used > 0.0).then(|| shared / (sums.kv_used + shared)),
        busy: sums.busy / length,
        padding: if rows > 0 { padding as f64 / rows as f64 } else { 0.0 },
        preempted: sums.preempted,
        swapped_out: sums.swapped_out,
        swapped_in: sums.swapped_in,
        drafted: sums.drafted,
        acceptance: (looked_at > 0).then(|| accepted as f64 / looked_at as f64),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Metric;
    use super::super::request::Emission;
    use super::*;

    fn request(intended_s: f64, tokens: &[f64], ending: Ending, end_s: f64) -> Observed {
        let emissions = tokens.iter().map(|&at_s| Emission { at_s, tokens: 1 }).collect();
        Observed {
            intended_s,
            emissions,
            ending,
            cut: false,
            end_s,
            expected_tokens: 4,
            prompt_tokens: 10,
            cached_tokens: tokens.len() as u32,
            class: None,
            outputs: 1,
        }
    }

    #[test]
    fn a_window_by_hand() {
        let requests = [
            request(0.0, &[1.0, 2.0], Ending::Finished, 2.0), // before the window: only its tokens count
            request(1.0, &[2.0, 3.0, 4.0], Ending::Finished, 4.0), // ttft 1, tpot 1, normalized 1
            request(2.0, &[5.0], Ending::Finished, 5.0),      // ttft 3, tpot undefined, normalized 3
            request(3.0, &[], Ending::Censored, 11.0),        // ttft >= 8, normalized >= 8 / 4
            request(4.0, &[], Ending::Rejected, 4.0),
            request(6.0, &[7.0], Ending::Finished, 7.0), // after the window
        ];
        let window = Window { start_s: 1.0, end_s: 5.0 };
        let slo = Slo { ttft_s: 1.0, tpot_s: 1.0 };
        let m = cell_metrics(&requests, &[], window, Some(&slo));
        assert_eq!((m.requests, m.finished, m.censored, m.rejected, m.single_token), (4, 2, 1, 1, 1));
        assert_eq!(m.normalized_latency.mean, Some((1.0 + 3.0 + 2.0) / 3.0));
        assert_eq!((m.normalized_latency.count, m.normalized_latency.lower_bounds), (3, 1));
        assert_eq!(m.ttft.mean, Some((1.0 + 3.0 + 8.0) / 3.0));
        assert_eq!((m.tpot.mean, m.tpot.count), (Some(1.0), 1));
        assert_eq!((m.itl.count, m.itl.max), (2, Some(1.0)));
        assert_eq!(m.goodput_rps, Some(0.25));
        // Tokens at 1, 2, 2, 3, 4 lie in 1..5; the one at 5 does not.
        assert_eq!(m.throughput_tps, 5.0 / 4.0);
        assert_eq!(m.finished_rps, 2.0 / 4.0);
        // Of two finished requests of 10 prompt tokens, 3 and 1 were found.
        assert_eq!(m.cached_share, Some(4.0 / 20.0));
        assert!(m.classes.is_empty());
        assert_eq!(m.steps, None);
        assert_eq!(m.cut, 0);
        let cut = Observed { cut: true, ..requests[1].clone() };
        let m = cell_metrics(&[cut], &[], window, Some(&slo));
        assert_eq!((m.finished, m.cut, m.goodput_rps), (1, 1, Some(0.0)));
    }

    #[test]
    fn more_than_one_in_a_hundred_lost_is_overload() {
        let mut requests = vec![request(1.0, &[2.0], Ending::Finished, 2.0); 98];
        requests.push(request(1.0, &[], Ending::Rejected, 1.0));
        requests.push(request(1.0, &[], Ending::Cancelled, 1.0));
        let window = Window { start_s: 0.0, end_s: 5.0 };
        let m = cell_metrics(&requests, &[], window, None);
        assert_eq!((m.lost(), m.loses()), (1, false), "one in a hundred");
        requests.push(request(1.0, &[], Ending::Failed, 1.0));
        let m = cell_metrics(&requests, &[], window, None);
        assert_eq!((m.lost(), m.loses()), (2, true));
        assert!(!cell_metrics(&[], &[], window, None).loses());
    }

    #[test]
    fn what_unfinished_requests_have_of_tokens_is_a_lower_bound() {
        let requests = [
            request(1.0, &[2.0, 3.0, 4.0], Ending::Finished, 4.0), // tpot 1, gaps of 1
            request(1.0, &[2.0, 3.0], Ending::Censored, 11.0),     // tpot >= 9 / 3, gaps 1 and >= 8
            request(1.0, &[], Ending::Censored, 11.0),             // neither
        ];
        let m = cell_metrics(&requests, &[], Window { start_s: 0.0, end_s: 5.0 }, None);
        assert_eq!((m.tpot.count, m.tpot.lower_bounds, m.tpot.mean), (2, 1, Some(2.0)));
        assert_eq!((m.itl.count, m.itl.lower_bounds, m.itl.max), (4, 1, Some(8.0)));
        assert_eq!(m.itl.mean, Some((1.0 + 1.0 + 1.0 + 8.0) / 4.0));
        assert_eq!(m.itl_all_tokens.lower_bounds, 1);
        for metric in [Metric::Tpot, Metric::TpotP90, Metric::Itl, Metric::ItlMax] {
            assert!(metric.is_bound(&m), "{metric:?}");
        }
    }

    #[test]
    fn steps_are_weighted_by_their_time_in_the_window() {
        let step = |start_s, execute_s, running, kv_used, kv_reserved| StepRecord {
            start_s,
            execute_s,
            running,
            waiting: u32::from(running == 20),
            kv_used,
            kv_reserved,
            kv_free: 100 - kv_used - kv_reserved,
            decode_tokens: running,
            preempted: 1,
            swapped_out: running,
            swapped_in: running / 10,
            ..StepRecord::default()
        };
        // Half of the first step and all of the second lie inside; 5 of 10 seconds nothing runs.
        let steps = [step(-2.0, 4.0, 10, 50, 50), step(4.0, 3.0, 20, 20, 0)];
        let m = step_metrics(&steps, &Window { start_s: 0.0, end_s: 10.0 }).unwrap();
        assert_eq!(m.running, (2.0 * 10.0 + 3.0 * 20.0) / 10.0);
        assert!((m.kv_used - (2.0 * 0.5 + 3.0 * 0.2) / 10.0).abs() < 1e-12);
        assert!((m.kv_efficiency.unwrap() - 1.6 / 2.6).abs() < 1e-12);
        assert_eq!(m.busy, 0.5);
        assert_eq!((m.preempted, m.swapped_out, m.swapped_in), (2, 30, 3));
        // In the second step only, a request waits beside 80 free slots.
        assert!((m.kv_unusable.unwrap() - 3.0 * 0.8 / 10.0).abs() < 1e-12);
    }
}
