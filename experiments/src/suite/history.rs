//! A row for each accepted run, and how its figures went.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::base::Turns;
use super::replay::Counts;
use crate::machine::{Machine, Revision};
use crate::metrics::Metric;
use crate::plot::{Column, Figure, Horizontal, Intervals, Picture, Point, Row, Scale, Series, Stroke};

/// What a run of a suite measured. Parts that did not run are empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Counts by replay.
    pub counts: BTreeMap<String, Counts>,
    /// Instructions of a step by path.
    pub instructions: BTreeMap<String, u64>,
    /// Time over the base revision's by work.
    pub turns: BTreeMap<String, Turns>,
    /// Ratios between systems, over the committed run's.
    pub ratios: Vec<SystemRatio>,
}

/// A ratio between two systems of a run, over the same ratio of the committed run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemRatio {
    /// The configuration.
    pub config: String,
    /// Panel.
    pub panel: String,
    /// System, relative to the last one of the configuration.
    pub system: String,
    /// What is measured.
    pub metric: Metric,
    /// New over old.
    pub ratio: f64,
}

/// An accepted run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryRow {
    /// When it was accepted, UTC.
    pub time: String,
    /// Of which source.
    pub revision: Revision,
    /// Where.
    pub machine: Machine,
    /// The base revision's commit, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// What it measured.
    pub measured: Measured,
}

/// Adds a row to a history, one JSON object a line.
///
/// # Errors
/// When the file cannot be written.
pub fn append(path: &Path, row: &HistoryRow) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(cannot)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path).with_context(cannot)?;
    let line = serde_json::to_string(row).with_context(cannot)?;
    writeln!(file, "{line}").with_context(cannot)
}

/// Reads a history; an empty one where there is no file.
///
/// # Errors
/// When a line of it is no row.
pub fn read(path: &Path) -> Result<Vec<HistoryRow>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let rows = (1..).zip(text.lines()).map(|(number, line)| {
        serde_json::from_str(line).with_context(|| format!("{}:{number}", path.display()))
    });
    rows.collect()
}

/// Axes of the figure: what is on them and in which unit.
const AXES: [[&str; 2]; 3] =
    [["Instructions", "thousands a step"], ["Counts", "over the first row's"], ["Time", "over its base's"]];

/// Counts that are drawn: what they are sums of.
const COUNTS: [(&str, &[&str]); 3] = [
    ("steps", &["steps"]),
    ("tokens computed", &["prefill_tokens", "decode_tokens", "drafted_tokens", "padding_tokens"]),
    ("blocks in use", &["block_steps"]),
];

/// A line of the figure: its name, its axes, and a point for each row that has one.
struct Line {
    name: String,
    axes: usize,
    points: Vec<Point>,
}

impl Line {
    fn new(
        name: String,
        axes: usize,
        rows: &[HistoryRow],
        value: impl Fn(&HistoryRow) -> Option<(f64, Option<(f64, f64)>)>,
    ) -> Self {
        let point = |(number, row): (u32, &HistoryRow)| {
            let (y, interval) = value(row)?;
            Some(Point { x: f64::from(number), y, interval, hollow: row.revision.dirty, lower_bound: false })
        };
        Self { name, axes, points: (1..).zip(rows).filter_map(point).collect() }
    }
}

/// Counts of a row over those of the first row that has the same replay: the geometric mean over replays.
fn over_first(rows: &[HistoryRow], row: &HistoryRow, names: &[&str]) -> Option<f64> {
    let sum = |counts: &Counts| names.iter().map(|name| counts.get(name)).sum::<u64>() as f64;
    let logs = row.measured.counts.iter().filter_map(|(replay, counts)| {
        let first = rows.iter().find_map(|row| row.measured.counts.get(replay))?;
        let log = (sum(counts) / sum(first)).ln();
        log.is_finite().then_some(log)
    });
    let logs: Vec<f64> = logs.collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// How the figures of a history went.
pub fn trend(name: &str, rows: &[HistoryRow]) -> Picture {
    let names = |of: fn(&Measured) -> Vec<&String>| -> BTreeSet<&String> {
        rows.iter().flat_map(|row| of(&row.measured)).collect()
    };
    let mut lines = Vec::new();
    for path in names(|m| m.instructions.keys().collect()) {
        let value = |row: &HistoryRow| Some((*row.measured.instructions.get(path)? as f64 / 1e3, None));
        lines.push(Line::new(path.clone(), 0, rows, value));
    }
    for (what, counts) in COUNTS {
        lines.push(Line::new(what.into(), 1, rows, |row| Some((over_first(rows, row, counts)?, None))));
    }
    for work in names(|m| m.turns.keys().collect()) {
        let ratio = |row: &HistoryRow| row.measured.turns.get(work).map(|turns| turns.ratio);
        lines.push(Line::new(format!("{work} (time)"), 2, rows, |row| {
            ratio(row).map(|ratio| (ratio.ratio, ratio.interval))
        }));
    }
    lines.retain(|line| !line.points.is_empty());
    let shown = (0..AXES.len()).filter(|axes| lines.iter().any(|line| line.axes == *axes));
    let on = |axes: usize| {
        lines.iter().map(|l| if l.axes == axes { l.points.clone() } else { Vec::new() }).collect()
    };
    let row =
        |axes: usize| Row { label: AXES[axes].map(Into::into), scale: Scale::Linear, height: 1.0, x: None };
    let ends = [rows.first(), rows.last()].map(|row| row.map_or("-", |row| &*row.time));
    Picture::Lines(Figure {
        rows: shown.clone().map(row).collect(),
        columns: vec![Column {
            title: format!("Accepted runs of suite {name}"),
            subtitle: format!("{} to {}", ends[0], ends[1]),
            series: shown.map(on).collect(),
        }],
        series: lines.iter().map(|l| Series { name: l.name.clone(), stroke: Stroke::Marked }).collect(),
        x: Horizontal { label: "Accepted run".into(), scale: Scale::Linear },
        intervals: Intervals::Bars,
        caption: vec![
            "Counts: geometric mean over scripted workloads. Times are ratios to the base of each run, not to each \
             other. Hollow: the source differed from its commit."
                .into(),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Device;
    use crate::stats::RatioEstimate;

    fn row(steps: u64) -> HistoryRow {
        let counts = Counts([("steps".to_string(), steps)].into());
        let ratio = RatioEstimate { ratio: 1.01, interval: Some((0.98, 1.04)), seeds: 6 };
        HistoryRow {
            time: "2026-01-01T00:00:00".into(),
            revision: Revision { commit: "abc".into(), dirty: false },
            machine: Machine::this(Device::Cpu),
            base: Some("def".into()),
            measured: Measured {
                counts: [("paged".to_string(), counts)].into(),
                instructions: [("decode".to_string(), 90_000)].into(),
                turns: [("offline".to_string(), Turns { ratio, seconds: [1.0, 1.01] })].into(),
                ratios: vec![],
            },
        }
    }

    #[test]
    fn rows_are_appended_read_back_and_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history/ci.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        let rows = [row(100), row(110)];
        rows.iter().for_each(|row| append(&path, row).unwrap());
        assert_eq!(read(&path).unwrap(), rows);

        let picture = trend("ci", &rows);
        let Picture::Lines(figure) = &picture else { panic!("a figure of lines") };
        let names: Vec<&str> = figure.series.iter().map(|series| &*series.name).collect();
        assert_eq!(
            names,
            ["decode", "steps", "offline (time)"],
            "of what was never counted there is no line"
        );
        let steps = &figure.columns[0].series[1][1];
        assert_eq!(steps[0].x, 1.0);
        assert!((steps[0].y - 1.0).abs() < 1e-9 && (steps[1].y - 1.1).abs() < 1e-9, "{steps:?}");
        assert!(figure.columns[0].series[0][1].is_empty(), "each line is on axes of its own");
        crate::plot::save(&picture, &dir.path().join("trend")).unwrap();

        std::fs::write(&path, "{\"time\": 1}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with(":1"));
    }
}
