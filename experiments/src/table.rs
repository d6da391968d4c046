//! The table that a run prints.

use std::fmt::Write;

use crate::claims;
use crate::config::FigureConfig;
use crate::metrics::{Capacity, Known, Metric};
use crate::ratios;
use crate::record::CellStatus;
use crate::run_data::{CAPACITY_FACTOR, Group, RunData};
use crate::stats::Estimate;
use crate::text_table::{number, render};

/// A column: its heading and metric.
type Shown = (&'static str, Metric);

/// Columns of a run whose figure is the default one.
const DEFAULT: [Shown; 11] = [
    ("norm. latency", Metric::NormalizedLatency),
    ("P50", Metric::NormalizedLatencyP50),
    ("P90", Metric::NormalizedLatencyP90),
    ("P99", Metric::NormalizedLatencyP99),
    ("TTFT", Metric::Ttft),
    ("P90", Metric::TtftP90),
    ("TPOT", Metric::Tpot),
    ("goodput", Metric::Goodput),
    ("tok/s", Metric::Throughput),
    ("running", Metric::Running),
    ("KV use", Metric::KvUsed),
];

/// Columns beside those that the figure shows: what its values are to be judged by.
const BESIDE: [Shown; 5] = [
    ("norm. latency", Metric::NormalizedLatency),
    ("TTFT", Metric::Ttft),
    ("TPOT", Metric::Tpot),
    ("tok/s", Metric::Throughput),
    ("running", Metric::Running),
];

const MEMORY: [Shown; 7] = [
    ("KV tokens", Metric::KvUsed),
    ("reserved", Metric::KvReserved),
    ("internal", Metric::KvInternal),
    ("free, waiting", Metric::KvUnusable),
    ("cached", Metric::KvCached),
    ("running", Metric::Running),
    ("waiting", Metric::Waiting),
];

/// The columns for what a figure shows.
fn columns(figure: &FigureConfig) -> Vec<Shown> {
    let with = |shown: &mut dyn Iterator<Item = Metric>| {
        let own: Vec<Shown> = shown.map(|metric| (metric.name(), metric)).collect();
        let beside = BESIDE.into_iter().filter(|(_, metric)| own.iter().all(|(_, shown)| shown != metric));
        own.iter().copied().chain(beside).collect()
    };
    match figure {
        _ if figure.is_default() => DEFAULT.to_vec(),
        FigureConfig::Rates { rows }
        | FigureConfig::Sweep { rows, .. }
        | FigureConfig::Ablation { rows, .. } => with(&mut rows.iter().copied()),
        FigureConfig::Tradeoff { x, rows } => with(&mut [*x].into_iter().chain(rows.iter().copied())),
        FigureConfig::Speedup { .. } => with(&mut [Metric::Tpot, Metric::Acceptance].into_iter()),
        FigureConfig::Table { columns, .. } => with(&mut columns.iter().copied()),
        FigureConfig::Memory {} => MEMORY.to_vec(),
    }
}

/// The run as text: a table a panel, the sustained rates, and what a reader must know.
pub fn table(run: &RunData) -> String {
    let settings = &run.manifest.settings;
    let columns = columns(&settings.figure);
    let headings = columns.iter().map(|(heading, _)| *heading);
    let header: Vec<&str> = ["system", "rate"].into_iter().chain(headings).chain(["notes"]).collect();
    let mut out = String::new();
    for panel in settings.selected_panels() {
        let _ = writeln!(out, "{} ({})", panel.title, run.panel_subtitle(&panel.name));
        let mut rows = Vec::new();
        for system in settings.selected_systems() {
            let groups = panel.rates.iter().map(|&rate| (rate, run.at(&panel.name, &system.name, rate)));
            let (skipped, ran): (Vec<_>, Vec<_>) =
                groups.filter(|(_, group)| !group.cells.is_empty()).partition(|(_, group)| group.skipped());
            rows.extend(ran.iter().map(|(rate, group)| row(&system.name, *rate, group, &columns)));
            if let (Some(last), false) = (rows.last_mut().and_then(|row| row.last_mut()), skipped.is_empty())
            {
                let rates: Vec<String> = skipped.iter().map(|(rate, _)| rate.to_string()).collect();
                last.push_str(&format!("; left out: {}", rates.join(", ")));
            }
        }
        out.push_str(&render(&header, &rows, 1));
        out.push('\n');
        // One rate, the states of memory, or speed-ups say nothing of how far a system goes; a table has its own rates.
        let is_other = matches!(
            settings.figure,
            FigureConfig::Memory {} | FigureConfig::Speedup { .. } | FigureConfig::Table { .. }
        );
        if panel.rates.len() > 1 && !is_other {
            out.push_str(&capacities(run, &panel.name));
            out.push('\n');
        }
    }
    out.push_str(&ratios::text(run));
    out.push_str(&notes(run));
    out.push_str(&claims(run));
    out
}

fn row(system: &str, rate: f64, group: &Group<'_>, columns: &[Shown]) -> Vec<String> {
    let value = |metric| {
        let found = group.estimate(metric);
        let bound = if found.is_some() && group.is_bound(metric) { ">" } else { "" };
        format!("{bound}{}", estimate(found))
    };
    let values = columns.iter().map(|(_, metric)| value(*metric));
    [system.to_string(), rate.to_string()].into_iter().chain(values).chain([cell_notes(group)]).collect()
}

fn claims(run: &RunData) -> String {
    match &run.claims {
        Ok(_) => claims::text(&claims::judge(run)),
        Err(error) => format!("The claims of its configuration cannot be read by this program: {error}\n"),
    }
}

/// Mean and, with several seeds, half the width of its interval.
fn estimate(estimate: Option<Estimate>) -> String {
    match estimate {
        Some(Estimate { mean, half_width: Some(half), .. }) => {
            format!("{} ±{}", number(Some(mean)), number(Some(half)))
        }
        other => number(other.map(|e| e.mean)),
    }
}

fn cell_notes(group: &Group<'_>) -> String {
    let mut notes = Vec::new();
    if group.saturated() {
        notes.push("saturated".to_string());
    }
    if group.loses() {
        notes.push("overloaded".to_string());
    }
    let sum = |count: fn(&crate::metrics::CellMetrics) -> u64| -> u64 {
        group.cells.iter().filter_map(|c| c.window.as_ref()).map(count).sum()
    };
    for (name, count) in [
        ("censored", sum(|m| m.censored)),
        ("rejected", sum(|m| m.rejected)),
        ("failed", sum(|m| m.failed)),
        ("cancelled", sum(|m| m.cancelled)),
    ] {
        if count > 0 {
            notes.push(format!("{count} {name}"));
        }
    }
    let broken: u64 = group
        .cells
        .iter()
        .filter_map(|c| c.entry.conversations)
        .map(|conversations| conversations.broken)
        .sum();
    if broken > 0 {
        notes.push(format!("{broken} conversations broken off"));
    }
    let voided = group.cells.iter().filter(|c| matches!(c.entry.status, CellStatus::Void { .. })).count();
    if voided > 0 {
        notes.push(format!("{voided} void"));
    }
    notes.join(", ")
}

fn capacities(run: &RunData, panel: &str) -> String {
    let settings = &run.manifest.settings;
    let mut out = format!(
        "Highest rate at which mean normalized latency stays within {CAPACITY_FACTOR}x of its value at the lowest rate:\n"
    );
    for system in settings.selected_systems() {
        let groups = run.rates(panel).iter().map(|&rate| (rate, run.at(panel, &system.name, rate)));
        let lowest = groups.into_iter().find(|(_, group)| !group.cells.is_empty());
        // Its latency there is that of a growing queue, or of a part of the requests: a multiple of it bounds nothing.
        let overloaded = lowest.filter(|(_, group)| group.overloaded());
        let text = match (overloaded, run.capacity(panel, &system.name)) {
            (Some((rate, group)), _) if group.loses() => {
                format!("rejected or failed requests at its lowest already: below {rate} requests/s")
            }
            (Some((rate, _)), Some(_)) => {
                format!("saturated at its lowest already: below {rate} requests/s")
            }
            (_, Some(Capacity { rate, known })) => match known {
                Some(Known::Exactly) => format!("{} requests/s", number(Some(rate))),
                Some(Known::AtLeast) => format!("at least {} requests/s", number(Some(rate))),
                Some(Known::AtMost) => format!("at most {} requests/s", number(Some(rate))),
                None => "not known: requests were unfinished at its limit".into(),
            },
            (_, None) => "not measured".into(),
        };
        let _ = writeln!(out, "  {:<24} {text}", system.name);
    }
    out
}

/// Whether every system of a panel has a growing queue at its lowest rate already.
fn is_saturated_throughout(run: &RunData, panel: &str) -> bool {
    let systems = run.manifest.settings.selected_systems();
    let lowest = systems.filter_map(|system| {
        let groups = run.rates(panel).iter().map(|&rate| run.at(panel, &system.name, rate));
        groups.into_iter().find(|group| !group.cells.is_empty())
    });
    let saturated: Vec<bool> = lowest.map(|group| group.saturated()).collect();
    !saturated.is_empty() && !saturated.contains(&false)
}

fn notes(run: &RunData) -> String {
    let manifest = &run.manifest;
    let settings = &manifest.settings;
    let mut out = format!(
        "{}. {}. {}.\n{}\n",
        manifest.machine.describe_on(settings.device),
        settings.describe_model(),
        settings.describe_memory(),
        settings.describe_slo()
    );
    for line in [run.describe_clocks(), run.describe_making()].into_iter().flatten() {
        let _ = writeln!(out, "{line}");
    }
    match run.seeds() {
        0 | 1 => out.push_str("One seed: no intervals.\n"),
        n => {
            let _ = writeln!(out, "{n} seeds: ± is half a 95% interval over seeds (Student's t).");
        }
    }
    out.push_str(
        "Times in seconds, latencies a token; > marks means with lower bounds of unfinished requests.\n",
    );
    for panel in settings.selected_panels().filter(|panel| is_saturated_throughout(run, &panel.name)) {
        let factor = settings.rates_times / 2.0;
        let _ = writeln!(
            out,
            "In {} every system is saturated at its lowest rate already, which tells little of them: for a machine like this, \
             run it with --rates-times {factor}.",
            panel.name
        );
    }
    for cell in &run.cells {
        if let CellStatus::Void { reason } = &cell.entry.status {
            let _ = writeln!(out, "Void: {}: {reason}", cell.entry.key);
        }
    }
    if let Some(first) = run.disagreements.first() {
        let _ = writeln!(
            out,
            "OUTPUTS DISAGREE: {} requests have other tokens under another system, first request {} of {} ({} and {}).",
            run.disagreements.len(),
            first.request,
            first.place,
            first.systems[0],
            first.systems[1]
        );
    }
    out
}
