//! What a run has of the quantity that a claim is about, seed by seed.

use std::collections::BTreeMap;

use crate::config::{ClaimConfig, Quantity, RateChoice, RateEnd, ServedEnd};
use crate::metrics::{Capacity, Known, Metric, SLO_SHARE, rate_within};
use crate::record::CellStatus;
use crate::run_data::RunData;
use crate::stats::{Estimate, RatioEstimate};

/// A value over seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Estimated {
    pub(crate) value: f64,
    pub(crate) interval: Option<(f64, f64)>,
    pub(crate) seeds: usize,
}

/// What a run has of a quantity; no estimate where some seeds bound it from below and others from above.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    pub(crate) estimate: Option<Estimated>,
    pub(crate) known: Known,
}

/// A value and from which side it is known; none where both are open.
type OfSeed = (f64, Option<Known>);

type BySeed = BTreeMap<u64, OfSeed>;

/// Measures a claim's quantity.
pub(crate) fn measure(run: &RunData, claim: &ClaimConfig) -> Result<Measured, String> {
    let panels = run.manifest.settings.panels.iter().map(|p| &*p.name);
    let panel = claim.panel(panels).ok_or("the run does not have its panel")?;
    measure_in(run, panel, &claim.quantity, &claim.system, claim.over.as_deref())
}

/// Measures a quantity of a system in a panel, or its ratio to the same of `over`.
pub(crate) fn measure_in(
    run: &RunData,
    panel: &str,
    quantity: &Quantity,
    system: &str,
    over: Option<&str>,
) -> Result<Measured, String> {
    let quantity = &at_a_rate(run, panel, quantity, [Some(system), over]);
    let values = by_seed(run, quantity, panel, system)?;
    let Some(over) = over else {
        let known = together(values.values().map(|(_, known)| *known));
        let plain: Vec<f64> = values.values().map(|(value, _)| *value).collect();
        let estimate = Estimate::over_seeds(&plain);
        return Ok(measured(
            known,
            estimate.map(|e| Estimated { value: e.mean, interval: e.interval(), seeds: e.seeds }),
        ));
    };
    let divisors = by_seed(run, quantity, panel, over)?;
    let pairs: Vec<(OfSeed, OfSeed)> =
        values.iter().filter_map(|(seed, value)| Some((*value, *divisors.get(seed)?))).collect();
    let known =
        together(pairs.iter().flat_map(|((_, known), (_, below))| [*known, below.map(Known::inverse)]));
    let plain: Vec<(f64, f64)> = pairs.iter().map(|((value, _), (divisor, _))| (*value, *divisor)).collect();
    if plain.is_empty() {
        return Err(format!("{system} and {over} have no seed in common"));
    }
    let ratio = RatioEstimate::paired(&plain).ok_or_else(|| {
        let mean = |sum: f64| sum / plain.len() as f64;
        let [own, other] = [plain.iter().map(|p| p.0).sum(), plain.iter().map(|p| p.1).sum()].map(mean);
        format!("there is no ratio where a value is 0: means are {own:.3} of {system}, {other:.3} of {over}")
    })?;
    Ok(measured(known, Some(Estimated { value: ratio.ratio, interval: ratio.interval, seeds: ratio.seeds })))
}

fn measured(known: Option<Known>, estimate: Option<Estimated>) -> Measured {
    Measured { estimate: estimate.filter(|_| known.is_some()), known: known.unwrap_or(Known::Exactly) }
}

/// From which side a mean of values is known; none where they are known from different ones, or one from none.
fn together(all: impl Iterator<Item = Option<Known>>) -> Option<Known> {
    all.filter(|known| *known != Some(Known::Exactly)).try_fold(Known::Exactly, |so_far, known| {
        known.filter(|known| so_far == Known::Exactly || so_far == *known)
    })
}

/// The quantity at the rate that is meant, where that depends on what of `systems` was left out.
fn at_a_rate(run: &RunData, panel: &str, quantity: &Quantity, systems: [Option<&str>; 2]) -> Quantity {
    match *quantity {
        Quantity::Metric { metric, rate: choice @ RateChoice::Served(_) } => {
            let rate = rate(run, panel, choice, systems).map_or(choice, RateChoice::At);
            Quantity::Metric { metric, rate }
        }
        ref other => other.clone(),
    }
}

/// The rate that a claim about `systems` means.
pub(super) fn rate(
    run: &RunData,
    panel: &str,
    choice: RateChoice,
    systems: [Option<&str>; 2],
) -> Option<f64> {
    let rates = run.rates(panel);
    let served = |&&rate: &&f64| {
        systems.iter().flatten().all(|system| {
            let group = run.at(panel, system, rate);
            !group.cells.is_empty() && !group.skipped()
        })
    };
    match choice {
        RateChoice::Served(ServedEnd::HighestServed) => rates.iter().rfind(served).copied(),
        RateChoice::At(rate) => rates.contains(&rate).then_some(rate),
        RateChoice::End(RateEnd::Lowest) => rates.first().copied(),
        RateChoice::End(RateEnd::Highest) => rates.last().copied(),
    }
}

/// Values of one system, never none.
fn by_seed(run: &RunData, quantity: &Quantity, panel: &str, system: &str) -> Result<BySeed, String> {
    if !run.manifest.settings.systems.iter().any(|s| s.name == system) {
        return Err(format!("this run has no system {system}"));
    }
    match quantity {
        &Quantity::Metric { metric, rate: choice } => match rate(run, panel, choice, [Some(system), None]) {
            Some(rate) => metric_by_seed(run, panel, system, metric, rate),
            None => Err("this run does not have its rate".into()),
        },
        Quantity::RateAt { times, of } => {
            let at = |&seed: &u64| Some((seed, rate_at(run, panel, [system, of], *times, seed)?));
            let found: BySeed = run.manifest.seeds.iter().filter_map(at).collect();
            if found.is_empty() { Err(format!("{system} or {of} was not measured")) } else { Ok(found) }
        }
        Quantity::WithinSlo {} => {
            let at = |&seed: &u64| Some((seed, within_slo(run, panel, system, seed)?));
            let found: BySeed = run.manifest.seeds.iter().filter_map(at).collect();
            if found.is_empty() { Err(format!("{system} was not measured")) } else { Ok(found) }
        }
        Quantity::Capacity {} => {
            let found: BySeed = run
                .manifest
                .seeds
                .iter()
                .filter_map(|&seed| Some((seed, capacity(run, panel, system, seed)?)))
                .collect();
            if found.is_empty() { Err(format!("{system} was not measured")) } else { Ok(found) }
        }
    }
}

fn metric_by_seed(
    run: &RunData,
    panel: &str,
    system: &str,
    metric: Metric,
    rate: f64,
) -> Result<BySeed, String> {
    let group = run.at(panel, system, rate);
    let value = |cell: &&crate::run_data::CellData| {
        let window = cell.window.as_ref()?;
        let known = if metric.is_bound(window) { Known::AtLeast } else { Known::Exactly };
        Some((cell.entry.key.seed, (metric.of(window)?, Some(known))))
    };
    let found: BySeed = group.cells.iter().filter_map(value).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let void = |status: &CellStatus| matches!(status, CellStatus::Void { .. });
    let why = match &group.cells[..] {
        [] => "was not run",
        _ if group.skipped() => "was left out, saturated at a lower rate,",
        cells if cells.iter().all(|cell| void(&cell.entry.status)) => "has only void cells",
        _ => "has no value",
    };
    Err(format!("{system} {why} at {rate} requests/s"))
}

/// With one seed, the highest rate at which a system's latency is at most `times` that of `of` at its lowest rate.
fn rate_at(run: &RunData, panel: &str, [system, of]: [&str; 2], times: f64, seed: u64) -> Option<OfSeed> {
    let baseline = run.baseline(panel, of, &run.rate_points(panel, of, |other| other == seed))?;
    let points = run.rate_points(panel, system, |other| other == seed);
    let Capacity { rate, known } = rate_within(&points, times * baseline.value?, baseline.is_bound)?;
    Some((rate, known))
}

/// With one seed, the highest rate at which enough of a system's requests meet the limits.
fn within_slo(run: &RunData, panel: &str, system: &str, seed: u64) -> Option<OfSeed> {
    let points = run.missed_points(panel, system, |other| other == seed);
    let Capacity { rate, known } = rate_within(&points, 1.0 - SLO_SHARE, false)?;
    Some((rate, known))
}

/// A system's rate capacity with one seed: at most the lowest rate where it is saturated there already.
fn capacity(run: &RunData, panel: &str, system: &str, seed: u64) -> Option<OfSeed> {
    let Capacity { rate, known } = run.capacity_over(panel, system, |other| other == seed)?;
    let groups = run.rates(panel).iter();
    let mut groups = groups.map(|&rate| (rate, run.at(panel, system, rate).of_seeds(|other| other == seed)));
    match groups.find(|(_, group)| !group.cells.is_empty()) {
        Some((lowest, group)) if group.saturated() => Some((lowest, Some(Known::AtMost))),
        _ => Some((rate, known)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_add_up_or_tell_nothing() {
        use Known::{AtLeast, AtMost, Exactly};
        let together = |all: &[Known]| super::together(all.iter().map(|known| Some(*known)));
        assert_eq!(together(&[Exactly, Exactly]), Some(Exactly));
        assert_eq!(together(&[Exactly, AtLeast, AtLeast]), Some(AtLeast));
        assert_eq!(together(&[AtMost, Exactly, AtLeast]), None);
        // A system that takes the highest rate over one that does not take the lowest: at least their ratio.
        assert_eq!(together(&[AtLeast, AtMost.inverse()]), Some(AtLeast));
        assert_eq!(together(&[AtLeast, AtLeast.inverse()]), None);
        assert_eq!(super::together([Some(Exactly), None].into_iter()), None);
    }
}
