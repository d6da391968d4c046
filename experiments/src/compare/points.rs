//! Values that two runs have at the same rates with the same seeds, and what the new run has lost of them.

use std::collections::{BTreeMap, BTreeSet};

use super::{CompareOptions, Line, Lost, Subject, Verdict, Ways, verdict};
use crate::metrics::Metric;
use crate::run_data::{Group, RunData};
use crate::stats::RatioEstimate;

/// Two runs of one panel.
pub(super) struct Points<'a> {
    /// The old one and the new one.
    pub(super) runs: [&'a RunData; 2],
    pub(super) panel: &'a str,
    /// The system that figures are divided by; none where they are compared themselves.
    pub(super) reference: Option<&'a String>,
    pub(super) ways: Ways,
    pub(super) options: CompareOptions,
}

/// What became of the places that a system was steady at.
#[derive(Default)]
pub(super) struct Places {
    pub(super) lost: Vec<Lost>,
    /// Places that were not steady in the old run.
    pub(super) unsteady_before: usize,
}

/// Values by seed and bits of the rate.
type Values = BTreeMap<(u64, u64), f64>;

/// How a system was at a rate.
enum State {
    Steady,
    Unsteady(String),
    NotRun,
}

/// A growing queue has no value that a second run would have again, unfinished requests have lower bounds only, and without
/// those that were rejected or failed the load is another.
fn state(group: &Group<'_>) -> State {
    let unfinished = group.censored();
    match group.cells.iter().any(|cell| cell.window.is_some()) {
        _ if group.cells.is_empty() => State::NotRun,
        _ if group.skipped() => State::Unsteady("left out".into()),
        false => State::Unsteady("void".into()),
        true if group.saturated() => State::Unsteady("saturated".into()),
        true if group.loses() => {
            State::Unsteady(format!("with {} rejected or failed requests", group.lost()))
        }
        true if unfinished > 0 => State::Unsteady(format!("with {unfinished} unfinished requests")),
        true => State::Steady,
    }
}

impl Points<'_> {
    /// The rates that both runs have.
    fn rates(&self) -> Vec<f64> {
        let [old, new] = self.runs.map(|run| run.rates(self.panel));
        old.iter().copied().filter(|rate| new.contains(rate)).collect()
    }

    fn state(&self, run: &RunData, system: &str, rate: f64) -> State {
        state(&run.at(self.panel, system, rate))
    }

    /// Where a system was steady in the old run and is not in the new one.
    pub(super) fn places(&self, system: &str) -> Places {
        let mut places = Places::default();
        for rate in self.rates() {
            let [before, after] = self.runs.map(|run| self.state(run, system, rate));
            let (what, fails) = match (before, after) {
                (State::NotRun, _) => continue,
                (State::Unsteady(_), _) => {
                    places.unsteady_before += 1;
                    continue;
                }
                (State::Steady, State::Steady) => match self.seeds_gone(system, rate) {
                    0 => continue,
                    seeds => (format!("void or not run with {seeds} of its seeds"), false),
                },
                (State::Steady, State::NotRun) => ("not run".into(), false),
                (State::Steady, State::Unsteady(what)) => (what, self.ways.strict),
            };
            let what = format!("{system} in {} at {rate} requests/s was steady and is {what}", self.panel);
            places.lost.push(Lost { metric: None, what, fails });
        }
        places
    }

    /// Seeds of both runs that only the old one has a cell of.
    fn seeds_gone(&self, system: &str, rate: f64) -> usize {
        let [old, new] = self.runs.map(|run| {
            let group = run.at(self.panel, system, rate);
            let ran = group.cells.iter().filter(|cell| cell.window.is_some());
            ran.map(|cell| cell.entry.key.seed).collect::<BTreeSet<u64>>()
        });
        let both = &self.runs[1].manifest.seeds;
        old.difference(&new).filter(|seed| both.contains(seed)).count()
    }

    /// A metric's values where a system, and the one that it is divided by, are steady.
    fn values(&self, run: &RunData, system: &str, metric: Metric) -> Values {
        let mut found = Values::new();
        for rate in self.rates() {
            let systems = [Some(system), self.reference.map(String::as_str)];
            let steady = |system: &str| matches!(self.state(run, system, rate), State::Steady);
            if !systems.into_iter().flatten().all(steady) {
                continue;
            }
            let divisors = self.reference.map(|other| run.at(self.panel, other, rate).by_seed(metric));
            for (seed, value) in run.at(self.panel, system, rate).by_seed(metric) {
                let divisor = divisors.as_ref().map_or(Some(1.0), |divisors| divisors.get(&seed).copied());
                let divisor = divisor.filter(|divisor| *divisor > 0.0 && divisor.is_finite());
                if let Some(divisor) = divisor.filter(|_| value.is_finite()) {
                    found.insert((seed, rate.to_bits()), value / divisor);
                }
            }
        }
        found
    }

    /// Rates at which what a system is divided by is zero with some seed: over the others, the ratio would be of those alone.
    fn without_divisor(&self, run: &RunData, metric: Metric) -> BTreeSet<u64> {
        let Some(reference) = self.reference else { return BTreeSet::new() };
        let zero = |rate: &f64| {
            matches!(self.state(run, reference, *rate), State::Steady)
                && run.at(self.panel, reference, *rate).by_seed(metric).values().any(|value| *value <= 0.0)
        };
        self.rates().into_iter().filter(zero).map(f64::to_bits).collect()
    }

    /// Whether the new run has cells of a system and of the one that it is divided by.
    fn ran(&self, system: &str, seed: u64, rate: f64) -> bool {
        let ran = |system: &str| {
            let group = self.runs[1].at(self.panel, system, rate);
            group.cells.iter().any(|cell| cell.entry.key.seed == seed)
        };
        ran(system) && self.reference.is_none_or(|other| ran(other))
    }

    /// A metric of a system over all rates and seeds, and what of it could not be compared.
    pub(super) fn line(&self, system: &str, metric: Metric) -> (Option<Line>, Vec<Lost>) {
        let [mut before, mut after] = self.runs.map(|run| self.values(run, system, metric));
        let zero = self.runs.map(|run| self.without_divisor(run, metric));
        let mut lost = Vec::new();
        for rate in zero[0].union(&zero[1]) {
            before.retain(|(_, at), _| at != rate);
            after.retain(|(_, at), _| at != rate);
            let when = match [&zero[0], &zero[1]].map(|zero| zero.contains(rate)) {
                // As it was: a metric that does not apply there.
                [true, true] => continue,
                [_, true] => "the new run",
                [_, false] => "the old run",
            };
            let what = format!(
                "{} at {} requests/s: there is no ratio where the divisor is 0, as with a seed of {when}",
                self.named(system, metric),
                f64::from_bits(*rate)
            );
            lost.push(Lost { metric: Some(metric), what, fails: when == "the new run" });
        }
        // By rate: old and new values, and the seeds that they are of.
        let mut pairs: BTreeMap<u64, Vec<(u64, f64, f64)>> = BTreeMap::new();
        for (&(seed, rate), &old) in &before {
            if let Some(&new) = after.get(&(seed, rate)) {
                pairs.entry(rate).or_default().push((seed, old, new));
            }
        }
        let mut rates = 0;
        // By seed: logarithms of new over old, one a rate.
        let mut logs: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (rate, pairs) in &pairs {
            if pairs.iter().all(|(_, old, new)| *old > 0.0 && *new > 0.0) {
                rates += 1;
                for (seed, old, new) in pairs {
                    logs.entry(*seed).or_default().push((new / old).ln());
                }
            } else {
                lost.extend(self.with_a_zero(system, metric, f64::from_bits(*rate), pairs));
            }
        }
        let wanted = before.keys().any(|&(seed, rate)| self.ran(system, seed, f64::from_bits(rate)));
        if pairs.is_empty() && wanted {
            let what = format!("{}: nothing that was steady is left to compare", self.named(system, metric));
            lost.push(Lost { metric: Some(metric), what, fails: true });
        }
        let means: Vec<(f64, f64)> =
            logs.values().map(|l| ((l.iter().sum::<f64>() / l.len() as f64).exp(), 1.0)).collect();
        let line = RatioEstimate::paired(&means).map(|ratio| Line {
            panel: self.panel.to_string(),
            system: system.to_string(),
            metric,
            subject: self.reference.map_or(Subject::Absolute, |r| Subject::RelativeTo(r.clone())),
            ratio,
            rates,
            verdict: verdict(ratio, metric.better(), self.options.max_regression),
        });
        (line, lost)
    }

    /// What a zero leaves: no ratio a seed, but means that can be told apart. Nothing where all values are as they were.
    fn with_a_zero(
        &self,
        system: &str,
        metric: Metric,
        rate: f64,
        pairs: &[(u64, f64, f64)],
    ) -> Option<Lost> {
        if pairs.iter().all(|(_, old, new)| old == new) {
            return None;
        }
        let mean = |sum: f64| sum / pairs.len() as f64;
        let old = mean(pairs.iter().map(|pair| pair.1).sum());
        let new = mean(pairs.iter().map(|pair| pair.2).sum());
        let ratio = RatioEstimate { ratio: new / old, interval: None, seeds: pairs.len() };
        let fails = verdict(ratio, metric.better(), self.options.max_regression) == Verdict::Regression;
        let what = format!("{} at {rate} requests/s: {old:.3} -> {new:.3}", self.named(system, metric));
        Some(Lost { metric: Some(metric), what, fails })
    }

    fn named(&self, system: &str, metric: Metric) -> String {
        let over = self.reference.map_or(String::new(), |other| format!(" / {other}"));
        format!("{} of {system}{over} in {}", metric.name(), self.panel)
    }
}
