//! The figure of a micro-benchmark: times against a size, and their ratios to one line's.

use super::Picture;
use super::axis::Scale;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use crate::claims::caption_line;
use crate::micro::{MicroRecord, Named, describe, judge};

/// Builds the figure of records.
pub fn micro_figure(record: &MicroRecord) -> Picture {
    let (plan, over) = (&record.plan, record.over());
    let row = |label: [&str; 2], scale| Row { label: label.map(Into::into), scale, height: 1.6, x: None };
    let against = plan.lines.iter().find(|line| line.name == over).map_or(&*over, |line| &line.label);
    let point =
        |x: u32, y: f64, interval| Point { x: f64::from(x), y, interval, hollow: false, lower_bound: false };
    let times = |panel: &Named, line: &Named| -> Vec<Point> {
        let at = |&x: &u32| {
            let found = record.estimate(&panel.name, &line.name, x)?;
            let interval = found.interval().map(|(low, high)| (low * 1e3, high * 1e3));
            Some(point(x, found.mean * 1e3, interval))
        };
        plan.xs.iter().filter_map(at).collect()
    };
    let ratios = |panel: &Named, line: &Named| -> Vec<Point> {
        let at = |&x: &u32| {
            let found = record.ratio(&panel.name, [&line.name, &over], x)?;
            Some(point(x, found.ratio, found.interval))
        };
        plan.xs.iter().filter_map(at).collect()
    };
    let column = |panel: &Named| Column {
        title: panel.label.clone(),
        subtitle: String::new(),
        series: vec![
            plan.lines.iter().map(|line| times(panel, line)).collect(),
            plan.lines.iter().map(|line| ratios(panel, line)).collect(),
        ],
    };
    let series = |line: &Named| Series { name: line.label.clone(), stroke: Stroke::Marked };
    Picture::Lines(Figure {
        series: plan.lines.iter().map(series).collect(),
        x: Horizontal { label: plan.x_label.clone(), scale: Scale::Log2 },
        intervals: Intervals::Bars,
        rows: vec![
            row(["Time", "ms"], Scale::Log),
            row(["Ratio", &format!("to {}", against.to_lowercase())], Scale::Linear),
        ],
        columns: plan.panels.iter().map(column).collect(),
        caption: caption(record),
    })
}

fn caption(record: &MicroRecord) -> Vec<String> {
    let mut lines = vec![format!("{}.", record.plan.what), describe(record)];
    lines.extend(judge(record).ok().and_then(|judged| caption_line(&judged)));
    lines
}
