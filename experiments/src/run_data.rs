//! A run read back from its folder, with every figure computed from its records.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use crate::cell::SYSTEM_STOPPED;
use crate::config::{ClaimConfig, Claims, ConfigError, Quantity, RateChoice, Source};
use crate::cpu_use::BUSY_SHARE;
use crate::gpu_use;
use crate::manifest::Manifest;
use crate::metrics::{
    Capacity, CellMetrics, Metric, Observed, RatePoint, Window, cell_metrics, rate_capacity,
};
use crate::record::{CellEntry, CellKey, CellStatus, RequestRow, StoredSteps};
use crate::settings::{Settings, scaled_rate};
use crate::stats::Estimate;
use crate::store::{self, StoreError};
use crate::systems::SystemConfig;

/// Factor on the latency at the lowest rate up to which a rate counts as sustained.
pub const CAPACITY_FACTOR: f64 = 5.0;

/// A run with its figures.
#[derive(Debug)]
pub struct RunData {
    /// What ran, where and from which source.
    pub manifest: Manifest,
    /// Its cells in the order they ran, those left out included.
    pub cells: Vec<CellData>,
    /// Requests whose output differs between systems that should agree.
    pub disagreements: Vec<Disagreement>,
    /// What its configuration claims, or why that cannot be read; another configuration's may take their place.
    pub claims: Result<Vec<ClaimConfig>, ConfigError>,
    lengths: BTreeMap<String, (f64, f64)>,
}

/// A cell with its figures.
#[derive(Debug)]
pub struct CellData {
    /// What is recorded about the cell itself.
    pub entry: CellEntry,
    /// Figures of the stationary window; none for a cell that was left out.
    pub window: Option<CellMetrics>,
    /// Figures of the whole cell.
    pub full: Option<CellMetrics>,
}

/// A request that two systems answered differently although greedy tokens do not depend on how they serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disagreement {
    /// Panel, rate and seed, for a person.
    pub place: String,
    /// The request.
    pub request: u64,
    /// The systems.
    pub systems: [String; 2],
}

impl RunData {
    /// Reads a run's folder, full or packed.
    ///
    /// # Errors
    /// When it is no run, or of another schema.
    pub fn load(folder: &Path) -> Result<Self, StoreError> {
        let stored = store::read(folder)?;
        let mut requests: HashMap<String, Vec<RequestRow>> = HashMap::new();
        for row in stored.requests {
            requests.entry(row.key.id()).or_default().push(row);
        }
        let lengths = mean_lengths(&requests);
        let disagreements = disagreements(&stored.manifest, &stored.cells, &requests);
        let cells = stored.cells.into_iter().map(|entry| {
            let rows = requests.get(&entry.key.id()).map_or(&[][..], Vec::as_slice);
            let steps = stored.steps.get(&entry.key.id()).map_or(&[][..], Vec::as_slice);
            CellData::new(entry, rows, steps, &stored.manifest)
        });
        let cells = cells.collect();
        let source = Source::new("manifest.json", &*stored.manifest.config_text);
        let claims = claims_in(&source, &stored.manifest.settings);
        Ok(Self { cells, manifest: stored.manifest, disagreements, claims, lengths })
    }

    /// Rates of a panel, ascending.
    pub fn rates(&self, panel: &str) -> &[f64] {
        let panels = &self.manifest.settings.panels;
        panels.iter().find(|p| p.name == panel).map_or(&[], |p| &p.rates)
    }

    /// The cells of a system at a rate, one a seed.
    pub fn at(&self, panel: &str, system: &str, rate: f64) -> Group<'_> {
        let matches = |key: &CellKey| key.panel == panel && key.system == system && key.rate == rate;
        Group { cells: self.cells.iter().filter(|c| matches(&c.entry.key)).collect() }
    }

    /// How much of the run there is when cells are missing, and over how many sittings it was made when over several:
    /// a line for tables and captions.
    pub fn describe_making(&self) -> Option<String> {
        let (cells, all) = (self.cells.len(), self.manifest.settings.cells().len());
        // Those that left a cell: a sitting may have been interrupted in its first.
        let sittings = self.cells.iter().map(|c| c.entry.sitting).collect::<HashSet<_>>().len();
        match (cells < all, sittings > 1) {
            (true, true) => Some(format!("Incomplete: {cells} of {all} cells, made in {sittings} sittings.")),
            (true, false) => Some(format!("Incomplete: {cells} of {all} cells.")),
            (false, true) => Some(format!("Made in {sittings} sittings.")),
            (false, false) => None,
        }
    }

    /// Most seeds that any group has.
    pub fn seeds(&self) -> usize {
        let seeds = self.cells.iter().filter(|c| c.window.is_some()).map(|c| c.entry.key.seed);
        seeds.collect::<HashSet<_>>().len()
    }

    /// Whether `test` holds for the cells of some system at some rate.
    pub fn any(&self, test: impl Fn(&Group<'_>) -> bool) -> bool {
        self.groups().any(|(_, _, _, group)| test(&group))
    }

    /// Panel, system, rate and cells, in the configuration's order.
    pub fn groups(&self) -> impl Iterator<Item = (&str, &str, f64, Group<'_>)> {
        let settings = &self.manifest.settings;
        settings.selected_panels().flat_map(move |panel| {
            settings.selected_systems().flat_map(move |system| {
                let rates = panel.rates.iter();
                rates.map(|&rate| {
                    (&*panel.name, &*system.name, rate, self.at(&panel.name, &system.name, rate))
                })
            })
        })
    }

    /// The highest rate that a system sustains in a panel; none without a value at the lowest rate that it runs at.
    pub fn capacity(&self, panel: &str, system: &str) -> Option<Capacity> {
        self.capacity_over(panel, system, |_| true)
    }

    /// The same over the cells of some seeds.
    pub(crate) fn capacity_over(
        &self,
        panel: &str,
        system: &str,
        seeds: impl Fn(u64) -> bool,
    ) -> Option<Capacity> {
        let points = self.rate_points(panel, system, seeds);
        self.baseline(panel, system, &points)?;
        rate_capacity(&points, CAPACITY_FACTOR)
    }

    /// The one of a system's points that multiples of its latency are taken of: at the lowest rate that it runs at. None
    /// where that cell is void or missing: the next rate's latency would be another bound.
    pub(crate) fn baseline(&self, panel: &str, system: &str, points: &[RatePoint]) -> Option<RatePoint> {
        let system = self.manifest.settings.systems.iter().find(|known| known.name == system)?;
        let lowest = self.rates(panel).iter().find(|&&rate| system.runs_at(panel, rate))?;
        points.first().filter(|point| point.rate == *lowest).copied()
    }

    /// Mean normalized latency by rate, over the cells of some seeds.
    pub(crate) fn rate_points(
        &self,
        panel: &str,
        system: &str,
        seeds: impl Fn(u64) -> bool,
    ) -> Vec<RatePoint> {
        let latency = |group: &Group<'_>| {
            let mean = group.estimate(Metric::NormalizedLatency)?.mean;
            Some((mean, group.is_bound(Metric::NormalizedLatency)))
        };
        // Those that were served are not the load whose latency is meant.
        self.points(panel, system, seeds, |group| group.loses(), latency)
    }

    /// Share of requests that miss the limits of `[slo]` by rate, over the cells of some seeds.
    pub(crate) fn missed_points(
        &self,
        panel: &str,
        system: &str,
        seeds: impl Fn(u64) -> bool,
    ) -> Vec<RatePoint> {
        let missed = |group: &Group<'_>| {
            let shares: Vec<f64> = group.windows().filter_map(|w| Some(1.0 - w.attainment()?)).collect();
            // Exact: a request that has not ended misses them by definition.
            Estimate::over_seeds(&shares).map(|share| (share.mean, false))
        };
        self.points(panel, system, seeds, |_| false, missed)
    }

    fn points(
        &self,
        panel: &str,
        system: &str,
        seeds: impl Fn(u64) -> bool,
        beyond: impl Fn(&Group<'_>) -> bool,
        of: impl Fn(&Group<'_>) -> Option<(f64, bool)>,
    ) -> Vec<RatePoint> {
        let mut points = Vec::new();
        let mut ended = false;
        for &rate in self.rates(panel) {
            let group = self.at(panel, system, rate).of_seeds(&seeds);
            let beyond = beyond(&group);
            let (value, is_bound) = of(&group).filter(|_| !beyond).unzip();
            // A void cell says nothing. The first seed's cells decide for all what is left out: that says something of a seed
            // that was overloaded itself, and nothing of one that was not.
            if value.is_some() || beyond || group.skipped() && ended {
                points.push(RatePoint { rate, value, is_bound: is_bound.unwrap_or(false) });
            }
            ended |= group.ends_line();
        }
        points
    }

    /// Rejected and failed requests in the windows, and void cells.
    pub fn losses(&self) -> (u64, u64, usize) {
        let windows = || self.cells.iter().filter_map(|c| c.window.as_ref());
        let void = |c: &&CellData| matches!(c.entry.status, CellStatus::Void { .. });
        (
            windows().map(|w| w.rejected).sum(),
            windows().map(|w| w.failed).sum(),
            self.cells.iter().filter(void).count(),
        )
    }

    /// In how many cells others used much of the machine's CPU time, where any did: a line for tables and captions.
    pub fn describe_others(&self) -> Option<String> {
        let shares: Vec<f64> =
            self.cells.iter().filter_map(|cell| cell.entry.cpu.and_then(|cpu| cpu.others)).collect();
        let busy = shares.iter().filter(|share| **share > BUSY_SHARE).count();
        let most = shares.iter().fold(0.0_f64, |most, share| most.max(*share));
        (busy > 0).then(|| {
            format!(
                "The machine was not idle: others used more than {:.0}% of its CPU time in {busy} of {} cells (up to {:.0}%).",
                BUSY_SHARE * 100.0,
                shares.len(),
                most * 100.0
            )
        })
    }

    /// The GPU's clocks and power over the cells that are shown, where they were read: a line for tables and captions.
    pub fn describe_clocks(&self) -> Option<String> {
        let shown = self.cells.iter().filter(|cell| cell.window.is_some());
        gpu_use::describe(
            &shown.filter_map(|cell| cell.entry.gpu).collect::<Vec<_>>(),
            self.manifest.settings.tensor_parallel,
        )
    }

    /// Why a script must not take the run for a result: a system stopped, or there is no cell to show.
    pub fn unusable(&self) -> Option<String> {
        let stopped = self.cells.iter().filter_map(|cell| match &cell.entry.status {
            CellStatus::Void { reason } if reason.starts_with(SYSTEM_STOPPED) => Some((cell, reason)),
            _ => None,
        });
        let stopped: Vec<_> = stopped.collect();
        match stopped.first() {
            Some((cell, reason)) => {
                Some(format!("{} cells are void, first {}: {reason}", stopped.len(), cell.entry.key))
            }
            None if self.cells.iter().all(|cell| cell.window.is_none()) => {
                Some("no cell can be shown: all are void".into())
            }
            None => None,
        }
    }

    /// Mean lengths of a panel's requests, as a line below its title.
    pub fn panel_subtitle(&self, panel: &str) -> String {
        match self.lengths.get(panel) {
            Some((input, output)) => format!("mean {input:.0} tokens in, {output:.0} out"),
            None => String::new(),
        }
    }

    /// Mean tokens of a panel's prompts and of its outputs.
    pub fn panel_lengths(&self, panel: &str) -> Option<(f64, f64)> {
        self.lengths.get(panel).copied()
    }
}

impl CellData {
    fn new(
        entry: CellEntry,
        rows: &[RequestRow],
        steps: &[quire_workloads::StepRecord],
        manifest: &Manifest,
    ) -> Self {
        if !matches!(entry.status, CellStatus::Done {}) || rows.is_empty() {
            return Self { entry, window: None, full: None };
        }
        let run = &manifest.settings.run;
        let slo = Some(&manifest.settings.slo);
        let observed: Vec<Observed> = rows.iter().map(|row| row.observed(entry.end_s)).collect();
        let arrivals: Vec<f64> = observed.iter().map(|r| r.intended_s).collect();
        let windows =
            [Window::stationary(&arrivals, run.warm_up, run.drain), Window::full(&arrivals, entry.end_s)];
        let [mut window, mut full] = windows.map(|w| cell_metrics(&observed, steps, w, slo));
        if steps.is_empty() {
            // A cell that was packed has no steps, only what was computed from them when it ran.
            let StoredSteps { window: in_window, full: in_full } = entry.steps;
            (window.steps, full.steps) = (in_window, in_full);
        }
        if !manifest.settings.tells_acceptance(&entry.key.system) {
            for steps in [&mut window, &mut full].into_iter().filter_map(|metrics| metrics.steps.as_mut()) {
                steps.acceptance = None;
            }
        }
        Self { entry, window: Some(window), full: Some(full) }
    }
}

/// The claims of a configuration, about the rates of a run of these settings.
pub(crate) fn claims_in(source: &Source, settings: &Settings) -> Result<Vec<ClaimConfig>, ConfigError> {
    let mut claims = source.parse::<Claims>()?.claim;
    for claim in &mut claims {
        if let Quantity::Metric { rate: RateChoice::At(rate), .. } = &mut claim.quantity {
            *rate = scaled_rate(*rate, settings.rates_times);
        }
    }
    Ok(claims)
}

/// The cells of one system at one rate.
#[derive(Debug)]
pub struct Group<'a> {
    /// One a seed.
    pub cells: Vec<&'a CellData>,
}

impl Group<'_> {
    /// Its cells of some seeds.
    pub(crate) fn of_seeds(mut self, seeds: impl Fn(u64) -> bool) -> Self {
        self.cells.retain(|cell| seeds(cell.entry.key.seed));
        self
    }

    fn windows(&self) -> impl Iterator<Item = &CellMetrics> {
        self.cells.iter().filter_map(|c| c.window.as_ref())
    }

    /// A metric over seeds; none without a cell that has it.
    pub fn estimate(&self, metric: Metric) -> Option<Estimate> {
        let values: Vec<f64> = self.windows().filter_map(|w| metric.of(w)).collect();
        Estimate::over_seeds(&values)
    }

    /// A metric by seed.
    pub fn by_seed(&self, metric: Metric) -> BTreeMap<u64, f64> {
        let value = |c: &&CellData| Some((c.entry.key.seed, metric.of(c.window.as_ref()?)?));
        self.cells.iter().filter_map(value).collect()
    }

    /// Whether the system is saturated with at least half of the seeds.
    pub fn saturated(&self) -> bool {
        let (saturated, all) = self.windows().fold((0, 0), |(s, n), w| (s + usize::from(w.saturated), n + 1));
        saturated > 0 && 2 * saturated >= all
    }

    /// Whether more than [`crate::metrics::LOSS_SHARE`] of the requests were rejected or failed, with at least half of the seeds.
    pub fn loses(&self) -> bool {
        let (losing, all) = self.windows().fold((0, 0), |(s, n), w| (s + usize::from(w.loses()), n + 1));
        losing > 0 && 2 * losing >= all
    }

    /// Whether the system does not serve what it is offered: its queue grows, or it loses requests.
    pub fn overloaded(&self) -> bool {
        self.saturated() || self.loses()
    }

    /// Whether the system is overloaded or leaves too many requests unfinished, with at least half of the seeds: higher rates
    /// are left out.
    pub(crate) fn ends_line(&self) -> bool {
        let ran = self.cells.iter().filter(|cell| cell.window.is_some());
        let (ends, all) = ran.fold((0, 0), |(e, n), cell| (e + usize::from(cell.entry.overloaded), n + 1));
        ends > 0 && 2 * ends >= all
    }

    /// Whether a point is drawn hollow: figures beside it are not those of a system that serves all requests.
    pub fn hollow(&self) -> bool {
        self.saturated() || self.censored() > 0 || self.loses_any()
    }

    /// Whether too many requests were rejected or failed with any seed.
    pub(crate) fn loses_any(&self) -> bool {
        self.windows().any(CellMetrics::loses)
    }

    /// Requests of the windows that were rejected or failed.
    pub fn lost(&self) -> u64 {
        self.windows().map(CellMetrics::lost).sum()
    }

    /// Requests of the windows that had not ended.
    pub fn censored(&self) -> u64 {
        self.windows().map(|w| w.censored).sum()
    }

    /// Whether a metric rests on lower bounds.
    pub fn is_bound(&self, metric: Metric) -> bool {
        self.windows().any(|w| metric.is_bound(w))
    }

    /// Whether all cells were left out.
    pub fn skipped(&self) -> bool {
        let skipped = |c: &&CellData| matches!(c.entry.status, CellStatus::Skipped { .. });
        !self.cells.is_empty() && self.cells.iter().all(skipped)
    }
}

fn mean_lengths(requests: &HashMap<String, Vec<RequestRow>>) -> BTreeMap<String, (f64, f64)> {
    let mut sums: BTreeMap<String, (f64, f64, f64)> = BTreeMap::new();
    for row in requests.values().flatten() {
        let sum = sums.entry(row.key.panel.clone()).or_default();
        *sum = (
            sum.0 + f64::from(row.record.prompt_tokens),
            sum.1 + f64::from(row.observed(0.0).expected_tokens),
            sum.2 + 1.0,
        );
    }
    sums.into_iter().map(|(panel, (input, output, n))| (panel, (input / n, output / n))).collect()
}

/// Finds requests that engine systems answered differently although they should agree. Only finished ones are compared: a censored output is a
/// prefix.
fn disagreements(
    manifest: &Manifest,
    cells: &[CellEntry],
    requests: &HashMap<String, Vec<RequestRow>>,
) -> Vec<Disagreement> {
    if !manifest.settings.has_equal_tokens() {
        return Vec::new();
    }
    let is_engine = |name: &str| {
        let systems = &manifest.settings.systems;
        systems.iter().any(|s| s.name == name && matches!(s.serve, SystemConfig::Engine(_)))
            && !manifest.settings.is_synthetic(name)
    };
    let mut first: HashMap<(String, u64), (&str, &str)> = HashMap::new();
    let mut found = Vec::new();
    for entry in cells.iter().filter(|c| c.status == CellStatus::Done {} && is_engine(&c.key.system)) {
        let key = &entry.key;
        let place = format!("{} at {} requests/s, seed {}", key.panel, key.rate, key.seed);
        for row in requests.get(&key.id()).into_iter().flatten() {
            let Some(hash) = row.finished_hash() else { continue };
            match first.get(&(place.clone(), row.request())) {
                None => {
                    first.insert((place.clone(), row.request()), (&key.system, hash));
                }
                Some((_, other)) if *other == hash => {}
                Some((system, _)) => found.push(Disagreement {
                    place: place.clone(),
                    request: row.request(),
                    systems: [(*system).to_string(), key.system.clone()],
                }),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    /// Claims name the configuration's rates, whatever a run multiplied them by.
    #[test]
    fn claims_are_about_the_rates_that_ran() {
        let source = Source::new("fig11.toml", include_str!("../../configs/fig11.toml"));
        for factor in ["1", "0.3"] {
            let cli = Cli::try_parse_from(["experiment", "fig11.toml", "--rates-times", factor]).unwrap();
            let settings = Settings::resolve(&source, &cli.run).unwrap();
            let claims = claims_in(&source, &settings).unwrap();
            let named = claims.iter().filter_map(|claim| match claim.quantity {
                Quantity::Metric { rate: RateChoice::At(rate), .. } => Some(rate),
                _ => None,
            });
            let named: Vec<f64> = named.collect();
            assert!(named.len() > 3);
            let rates = &settings.panels[0].rates;
            assert!(named.iter().filter(|rate| rates.contains(rate)).count() > 2, "{named:?} of {rates:?}");
        }
    }

    /// The oracle's rates above 25 requests/s were left out for all seeds. At 25 it was overloaded with the first and the third.
    #[test]
    fn a_rate_left_out_ends_the_line_of_a_seed_that_was_overloaded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../results/h200/fig7-chat");
        let run = RunData::load(Path::new(folder)).unwrap();
        let capacity = |seed| run.capacity_over("chat", "oracle", |other| other == seed).unwrap();
        let found = [1, 2, 3].map(|seed| (capacity(seed).rate, capacity(seed).known));
        let expected =
            [crate::metrics::Known::Exactly, crate::metrics::Known::AtLeast, crate::metrics::Known::Exactly]
                .map(|known| (25.0, Some(known)));
        assert_eq!(found, expected);
    }
}
