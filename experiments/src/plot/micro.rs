//! The figure of a micro-benchmark: times against a size, and their ratios to one line's.

use super::Picture;
use super::axis::Scale;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use crate::claims::caption_line;
use crate::micro::{MicroRecord, Named, describe, judge};

/// Ends of an interval over each other, from which on it is not drawn: it would only flatten what is.
const WIDEST: f64 = 100.0;

/// Ratios above this need a scale of logarithms.
const LINEAR: f64 = 5.0;

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
            let interval = found.interval().filter(is_narrow).map(|(low, high)| (low * 1e3, high * 1e3));
            Some(point(x, found.mean * 1e3, interval))
        };
        plan.xs.iter().filter_map(at).collect()
    };
    let ratios = |panel: &Named, line: &Named| -> Vec<Point> {
        let at = |&x: &u32| {
            let found = record.ratio(&panel.name, [&line.name, &over], x)?;
            Some(point(x, found.ratio, found.interval.filter(is_narrow)))
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
    let columns: Vec<Column> = plan.panels.iter().map(column).collect();
    let largest = columns.iter().flat_map(|column| column.series[1].iter().flatten()).map(|point| point.y);
    let ratio_scale = if largest.fold(0.0, f64::max) > LINEAR { Scale::Log } else { Scale::Linear };
    let series = |line: &Named| Series { name: line.label.clone(), stroke: Stroke::Marked };
    Picture::Lines(Figure {
        series: plan.lines.iter().map(series).collect(),
        x: Horizontal { label: plan.x_label.clone(), scale: Scale::Log2 },
        intervals: Intervals::Bars,
        rows: vec![
            row(["Time", "ms"], Scale::Log),
            row(["Ratio", &format!("to {}", against.to_lowercase())], ratio_scale),
        ],
        columns,
        caption: caption(record),
    })
}

fn is_narrow(&(low, high): &(f64, f64)) -> bool {
    low > 0.0 && high / low <= WIDEST
}

fn caption(record: &MicroRecord) -> Vec<String> {
    let mut lines = vec![format!("{}.", record.plan.what), describe(record)];
    let over = record.over();
    let mut points = record.times.iter().map(|t| (&*t.panel, &*t.line, t.x));
    if points.any(|(panel, line, x)| {
        let times = record.estimate(panel, line, x).and_then(|e| e.interval());
        let ratios = record.ratio(panel, [line, &over], x).and_then(|r| r.interval);
        [times, ratios].iter().flatten().any(|interval| !is_narrow(interval))
    }) {
        lines.push("Intervals that reach 0 or span more than two decades are not drawn.".into());
    }
    lines.extend(judge(record).ok().and_then(|judged| caption_line(&judged)));
    lines
}
