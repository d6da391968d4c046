//! The figure of metrics against request rate: fig3 and its kin.

use super::axis::Scale;
use super::figure::{Column, Figure, Point, Row};
use crate::metrics::Metric;
use crate::run_data::RunData;

/// Rows of the figure: metric, scale and relative height.
const ROWS: [(Metric, Scale, f64); 7] = [
    (Metric::NormalizedLatency, Scale::Log, 1.35),
    (Metric::Ttft, Scale::Log, 1.0),
    (Metric::Tpot, Scale::Linear, 1.0),
    (Metric::Goodput, Scale::Linear, 1.0),
    (Metric::Throughput, Scale::Linear, 1.0),
    (Metric::Running, Scale::Linear, 1.0),
    (Metric::KvUsed, Scale::Linear, 1.0),
];

/// Builds the figure of a run.
pub fn rate_figure(run: &RunData) -> Figure {
    let settings = &run.manifest.settings;
    let rows = ROWS.map(|(metric, scale, height)| Row { label: label(metric), scale, height });
    let columns = settings.selected_panels().map(|panel| {
        let series = ROWS.map(|(metric, ..)| {
            let of = |system: &str| points(run, &panel.name, system, metric);
            settings.selected_systems().map(|system| of(&system.name)).collect()
        });
        Column {
            title: panel.title.clone(),
            subtitle: run.panel_subtitle(&panel.name),
            series: series.into(),
        }
    });
    Figure {
        series: settings.selected_systems().map(|s| s.label.clone()).collect(),
        x_label: "Request rate (requests/s)".into(),
        rows: rows.into(),
        columns: columns.collect(),
        caption: caption(run),
    }
}

fn label(metric: Metric) -> [String; 2] {
    let (name, unit) = match metric {
        Metric::NormalizedLatency => ("Normalized latency", "mean, s/token"),
        Metric::Ttft => ("TTFT", "mean, s"),
        Metric::Tpot => ("TPOT", "mean, s/token"),
        Metric::Goodput => ("Goodput", "requests/s"),
        Metric::Throughput => ("Throughput", "output tokens/s"),
        Metric::Running => ("Running", "mean requests"),
        Metric::KvUsed => ("KV slots used", "mean share"),
        other => (other.name(), other.unit()),
    };
    [name.into(), unit.into()]
}

fn points(run: &RunData, panel: &str, system: &str, metric: Metric) -> Vec<Point> {
    let rates = run.rates(panel);
    let shown = rates.iter().filter_map(|&rate| {
        let at = run.at(panel, system, rate);
        let estimate = at.estimate(metric)?;
        Some(Point {
            x: rate,
            y: estimate.mean,
            interval: estimate.interval(),
            hollow: at.saturated() || at.censored() > 0,
            lower_bound: at.is_bound(metric),
        })
    });
    shown.collect()
}

/// What a reader must know to judge the figure.
fn caption(run: &RunData) -> Vec<String> {
    let manifest = &run.manifest;
    let settings = &manifest.settings;
    let seeds = run.seeds();
    let intervals = match seeds {
        0 | 1 => "one seed: no intervals".to_string(),
        n => format!("{n} seeds: bands are 95% intervals over seeds (Student's t)"),
    };
    let mut lines = vec![
        format!("{}. {}.", manifest.machine.describe(), settings.describe_model()),
        format!("{}. {} a cell; {intervals}.", settings.describe_memory(), settings.run.describe_size()),
        settings.describe_slo(),
    ];
    lines.extend(run.describe_making());
    let mut marks = Vec::new();
    if run.any(|cell| cell.saturated()) {
        marks.push("hollow: the queue grows through the window, or requests were unfinished at the limit");
    }
    if run.any(|cell| cell.is_bound(Metric::NormalizedLatency)) {
        marks.push("arrow: unfinished requests count with lower bounds");
    }
    if run.any(|cell| cell.skipped()) {
        marks.push("a line ends after its first saturated rate");
    }
    if !marks.is_empty() {
        let text = marks.join("; ");
        lines.push(format!("{}{}.", text[..1].to_uppercase(), &text[1..]));
    }
    let (rejected, failed, voided) = run.losses();
    if rejected + failed > 0 {
        lines.push(format!(
            "{rejected} requests were rejected and {failed} failed; they count against goodput."
        ));
    }
    if voided > 0 {
        lines.push(format!("{voided} cells are void (the client fell behind) and not shown."));
    }
    lines
}
