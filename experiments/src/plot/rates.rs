//! Figures of lines over the matrix of a run: metrics against the request rate (fig3, fig4), and metrics against a metric
//! (fig10).

use super::axis::Scale;
use super::caption::caption;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use crate::metrics::Metric;
use crate::run_data::RunData;

/// Builds the figure of `rows` against the request rate.
pub(super) fn rate_figure(run: &RunData, rows: &[Metric]) -> Figure {
    let x = Horizontal { label: "Request rate (requests/s)".into(), scale: Scale::Linear };
    let points = |panel: &str, system: &str, metric| points(run, panel, system, metric, Some);
    Figure { intervals: Intervals::Band, ..figure(run, rows, x, points) }
}

/// Builds the figure of `rows` against the metric `x`, a point a rate.
pub(super) fn tradeoff_figure(run: &RunData, x: Metric, rows: &[Metric]) -> Figure {
    let [name, unit] = label(x);
    let horizontal = Horizontal { label: format!("{name} ({unit})"), scale: style(x).0 };
    let points = |panel: &str, system: &str, metric| {
        points(run, panel, system, metric, |rate| Some(run.at(panel, system, rate).estimate(x)?.mean))
    };
    Figure { intervals: Intervals::Bars, ..figure(run, rows, horizontal, points) }
}

fn figure(
    run: &RunData,
    rows: &[Metric],
    x: Horizontal,
    points: impl Fn(&str, &str, Metric) -> Vec<Point>,
) -> Figure {
    let settings = &run.manifest.settings;
    let columns = settings.selected_panels().map(|panel| {
        let series = rows.iter().map(|&metric| {
            settings.selected_systems().map(|system| points(&panel.name, &system.name, metric)).collect()
        });
        Column {
            title: panel.title.clone(),
            subtitle: run.panel_subtitle(&panel.name),
            series: series.collect(),
        }
    });
    let columns = columns.collect();
    let row = |&metric: &Metric| {
        let (scale, height) = style(metric);
        Row { label: label(metric), scale, height, x: None }
    };
    let series = |label: &String| Series { name: label.clone(), stroke: Stroke::Marked };
    Figure {
        series: settings.selected_systems().map(|s| series(&s.label)).collect(),
        x,
        intervals: Intervals::Band,
        rows: rows.iter().map(row).collect(),
        columns,
        caption: caption(run),
    }
}

/// A metric's scale and its row's relative height.
pub(super) fn style(metric: Metric) -> (Scale, f64) {
    match metric {
        Metric::NormalizedLatency => (Scale::Log, 1.35),
        Metric::Ttft
        | Metric::TtftP90
        | Metric::NormalizedLatencyP50
        | Metric::NormalizedLatencyP90
        | Metric::NormalizedLatencyP99
        | Metric::NormalizedLatencyBestClass
        | Metric::NormalizedLatencyWorstClass
        | Metric::TtftBestClass
        | Metric::TtftWorstClass
        | Metric::ItlMax => (Scale::Log, 1.0),
        Metric::ItlP90 | Metric::ItlP99 => (Scale::Log, 1.35),
        _ => (Scale::Linear, 1.0),
    }
}

/// A metric's name and its kind or unit, for an axis.
pub(super) fn label(metric: Metric) -> [String; 2] {
    let (name, unit) = match metric {
        Metric::NormalizedLatency => ("Normalized latency", "mean, s/token"),
        Metric::Ttft => ("TTFT", "mean, s"),
        Metric::Tpot => ("TPOT", "mean, s/token"),
        Metric::Itl => ("ITL (token gaps)", "mean, s"),
        Metric::ItlP50 => ("ITL (token gaps)", "P50, s"),
        Metric::ItlP90 => ("ITL (token gaps)", "P90, s"),
        Metric::ItlP99 => ("ITL (token gaps)", "P99, s"),
        Metric::ItlMax => ("ITL (token gaps)", "longest, s"),
        Metric::Goodput => ("Goodput", "requests/s"),
        Metric::Throughput => ("Throughput", "output tokens/s"),
        Metric::Running => ("Running", "mean sequences"),
        Metric::Waiting => ("Waiting", "mean requests"),
        Metric::KvUsed => ("KV use", "mean share of slots"),
        Metric::KvSaved => ("KV saved by sharing", "mean share"),
        Metric::CachedShare => ("Prompt tokens cached", "share"),
        Metric::NormalizedLatencyBestClass => ("Norm. latency, best class", "mean, s/token"),
        Metric::NormalizedLatencyWorstClass => ("Norm. latency, worst class", "mean, s/token"),
        Metric::TtftBestClass => ("TTFT, best class", "mean, s"),
        Metric::TtftWorstClass => ("TTFT, worst class", "mean, s"),
        Metric::GoodputBestClass => ("Goodput, best class", "requests/s"),
        Metric::GoodputWorstClass => ("Goodput, worst class", "requests/s"),
        Metric::KvInternal => ("KV internal", "mean share"),
        Metric::Preemptions => ("Preemptions", "a request"),
        Metric::SwappedTokens => ("Swapped out", "tokens a request"),
        other => (other.name(), other.unit()),
    };
    [name.into(), unit.into()]
}

fn points(
    run: &RunData,
    panel: &str,
    system: &str,
    metric: Metric,
    x: impl Fn(f64) -> Option<f64>,
) -> Vec<Point> {
    let rates = run.rates(panel);
    let shown = rates.iter().filter_map(|&rate| {
        let at = run.at(panel, system, rate);
        let estimate = at.estimate(metric)?;
        Some(Point {
            x: x(rate)?,
            y: estimate.mean,
            interval: estimate.interval(),
            hollow: at.hollow(),
            lower_bound: at.is_bound(metric),
        })
    });
    shown.collect()
}
