//! What papers found, held against a run: each claim holds, fails or stays undecided.
//!
//! Confidence comes from seeds alone, as everywhere: the interval is over seeds, for a ratio over the logarithms of one
//! ratio a seed. One seed gives no interval, so a claim is then undecided whatever its value.

mod measure;
mod report;

pub(crate) use measure::{Estimated, Measured, measure, measure_in};
pub use report::{caption_line, text, write_claims};

use crate::config::{ClaimConfig, Device, Quantity, RateChoice, RateEnd};
use crate::metrics::Known;
use crate::run_data::RunData;

/// A claim with what a run says about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Judged {
    /// What the paper found.
    pub says: String,
    /// Which paper, and where in it.
    pub source: String,
    /// What was measured.
    pub what: String,
    /// The claim holds from here on.
    pub at_least: Option<f64>,
    /// The claim holds up to here.
    pub at_most: Option<f64>,
    /// What the run has: a mean over seeds, for ratios the geometric one.
    pub value: Option<f64>,
    /// From which side it is known.
    pub known: Known,
    /// Ends of its interval over seeds; infinite to a side from which it is not known.
    pub interval: Option<(f64, f64)>,
    /// Seeds that it is over; 0 for what is exact.
    pub seeds: usize,
    /// What follows.
    pub verdict: Verdict,
}

/// What a run says about a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// All of the interval is within the claim's bounds.
    Holds,
    /// All of it is beyond one of them.
    Fails,
    /// Neither.
    Undecided(Why),
}

/// Why a claim is undecided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// One seed has no interval.
    OneSeed {
        /// Whether its value is within the claim's bounds; none where it is known from one side only, and that side does
        /// not tell.
        agrees: Option<bool>,
    },
    /// The interval includes a bound of the claim.
    WithinNoise,
    /// The value is known from one side only, and that side does not tell.
    OneSided,
    /// There is nothing to judge by.
    Missing(String),
    /// The run was not made for it: other panels, systems or rates ran.
    NotRun(String),
    /// Another device is needed.
    Needs(Device),
}

/// Holds a run against its configuration's claims.
pub fn judge(run: &RunData) -> Vec<Judged> {
    run.claims.iter().flatten().map(|claim| judge_claim(run, claim)).collect()
}

fn judge_claim(run: &RunData, claim: &ClaimConfig) -> Judged {
    let measured = measure(run, claim);
    let estimate = measured.as_ref().ok().and_then(|m| m.estimate);
    let (known, ends) = measured.as_ref().map_or((Known::Exactly, None), |m| (m.known, Some(m.ends)));
    let bounds = (claim.at_least, claim.at_most);
    let verdict = match (claim.needs, measured) {
        (Some(device), _) if device != run.manifest.settings.device => Verdict::Undecided(Why::Needs(device)),
        (_, Err(why)) => Verdict::Undecided(why),
        (_, Ok(measured)) => decide(&measured, bounds),
    };
    Judged {
        says: claim.says.clone(),
        source: claim.source.clone(),
        what: describe(run, claim),
        at_least: claim.at_least,
        at_most: claim.at_most,
        value: estimate.map(|e| e.value),
        known,
        interval: estimate.and_then(|e| e.interval).and(ends),
        seeds: estimate.map_or(0, |e| e.seeds),
        verdict,
    }
}

/// What follows from a value, with its interval over seeds, for a claim's bounds (from here on, up to here).
pub(crate) fn verdict(
    value: f64,
    interval: Option<(f64, f64)>,
    bounds: (Option<f64>, Option<f64>),
) -> Verdict {
    // How many seeds there were is no part of it.
    let estimate = Some(Estimated { value, interval, seeds: 0 });
    let ends = interval.unwrap_or((value, value));
    decide(&Measured { estimate, known: Known::Exactly, ends }, bounds)
}

fn decide(measured: &Measured, bounds: (Option<f64>, Option<f64>)) -> Verdict {
    let Some(estimate) = measured.estimate else {
        return Verdict::Undecided(Why::OneSided);
    };
    match (estimate.interval, within(measured.ends, bounds)) {
        (None, agrees) => Verdict::Undecided(Why::OneSeed { agrees }),
        (Some(_), Some(true)) => Verdict::Holds,
        (Some(_), Some(false)) => Verdict::Fails,
        (Some(_), None) if measured.known == Known::Exactly => Verdict::Undecided(Why::WithinNoise),
        (Some(_), None) => Verdict::Undecided(Why::OneSided),
    }
}

/// Whether what is measured, between `low` and `high`, lies within the claim's bounds; none when that is open.
fn within((low, high): (f64, f64), (at_least, at_most): (Option<f64>, Option<f64>)) -> Option<bool> {
    let beyond = at_least.is_some_and(|bound| high < bound) || at_most.is_some_and(|bound| low > bound);
    let inside = at_least.is_none_or(|bound| low >= bound) && at_most.is_none_or(|bound| high <= bound);
    (beyond || inside).then_some(inside)
}

/// A claim's quantity in words.
fn describe(run: &RunData, claim: &ClaimConfig) -> String {
    let settings = &run.manifest.settings;
    let panel = claim.panel(settings.panels.iter().map(|p| &*p.name)).unwrap_or_default();
    let (name, at) = match &claim.quantity {
        Quantity::Capacity {} => ("rate capacity", String::new()),
        Quantity::WithinSlo {} => ("rate within the SLO", String::new()),
        Quantity::RateAt { times, of } => {
            ("rate", format!(" within {times}x of {of}'s latency at its lowest"))
        }
        &Quantity::Metric { metric, rate } => {
            let systems = [Some(&*claim.system), claim.over.as_deref()];
            let rate = match (rate, measure::rate(run, panel, rate, systems)) {
                (_, Some(rate)) | (RateChoice::At(rate), None) => format!(" at {rate} requests/s"),
                (RateChoice::End(RateEnd::Lowest), None) => " at the lowest rate".into(),
                (RateChoice::End(RateEnd::Highest), None) => " at the highest rate".into(),
                (RateChoice::Served(_), None) => " at the highest rate that was served".into(),
            };
            (metric.name(), rate)
        }
    };
    let over = claim.over.as_ref().map_or(String::new(), |over| format!(" / {over}"));
    let place = if panel.is_empty() { String::new() } else { format!(" in {panel}") };
    format!("{name} of {}{over}{place}{at}", claim.system)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(value: f64, interval: Option<(f64, f64)>, known: Known, bounds: [Option<f64>; 2]) -> Verdict {
        let seeds = if interval.is_some() { 5 } else { 1 };
        let estimate = Some(Estimated { value, interval, seeds });
        let (low, high) = interval.unwrap_or((value, value));
        let ends = match known {
            Known::Exactly => (low, high),
            Known::AtLeast => (low, f64::INFINITY),
            Known::AtMost => (f64::NEG_INFINITY, high),
        };
        decide(&Measured { estimate, known, ends }, (bounds[0], bounds[1]))
    }

    #[test]
    fn the_whole_interval_decides() {
        let at_least = [Some(1.3), None];
        let of = |low, high| verdict(1.5, Some((low, high)), Known::Exactly, at_least);
        assert_eq!(of(1.3, 1.7), Verdict::Holds);
        assert_eq!(of(1.0, 1.29), Verdict::Fails);
        assert_eq!(of(1.29, 1.7), Verdict::Undecided(Why::WithinNoise));
        let between = |low, high| verdict(1.0, Some((low, high)), Known::Exactly, [Some(0.5), Some(2.0)]);
        assert_eq!(between(0.6, 1.9), Verdict::Holds);
        assert_eq!(between(2.1, 2.2), Verdict::Fails);
        assert_eq!(between(0.4, 2.1), Verdict::Undecided(Why::WithinNoise));
    }

    #[test]
    fn one_seed_decides_nothing_and_says_what_it_suggests() {
        let of = |value, known| verdict(value, None, known, [None, Some(1.0)]);
        let one_seed = |agrees| Verdict::Undecided(Why::OneSeed { agrees });
        assert_eq!(of(0.9, Known::Exactly), one_seed(Some(true)));
        assert_eq!(of(1.1, Known::Exactly), one_seed(Some(false)));
        assert_eq!(of(0.9, Known::AtLeast), one_seed(None));
    }

    #[test]
    fn a_bound_decides_on_its_own_side_only() {
        let at_least = |interval, known| verdict(1.5, Some(interval), known, [Some(1.3), None]);
        assert_eq!(at_least((1.4, 1.6), Known::AtLeast), Verdict::Holds);
        assert_eq!(at_least((1.0, 1.1), Known::AtLeast), Verdict::Undecided(Why::OneSided));
        assert_eq!(at_least((1.4, 1.6), Known::AtMost), Verdict::Undecided(Why::OneSided));
        assert_eq!(at_least((1.0, 1.1), Known::AtMost), Verdict::Fails);
    }
}
