//! What a run has of the quantity that a claim is about, seed by seed.

use std::collections::BTreeMap;

use super::Why;
use crate::config::{ClaimConfig, Quantity, RateChoice, RateEnd, ServedEnd};
use crate::metrics::{Capacity, Known, Metric, SLO_SHARE, rate_capacity, rate_within};
use crate::record::CellStatus;
use crate::run_data::RunData;
use crate::stats::{Estimate, RatioEstimate};

/// A value over seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Estimated {
    pub(crate) value: f64,
    /// Over seeds; with what is open of each seed's value, where that has both ends.
    pub(crate) interval: Option<(f64, f64)>,
    pub(crate) seeds: usize,
}

/// What a run has of a quantity; no estimate where it is open to both sides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Measured {
    pub(crate) estimate: Option<Estimated>,
    pub(crate) known: Known,
    /// The least and the most that it may be, over seeds where there are several; infinite where it is open.
    pub(crate) ends: (f64, f64),
}

/// A value of one seed, and what it is at least and at most.
#[derive(Debug, Clone, Copy, PartialEq)]
struct OfSeed {
    value: f64,
    low: f64,
    high: f64,
}

impl OfSeed {
    /// Known as a capacity is: none from no side.
    fn known(value: f64, known: Option<Known>) -> Self {
        let low =
            if matches!(known, Some(Known::Exactly | Known::AtLeast)) { value } else { f64::NEG_INFINITY };
        let high = if matches!(known, Some(Known::Exactly | Known::AtMost)) { value } else { f64::INFINITY };
        Self { value, low, high }
    }
}

type BySeed = BTreeMap<u64, OfSeed>;

/// Measures a claim's quantity.
pub(crate) fn measure(run: &RunData, claim: &ClaimConfig) -> Result<Measured, Why> {
    let panels = run.manifest.settings.panels.iter().map(|p| &*p.name);
    let panel = claim.panel(panels).ok_or_else(|| not_run("the run does not have its panel"))?;
    measure_in(run, panel, &claim.quantity, &claim.system, claim.over.as_deref())
}

/// Measures a quantity of a system in a panel, or its ratio to the same of `over`.
pub(crate) fn measure_in(
    run: &RunData,
    panel: &str,
    quantity: &Quantity,
    system: &str,
    over: Option<&str>,
) -> Result<Measured, Why> {
    let quantity = &at_a_rate(run, panel, quantity, [Some(system), over]);
    let values = by_seed(run, quantity, panel, system);
    let divisors = over.map(|over| by_seed(run, quantity, panel, over)).transpose();
    // A run with one of the two alone was not made for their ratio, whatever became of that one.
    let (values, divisors) = match (values, divisors) {
        (_, Err(why @ Why::NotRun(_))) => return Err(why),
        (values, divisors) => (values?, divisors?),
    };
    let (Some(over), Some(divisors)) = (over, divisors) else {
        return Ok(mean(&values.into_values().collect::<Vec<_>>()));
    };
    let pairs: Vec<(OfSeed, OfSeed)> =
        values.iter().filter_map(|(seed, value)| Some((*value, *divisors.get(seed)?))).collect();
    if pairs.is_empty() {
        return Err(Why::Missing(format!("{system} and {over} have no seed in common")));
    }
    ratio(&pairs).ok_or_else(|| {
        let mean = |of: fn(&(OfSeed, OfSeed)) -> f64| pairs.iter().map(of).sum::<f64>() / pairs.len() as f64;
        let [own, other] = [mean(|pair| pair.0.value), mean(|pair| pair.1.value)];
        Why::Missing(format!(
            "there is no ratio where a value is 0: means are {own:.3} of {system}, {other:.3} of {over}"
        ))
    })
}

/// The mean over seeds.
fn mean(values: &[OfSeed]) -> Measured {
    let over_seeds = |part: fn(&OfSeed) -> f64| {
        let values: Vec<f64> = values.iter().map(part).filter(|value| value.is_finite()).collect();
        let found = Estimate::over_seeds(&values)?;
        Some(Estimated { value: found.mean, interval: found.interval(), seeds: found.seeds })
    };
    measured(values.len(), [over_seeds(|v| v.value), over_seeds(|v| v.low), over_seeds(|v| v.high)])
}

/// The mean ratio over seeds; none where a value is not positive.
fn ratio(pairs: &[(OfSeed, OfSeed)]) -> Option<Measured> {
    let over_seeds = |part: fn(&(OfSeed, OfSeed)) -> (f64, f64)| {
        let pairs: Vec<(f64, f64)> =
            pairs.iter().map(part).filter(|(a, b)| a.is_finite() && b.is_finite()).collect();
        RatioEstimate::paired(&pairs).map(|r| Estimated {
            value: r.ratio,
            interval: r.interval,
            seeds: r.seeds,
        })
    };
    let value = Some(over_seeds(|(a, b)| (a.value, b.value))?);
    // The larger a divisor is, the smaller the ratio.
    Some(measured(
        pairs.len(),
        [value, over_seeds(|(a, b)| (a.low, b.high)), over_seeds(|(a, b)| (a.high, b.low))],
    ))
}

/// From what values of all `seeds` are, at least and at most; an end that is open for a seed is open for all of them.
fn measured(seeds: usize, parts: [Option<Estimated>; 3]) -> Measured {
    let [value, low, high] = parts.map(|part| part.filter(|estimate| estimate.seeds == seeds));
    let end = |of: Estimated, upper: bool| match (of.interval, upper) {
        (Some((low, _)), false) => low,
        (Some((_, high)), true) => high,
        (None, _) => of.value,
    };
    let ends = (
        low.map_or(f64::NEG_INFINITY, |low| end(low, false)),
        high.map_or(f64::INFINITY, |high| end(high, true)),
    );
    // With one seed there is no interval that could take in what is open between the ends.
    let open = |end: Option<Estimated>| match (value, end) {
        (Some(value), Some(end)) => value.interval.is_none() && value.value != end.value,
        (_, end) => end.is_none(),
    };
    let known = match (open(low), open(high)) {
        (false, true) => Known::AtLeast,
        (true, false) => Known::AtMost,
        _ => Known::Exactly,
    };
    let mut estimate = value.filter(|_| low.is_some() || high.is_some());
    if let (Some(estimate), Some(_), Some(_)) = (&mut estimate, low, high) {
        estimate.interval = estimate.interval.map(|_| ends);
    }
    Measured { estimate, known, ends }
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

fn not_run(what: impl Into<String>) -> Why {
    Why::NotRun(what.into())
}

/// Why there is nothing of these systems' rates.
fn unmeasured(run: &RunData, panel: &str, systems: &[&str]) -> Why {
    let rates = run.rates(panel);
    let meant = |system: &&&str| rates.iter().any(|&rate| is_meant(run, panel, system, rate));
    match systems.iter().find(|system| !meant(system)) {
        Some(system) => not_run(format!("{system} was not run")),
        None => Why::Missing(format!("{} was not measured", systems.join(" or "))),
    }
}

/// Whether the run has, or an interrupted one is to have, a cell of this system.
fn is_meant(run: &RunData, panel: &str, system: &str, rate: f64) -> bool {
    let settings = &run.manifest.settings;
    let runs = settings.systems.iter().any(|other| other.name == system && other.runs_at(panel, rate));
    runs && settings.selects(system, panel)
}

/// Values of one system, never none.
fn by_seed(run: &RunData, quantity: &Quantity, panel: &str, system: &str) -> Result<BySeed, Why> {
    if !run.manifest.settings.systems.iter().any(|s| s.name == system) {
        return Err(not_run(format!("this run has no system {system}")));
    }
    match quantity {
        &Quantity::Metric { metric, rate: choice } => match rate(run, panel, choice, [Some(system), None]) {
            Some(rate) => metric_by_seed(run, panel, system, metric, rate),
            None => Err(not_run("this run does not have its rate")),
        },
        Quantity::RateAt { times, of } => {
            let at = |&seed: &u64| Some((seed, rate_at(run, panel, [system, of], *times, seed)?));
            let found: BySeed = run.manifest.seeds.iter().filter_map(at).collect();
            let both = [system, of];
            let systems = if of == system { &both[..1] } else { &both };
            if found.is_empty() { Err(unmeasured(run, panel, systems)) } else { Ok(found) }
        }
        Quantity::WithinSlo {} => {
            let at = |&seed: &u64| Some((seed, within_slo(run, panel, system, seed)?));
            let found: BySeed = run.manifest.seeds.iter().filter_map(at).collect();
            if found.is_empty() { Err(unmeasured(run, panel, &[system])) } else { Ok(found) }
        }
        Quantity::Capacity {} => {
            let found: BySeed = run
                .manifest
                .seeds
                .iter()
                .filter_map(|&seed| Some((seed, capacity(run, panel, system, seed)?)))
                .collect();
            if found.is_empty() { Err(unmeasured(run, panel, &[system])) } else { Ok(found) }
        }
    }
}

fn metric_by_seed(
    run: &RunData,
    panel: &str,
    system: &str,
    metric: Metric,
    rate: f64,
) -> Result<BySeed, Why> {
    let group = run.at(panel, system, rate);
    let value = |cell: &&crate::run_data::CellData| {
        let window = cell.window.as_ref()?;
        let value = metric.of(window)?;
        let high = metric.most(window).unwrap_or(f64::INFINITY);
        Some((cell.entry.key.seed, OfSeed { value, low: value, high }))
    };
    let found: BySeed = group.cells.iter().filter_map(value).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    let void = |status: &CellStatus| matches!(status, CellStatus::Void { .. });
    let why = match &group.cells[..] {
        [] if !is_meant(run, panel, system, rate) => {
            return Err(not_run(format!("{system} was not run at {rate} requests/s")));
        }
        [] => "has not run yet",
        _ if group.skipped() => "was left out, saturated at a lower rate,",
        cells if cells.iter().all(|cell| void(&cell.entry.status)) => "has only void cells",
        _ => "has no value",
    };
    Err(Why::Missing(format!("{system} {why} at {rate} requests/s")))
}

/// With one seed, the highest rate at which a system's latency is at most `times` that of `of` at its lowest rate.
fn rate_at(run: &RunData, panel: &str, [system, of]: [&str; 2], times: f64, seed: u64) -> Option<OfSeed> {
    let baseline = run.baseline(panel, of, &run.rate_points(panel, of, |other| other == seed))?;
    let points = run.rate_points(panel, system, |other| other == seed);
    let Capacity { rate, known } = if system == of {
        // Whatever its latency at the lowest rate is, it is within a multiple of itself.
        rate_capacity(&points, times)?
    } else {
        rate_within(&points, times * baseline.value?, baseline.is_bound)?
    };
    Some(OfSeed::known(rate, known))
}

/// With one seed, the highest rate at which enough of a system's requests meet the limits.
fn within_slo(run: &RunData, panel: &str, system: &str, seed: u64) -> Option<OfSeed> {
    let points = run.missed_points(panel, system, |other| other == seed);
    let Capacity { rate, known } = rate_within(&points, 1.0 - SLO_SHARE, false)?;
    Some(OfSeed::known(rate, known))
}

/// A system's rate capacity with one seed: at most the lowest rate where it is overloaded there already.
fn capacity(run: &RunData, panel: &str, system: &str, seed: u64) -> Option<OfSeed> {
    let found = run.capacity_over(panel, system, |other| other == seed);
    let groups = run.rates(panel).iter();
    let mut groups = groups.map(|&rate| (rate, run.at(panel, system, rate).of_seeds(|other| other == seed)));
    match groups.find(|(_, group)| !group.cells.is_empty()) {
        Some((lowest, group)) if group.loses() || group.saturated() && found.is_some() => {
            Some(OfSeed::known(lowest, Some(Known::AtMost)))
        }
        _ => found.map(|Capacity { rate, known }| OfSeed::known(rate, known)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: f64, known: Known) -> OfSeed {
        OfSeed::known(value, Some(known))
    }

    #[test]
    fn sides_add_up_or_tell_nothing() {
        use Known::{AtLeast, AtMost, Exactly};
        let together = |all: &[Known]| {
            let measured = mean(&all.iter().map(|&known| of(2.0, known)).collect::<Vec<_>>());
            measured.estimate.map(|_| measured.known)
        };
        assert_eq!(together(&[Exactly, Exactly]), Some(Exactly));
        assert_eq!(together(&[Exactly, AtLeast, AtLeast]), Some(AtLeast));
        assert_eq!(together(&[AtMost, Exactly, AtLeast]), None);
        let over = |value, divisor| {
            let measured = ratio(&[(of(3.0, value), of(2.0, divisor))]).unwrap();
            measured.estimate.map(|e| (e.value, measured.known, measured.ends))
        };
        // A system that takes the highest rate over one that does not take the lowest: at least their ratio.
        assert_eq!(over(AtLeast, AtMost), Some((1.5, AtLeast, (1.5, f64::INFINITY))));
        assert_eq!(over(Exactly, AtLeast), Some((1.5, AtMost, (f64::NEG_INFINITY, 1.5))));
        assert_eq!(over(AtLeast, AtLeast), None);
        assert_eq!(mean(&[OfSeed::known(1.0, None)]).estimate, None);
        assert_eq!(ratio(&[(of(0.0, Exactly), of(2.0, Exactly))]), None);
    }

    #[test]
    fn what_is_open_within_limits_widens_the_interval() {
        let seeds = [1.0, 1.2, 1.1].map(|value| OfSeed { value, low: value, high: value + 0.5 });
        let two_sided = mean(&seeds);
        let exact = mean(&seeds.map(|seed| of(seed.value, Known::Exactly)));
        let [wide, narrow] = [two_sided, exact].map(|m| m.estimate.unwrap().interval.unwrap());
        assert_eq!((two_sided.known, two_sided.ends), (Known::Exactly, wide));
        assert_eq!(narrow.0, wide.0);
        assert!((wide.1 - narrow.1 - 0.5).abs() < 1e-9);
        let between = ratio(&[(seeds[0], seeds[0])]).unwrap();
        assert_eq!(between.ends, (1.0 / 1.5, 1.5));
    }
}
