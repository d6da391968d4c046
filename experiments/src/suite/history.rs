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

/// Value and interval of a series in a row, if the row has it.
type Value<'a> = Box<dyn Fn(&HistoryRow) -> Option<(f64, Option<(f64, f64)>)> + 'a>;

/// How the figures of a history went: instructions, steps and tokens of replays over the first row's, time over bases'.
pub fn trend(name: &str, rows: &[HistoryRow]) -> Picture {
    let names = |of: fn(&Measured) -> Vec<&String>| -> BTreeSet<&String> {
        rows.iter().flat_map(|row| of(&row.measured)).collect()
    };
    let mut lines: Vec<(String, usize, Value<'_>)> = Vec::new();
    for path in names(|m| m.instructions.keys().collect()) {
        let value = |row: &HistoryRow| Some((*row.measured.instructions.get(path)? as f64 / 1e3, None));
        lines.push((format!("{path}: instructions"), 0, Box::new(value)));
    }
    for replay in names(|m| m.counts.keys().collect()) {
        let work =
            |row: &HistoryRow| row.measured.counts.get(replay).map(|counts| counts.get("steps") as f64);
        let first = rows.iter().find_map(work).unwrap_or(1.0).max(1.0);
        let value = move |row: &HistoryRow| Some((work(row)? / first, None));
        lines.push((format!("{replay}: steps"), 1, Box::new(value)));
    }
    for work in names(|m| m.turns.keys().collect()) {
        let value = |row: &HistoryRow| {
            row.measured.turns.get(work).map(|turns| (turns.ratio.ratio, turns.ratio.interval))
        };
        lines.push((format!("{work}: time"), 2, Box::new(value)));
    }
    let points = |axes: usize, (_, own, value): &(String, usize, Value<'_>)| -> Vec<Point> {
        let shown = (1..).zip(rows).filter(|_| *own == axes);
        let point = |(number, row): (u32, &HistoryRow)| {
            let (y, interval) = value(row)?;
            Some(Point { x: f64::from(number), y, interval, hollow: row.revision.dirty, lower_bound: false })
        };
        shown.filter_map(point).collect()
    };
    let labels =
        [["Instructions", "thousands a step"], ["Steps", "over the first row"], ["Time", "over its base"]];
    let row =
        |label: [&str; 2]| Row { label: label.map(Into::into), scale: Scale::Linear, height: 1.0, x: None };
    let series: Vec<_> =
        (0..labels.len()).map(|axes| lines.iter().map(|l| points(axes, l)).collect()).collect();
    let ends = [rows.first(), rows.last()].map(|row| row.map_or("-", |row| &*row.time));
    Picture::Lines(Figure {
        rows: labels.map(row).into(),
        columns: vec![Column {
            title: format!("Accepted runs of suite {name}"),
            subtitle: format!("{} to {}", ends[0], ends[1]),
            series,
        }],
        series: lines.into_iter().map(|(name, ..)| Series { name, stroke: Stroke::Marked }).collect(),
        x: Horizontal { label: "Accepted run".into(), scale: Scale::Linear },
        intervals: Intervals::Bars,
        caption: vec![
            "Hollow: the source differed from its commit. Times are ratios to the base of each run, not to \
                       each other."
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
        let steps = &figure.columns[0].series[1][1];
        assert_eq!(steps.iter().map(|p| (p.x, p.y)).collect::<Vec<_>>(), [(1.0, 1.0), (2.0, 1.1)]);
        assert!(figure.columns[0].series[0][1].is_empty(), "each line is on axes of its own");
        crate::plot::save(&picture, &dir.path().join("trend")).unwrap();

        std::fs::write(&path, "{\"time\": 1}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with(":1"));
    }
}
