//! Metrics against a setting: fig8, fig9.

use super::axis::Scale;
use super::caption::caption;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use super::rates::{label, style};
use crate::config::{PanelConfig, SweepScale, SystemEntry};
use crate::metrics::Metric;
use crate::run_data::RunData;

/// Builds the figure of `rows` against the setting that systems differ in.
pub(super) fn sweep_figure(run: &RunData, x: &str, scale: SweepScale, rows: &[Metric]) -> Figure {
    let settings = &run.manifest.settings;
    let mut lines: Vec<(&str, Vec<&SystemEntry>)> = Vec::new();
    for system in settings.selected_systems() {
        let Some(point) = &system.point else { continue };
        match lines.iter_mut().find(|(name, _)| *name == point.line) {
            Some((_, systems)) => systems.push(system),
            None => lines.push((&point.line, vec![system])),
        }
    }
    let scale = match scale {
        SweepScale::Linear => Scale::Linear,
        SweepScale::Log2 => Scale::Log2,
    };
    let column = |panel: &PanelConfig| Column {
        title: panel.title.clone(),
        subtitle: subtitle(run, panel),
        series: rows
            .iter()
            .map(|&metric| lines.iter().map(|(_, systems)| points(run, panel, systems, metric)).collect())
            .collect(),
    };
    let row = |&metric: &Metric| {
        let (scale, height) = style(metric);
        Row { label: label(metric), scale, height, x: None }
    };
    Figure {
        series: lines
            .iter()
            .map(|(name, _)| Series { name: (*name).into(), stroke: Stroke::Marked })
            .collect(),
        x: Horizontal { label: x.into(), scale },
        intervals: Intervals::Band,
        rows: rows.iter().map(row).collect(),
        columns: settings.selected_panels().map(column).collect(),
        caption: caption(run),
    }
}

/// The panel's rate and lengths.
pub(super) fn subtitle(run: &RunData, panel: &PanelConfig) -> String {
    let rate = panel.rates.first().map_or(String::new(), |rate| format!("{rate} requests/s"));
    match run.panel_subtitle(&panel.name) {
        lengths if lengths.is_empty() => rate,
        lengths => format!("{rate}, {lengths}"),
    }
}

fn points(run: &RunData, panel: &PanelConfig, systems: &[&SystemEntry], metric: Metric) -> Vec<Point> {
    let Some(&rate) = panel.rates.first() else { return Vec::new() };
    let at = |system: &&SystemEntry| {
        let group = run.at(&panel.name, &system.name, rate);
        let estimate = group.estimate(metric)?;
        Some(Point {
            x: system.point.as_ref()?.x,
            y: estimate.mean,
            interval: estimate.interval(),
            hollow: group.hollow(),
            lower_bound: group.is_bound(metric),
        })
    };
    let mut points: Vec<Point> = systems.iter().filter_map(at).collect();
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    points
}
