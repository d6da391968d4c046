//! Comparison of two runs: what changed, with intervals, and whether it is worse than allowed.

mod counts;
mod points;
mod report;

use std::collections::BTreeSet;

use crate::manifest::Manifest;
use crate::metrics::{Better, Metric};
use crate::run_data::RunData;
use crate::stats::RatioEstimate;

/// How much may be worse, and what may be compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CompareOptions {
    /// By which share a figure may be worse.
    pub max_regression: f64,
    /// Compare absolute figures although the machines differ.
    pub absolute: bool,
}

/// What a line of the comparison is about.
#[derive(Debug, Clone, PartialEq)]
pub enum Subject {
    /// A figure itself.
    Absolute,
    /// A figure as a ratio to the same figure of another system of the same run.
    RelativeTo(String),
}

/// A line: one metric of one system in one panel, over the rates and seeds that both runs have.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Panel.
    pub panel: String,
    /// System.
    pub system: String,
    /// Metric.
    pub metric: Metric,
    /// What is compared.
    pub subject: Subject,
    /// New over old, geometric mean over rates, then over seeds.
    pub ratio: RatioEstimate,
    /// Rates that count.
    pub rates: usize,
    /// Whether it is worse than allowed.
    pub verdict: Verdict,
}

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Within what is allowed.
    Fine,
    /// Worse than allowed on average, but the interval includes no change.
    Undecided,
    /// Worse than allowed.
    Regression,
}

/// A count that should not depend on a machine and differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountChange {
    /// What is counted.
    pub what: String,
    /// In the old run.
    pub old: u64,
    /// In the new one.
    pub new: u64,
}

/// Figures of the old run that the new one has nothing beside to compare.
#[derive(Debug, Clone, PartialEq)]
pub struct Lost {
    /// The metric; none where it is all of them.
    pub metric: Option<Metric>,
    /// Whose, where, and what became of them.
    pub what: String,
    /// Whether that is worse than allowed, or leaves nothing to judge by.
    pub fails: bool,
}

/// A whole comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// What both runs have in common, line by line.
    pub lines: Vec<Line>,
    /// What the old run has and the new one lost.
    pub lost: Vec<Lost>,
    /// Deterministic counts that differ.
    pub counts: Vec<CountChange>,
    /// What was not compared and why, and what to keep in mind.
    pub remarks: Vec<String>,
    /// The options it was made with.
    pub options: CompareOptions,
}

/// Metrics of a comparison: those a user feels, and how well memory is used.
const METRICS: [Metric; 6] = [
    Metric::NormalizedLatency,
    Metric::Ttft,
    Metric::Tpot,
    Metric::Goodput,
    Metric::Throughput,
    Metric::KvEfficiency,
];

/// Compares `new` with `old`.
///
/// # Errors
/// With an explanation, when nothing in the runs can be compared.
pub fn compare(old: &RunData, new: &RunData, options: CompareOptions) -> Result<Comparison, String> {
    let same_machine = old.manifest.machine.same_as(&new.manifest.machine);
    let absolute = same_machine || options.absolute;
    let remark = (!absolute).then(|| {
        format!(
            "the machines differ ({}; {}): only ratios between systems of one run and counts are compared \
             (--absolute compares all)",
            old.manifest.machine.describe(),
            new.manifest.machine.describe()
        )
    });
    compare_by(old, new, options, Ways { absolute, strict: absolute }, remark)
}

/// The same by ratios between systems inside each run and by counts alone, also where the machine is the same.
///
/// # Errors
/// As for [`compare`].
pub fn compare_ratios(old: &RunData, new: &RunData, max_regression: f64) -> Result<Comparison, String> {
    let strict = old.manifest.machine.same_as(&new.manifest.machine);
    let options = CompareOptions { max_regression, absolute: false };
    compare_by(old, new, options, Ways { absolute: false, strict }, None)
}

/// How runs are compared.
#[derive(Debug, Clone, Copy)]
struct Ways {
    /// Figures themselves, in place of ratios between systems.
    absolute: bool,
    /// Whether a system must keep up wherever it did: on another machine it need not.
    strict: bool,
}

fn compare_by(
    old: &RunData,
    new: &RunData,
    options: CompareOptions,
    ways: Ways,
    remark: Option<String>,
) -> Result<Comparison, String> {
    let mut remarks = differences(&old.manifest, &new.manifest)?;
    remarks.extend(remark);
    let (mut lines, mut lost) = (Vec::new(), Vec::new());
    let mut unsteady = 0;
    for panel in common(old, new, |r| r.manifest.settings.selected_panels().map(|p| p.name.clone()).collect())
    {
        let systems =
            common(old, new, |r| r.manifest.settings.selected_systems().map(|s| s.name.clone()).collect());
        // Ratios are to the last system: in our figures, the one that the others are to be compared with.
        let reference = systems.last().filter(|_| !ways.absolute);
        let points = points::Points { runs: [old, new], panel: &panel, reference, ways, options };
        for system in &systems {
            let places = points.places(system);
            unsteady += places.unsteady_before;
            lost.extend(places.lost);
        }
        for system in systems.iter().filter(|s| Some(*s) != reference) {
            for metric in METRICS {
                let (line, missing) = points.line(system, metric);
                lines.extend(line);
                lost.extend(missing);
            }
        }
    }
    let counts = counts::changes(old, new);
    remarks.extend(counts::losses(old, new));
    if lines.is_empty() && counts.is_empty() && !lost.iter().any(|lost| lost.fails) {
        return Err(format!("the runs have no figures in common\n{}", remarks.join("\n")));
    }
    if lines.iter().any(|l| l.ratio.interval.is_none()) {
        remarks.push("one seed in common: no intervals, so noise and change cannot be told apart".into());
    }
    if unsteady > 0 {
        remarks.push(format!(
            "{unsteady} places (a system at a rate) are not compared, for in the old run they were saturated, left out, void, or \
             had unfinished, rejected or failed requests"
        ));
    }
    Ok(Comparison { lines, lost, counts, remarks, options })
}

impl Comparison {
    /// Whether anything is worse than allowed, or cannot be judged any more.
    pub fn regressed(&self) -> bool {
        let worse = self.lines.iter().any(|l| l.verdict == Verdict::Regression);
        worse || self.lost.iter().any(|lost| lost.fails) || !self.counts.is_empty()
    }
}

/// What differs in how the runs were made.
fn differences(old: &Manifest, new: &Manifest) -> Result<Vec<String>, String> {
    let mut remarks = Vec::new();
    if old.settings.name != new.settings.name {
        return Err(format!(
            "these are runs of different experiments: `{}` and `{}`",
            old.settings.name, new.settings.name
        ));
    }
    if old.settings_sha256 == new.settings_sha256 {
        return Ok(remarks);
    }
    remarks.push(format!(
        "the settings differ in {}: only rates and seeds that both have are compared",
        crate::store::differing_settings(old, new)
    ));
    Ok(remarks)
}

/// What both runs have, in the new run's order.
fn common(old: &RunData, new: &RunData, names: fn(&RunData) -> Vec<String>) -> Vec<String> {
    let known: BTreeSet<String> = names(old).into_iter().collect();
    names(new).into_iter().filter(|n| known.contains(n)).collect()
}

/// Worse than allowed: on average by more than the bound, and, where there is an interval, with all of it on the
/// worse side of no change.
pub(crate) fn verdict(ratio: RatioEstimate, better: Better, max_regression: f64) -> Verdict {
    // Of a throughput, too, 5 % worse is 0.95 times it.
    let worse = |r: f64| if better == Better::Lower { r } else { 2.0 - r };
    if worse(ratio.ratio) <= 1.0 + max_regression {
        return Verdict::Fine;
    }
    match ratio.interval {
        Some((low, high)) if worse(low).min(worse(high)) <= 1.0 => Verdict::Undecided,
        _ => Verdict::Regression,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(ratio: f64, interval: Option<(f64, f64)>) -> RatioEstimate {
        RatioEstimate { ratio, interval, seeds: 2 }
    }

    #[test]
    fn a_regression_is_beyond_the_bound_and_beyond_noise() {
        let v = |r, i, b| verdict(ratio(r, i), b, 0.05);
        assert_eq!(v(1.04, None, Better::Lower), Verdict::Fine);
        assert_eq!(v(1.06, None, Better::Lower), Verdict::Regression);
        assert_eq!(v(1.06, Some((0.98, 1.15)), Better::Lower), Verdict::Undecided);
        assert_eq!(v(1.06, Some((1.01, 1.11)), Better::Lower), Verdict::Regression);
        assert_eq!(v(0.5, None, Better::Lower), Verdict::Fine);
        assert_eq!(v(0.9, None, Better::Higher), Verdict::Regression);
        assert_eq!(v(0.9, Some((0.8, 1.01)), Better::Higher), Verdict::Undecided);
        assert_eq!(v(2.0, None, Better::Higher), Verdict::Fine);
    }
}
