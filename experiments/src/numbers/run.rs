//! The numbers of a run: every system at every rate, and the ratios between systems.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{ClaimNumbers, Number};
use crate::claims::measure;
use crate::config::{ClaimConfig, FigureConfig, Quantity, RateChoice};
use crate::metrics::Metric;
use crate::record::CellStatus;
use crate::run_data::{CAPACITY_FACTOR, Group, RunData};

/// Metrics that every run's numbers have, where it has values; beside them those that its figure and its claims name.
const ALWAYS: [Metric; 18] = [
    Metric::NormalizedLatency,
    Metric::NormalizedLatencyP90,
    Metric::Ttft,
    Metric::TtftP90,
    Metric::Tpot,
    Metric::Itl,
    Metric::ItlP99,
    Metric::ItlMax,
    Metric::Goodput,
    Metric::Throughput,
    Metric::Running,
    Metric::Waiting,
    Metric::KvUsed,
    Metric::KvReserved,
    Metric::KvInternal,
    Metric::KvUnusable,
    Metric::KvCached,
    Metric::Acceptance,
];

/// A run for a document.
#[derive(Debug, Serialize)]
pub(super) struct RunNumbers {
    started: String,
    commit: String,
    dirty: bool,
    machine: String,
    os: String,
    features: Vec<String>,
    device: String,
    model: String,
    labels: Vec<String>,
    kv_bytes: u64,
    max_model_len: u32,
    length_scale: f64,
    threads: u16,
    seeds: usize,
    cells: CellCounts,
    rejected: u64,
    failed: u64,
    /// Whether tokens of different systems were compared, and how many requests had different ones.
    outputs_compared: bool,
    disagreements: usize,
    caption: Vec<String>,
    /// The system whose latency is the measure of `rate_at`.
    reference: Option<String>,
    panels: Vec<PanelNumbers>,
    claims: Vec<ClaimNumbers>,
    /// The configuration whose claims these are, where it is not the run's own.
    claims_of: Option<String>,
}

/// What became of the run's cells.
#[derive(Debug, Default, Serialize)]
struct CellCounts {
    all: usize,
    done: usize,
    skipped: usize,
    void: usize,
}

#[derive(Debug, Serialize)]
struct PanelNumbers {
    name: String,
    title: String,
    lengths: String,
    rates: Vec<f64>,
    systems: Vec<SystemNumbers>,
}

#[derive(Debug, Serialize)]
struct SystemNumbers {
    name: String,
    label: String,
    /// Whether chance decides which proposals are accepted.
    synthetic: bool,
    /// Highest rate within [`CAPACITY_FACTOR`] times the reference's latency at its lowest rate; none without a reference.
    rate_at: Option<Number>,
    /// The same over another system's.
    rate_at_over: BTreeMap<String, Number>,
    at: Vec<RateNumbers>,
}

#[derive(Debug, Serialize)]
struct RateNumbers {
    rate: f64,
    saturated: bool,
    skipped: bool,
    censored: u64,
    /// Requests that came, a second: a trace's first do not come at the rate of the whole.
    arrived_rps: Option<f64>,
    metrics: BTreeMap<Metric, Number>,
    /// The same metrics over those of another system, paired by seed.
    over: BTreeMap<String, BTreeMap<Metric, Number>>,
}

impl RunNumbers {
    pub(super) fn new(
        run: &RunData,
        reference: Option<&str>,
        caption: Vec<String>,
        claims: Vec<ClaimNumbers>,
        claims_of: Option<String>,
    ) -> Self {
        let manifest = &run.manifest;
        let settings = &manifest.settings;
        let metrics = metrics(run);
        let (rejected, failed, _) = run.losses();
        Self {
            started: manifest.started.clone(),
            commit: manifest.revision.commit.clone(),
            dirty: manifest.revision.dirty,
            machine: manifest.machine.describe(),
            os: manifest.machine.os.clone(),
            features: manifest.machine.features.clone(),
            device: if settings.device.is_cpu() { "cpu".into() } else { "cuda".into() },
            model: settings.model.clone(),
            labels: manifest.labels.clone(),
            kv_bytes: settings.kv_bytes,
            max_model_len: settings.max_model_len,
            length_scale: settings.length_scale,
            threads: settings.threads,
            seeds: run.seeds(),
            cells: cell_counts(run),
            rejected,
            failed,
            outputs_compared: settings.has_equal_tokens(),
            disagreements: run.disagreements.len(),
            caption,
            reference: reference.map(str::to_string),
            panels: settings
                .selected_panels()
                .map(|panel| self::panel(run, &panel.name, reference, &metrics))
                .collect(),
            claims,
            claims_of,
        }
    }
}

/// The metrics to give, each once.
fn metrics(run: &RunData) -> Vec<Metric> {
    let figure = &run.manifest.settings.figure;
    let x = match figure {
        FigureConfig::Tradeoff { x, .. } => Some(*x),
        _ => None,
    };
    let claimed = run.claims.iter().flatten().filter_map(|claim| match claim.quantity {
        Quantity::Metric { metric, .. } => Some(metric),
        _ => None,
    });
    let mut all: Vec<Metric> =
        ALWAYS.into_iter().chain(figure.rows().iter().copied()).chain(x).chain(claimed).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn cell_counts(run: &RunData) -> CellCounts {
    let mut counts = CellCounts { all: run.manifest.settings.cells().len(), ..CellCounts::default() };
    for cell in &run.cells {
        match cell.entry.status {
            CellStatus::Done {} => counts.done += 1,
            CellStatus::Skipped { .. } => counts.skipped += 1,
            CellStatus::Void { .. } => counts.void += 1,
        }
    }
    counts
}

fn panel(run: &RunData, name: &str, reference: Option<&str>, metrics: &[Metric]) -> PanelNumbers {
    let settings = &run.manifest.settings;
    let title = settings.panels.iter().find(|panel| panel.name == name).map(|panel| panel.title.clone());
    let rate_at = |system: &str, over: Option<&str>| {
        let quantity = Quantity::RateAt { times: CAPACITY_FACTOR, of: reference?.to_string() };
        number(run, name, system, over, quantity)
    };
    let systems = settings.selected_systems().map(|system| {
        let others = settings.selected_systems().filter(|other| other.name != system.name);
        let over =
            others.filter_map(|other| Some((other.name.clone(), rate_at(&system.name, Some(&other.name))?)));
        SystemNumbers {
            name: system.name.clone(),
            label: system.label.clone(),
            synthetic: settings.is_synthetic(&system.name),
            rate_at: rate_at(&system.name, None),
            rate_at_over: over.collect(),
            at: run
                .rates(name)
                .iter()
                .filter_map(|&rate| at(run, name, &system.name, rate, metrics))
                .collect(),
        }
    });
    PanelNumbers {
        name: name.into(),
        title: title.unwrap_or_default(),
        lengths: run.panel_subtitle(name),
        rates: run.rates(name).to_vec(),
        systems: systems.collect(),
    }
}

/// One system at one rate; none where the run has no such cells.
fn at(run: &RunData, panel: &str, system: &str, rate: f64, metrics: &[Metric]) -> Option<RateNumbers> {
    let group = run.at(panel, system, rate);
    if group.cells.is_empty() {
        return None;
    }
    let all = |over: Option<&str>| -> BTreeMap<Metric, Number> {
        let of = |&metric: &Metric| {
            let quantity = Quantity::Metric { metric, rate: RateChoice::At(rate) };
            Some((metric, number(run, panel, system, over, quantity)?))
        };
        metrics.iter().filter_map(of).collect()
    };
    let others = run.manifest.settings.selected_systems().filter(|other| other.name != system);
    let over = others.map(|other| (other.name.clone(), all(Some(&other.name))));
    Some(RateNumbers {
        rate,
        saturated: group.saturated(),
        skipped: group.skipped(),
        censored: group.censored(),
        arrived_rps: arrived(&group),
        metrics: all(None),
        over: over.filter(|(_, metrics)| !metrics.is_empty()).collect(),
    })
}

fn arrived(group: &Group<'_>) -> Option<f64> {
    let windows = || group.cells.iter().filter_map(|cell| cell.window.as_ref());
    let (requests, seconds) =
        windows().fold((0.0, 0.0), |(n, s), w| (n + w.requests as f64, s + w.window.length()));
    (seconds > 0.0).then(|| requests / seconds)
}

/// What a claim about the quantity would be judged by.
fn number(
    run: &RunData,
    panel: &str,
    system: &str,
    over: Option<&str>,
    quantity: Quantity,
) -> Option<Number> {
    let claim = ClaimConfig {
        says: String::new(),
        source: String::new(),
        quantity,
        system: system.into(),
        over: over.map(str::to_string),
        panel: Some(panel.into()),
        at_least: None,
        at_most: None,
        needs: None,
    };
    let measured = measure(run, &claim).ok()?;
    let estimate = measured.estimate?;
    Some(Number {
        value: estimate.value,
        interval: estimate.interval,
        seeds: estimate.seeds,
        known: measured.known.name(),
    })
}
