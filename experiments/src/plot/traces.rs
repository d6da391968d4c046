//! The figure of traces: fig2.

use super::Picture;
use super::axis::Scale;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use crate::claims::caption_line;
use crate::traces::{Axis, CurveKind, SourceRecord, TracesRecord, judge};

/// Rows, with the label of their horizontal axis.
const ROWS: [(Axis, &str, &str); 3] = [
    (Axis::Input, "Prompts", "tokens"),
    (Axis::Output, "Answers", "tokens"),
    (Axis::Gap, "Gaps", "gap / mean gap"),
];

/// Curves, in the legend's order.
const CURVES: [(CurveKind, &str, Stroke); 3] = [
    (CurveKind::Trace, "Trace", Stroke::Plain),
    (CurveKind::Fit, "Fit that workloads draw from", Stroke::Dashed),
    (CurveKind::Poisson, "Poisson arrivals", Stroke::Dashed),
];

/// Builds the figure of records.
pub fn traces_figure(record: &TracesRecord) -> Picture {
    let row = |(_, name, x): (Axis, &str, &str)| Row {
        label: [name.into(), "share up to x".into()],
        scale: Scale::Linear,
        height: 1.15,
        x: Some(Horizontal { label: x.into(), scale: Scale::Log }),
    };
    let column = |source: &SourceRecord| Column {
        title: source.title.clone(),
        subtitle: match (&source.data, source.fitted_requests) {
            (Some(data), _) => format!("{} requests", data.requests),
            (None, 0) => "fit to stated means".into(),
            (None, n) => format!("fit to {n} requests"),
        },
        series: ROWS.map(|(of, ..)| CURVES.map(|(kind, ..)| points(source, of, kind)).into()).into(),
    };
    let series = CURVES.map(|(_, name, stroke)| Series { name: name.into(), stroke });
    Picture::Lines(Figure {
        series: series.into(),
        x: Horizontal { label: String::new(), scale: Scale::Log },
        intervals: Intervals::Band,
        rows: ROWS.map(row).into(),
        columns: record.sources.iter().map(column).collect(),
        caption: caption(record),
    })
}

/// The shortest gap shown, over the mean: an axis of logarithms has no end on that side.
const SHORTEST_GAP: f64 = 0.003;

fn points(source: &SourceRecord, of: Axis, kind: CurveKind) -> Vec<Point> {
    let distributions = source.distributions.iter().filter(|distribution| distribution.of == of);
    let curves = distributions.flat_map(|distribution| &distribution.curves);
    let values = curves.filter(|curve| curve.kind == kind).flat_map(|curve| &curve.points);
    let point = |&[x, y]: &[f64; 2]| Point { x, y, interval: None, hollow: false, lower_bound: false };
    let shown = |point: &Point| of != Axis::Gap || point.x >= SHORTEST_GAP;
    values.map(point).filter(shown).collect()
}

fn caption(record: &TracesRecord) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for source in &record.sources {
        let fits = source.distributions.iter().flat_map(|distribution| &distribution.curves);
        let gaps = fits.filter(|curve| curve.kind == CurveKind::Fit && curve.what.starts_with("gamma"));
        let gaps: Vec<String> = gaps.map(|curve| format!("; gaps: {}", curve.what)).collect();
        let trace = match &source.data {
            Some(data) => format!("the trace is {}", data.file),
            None => "no trace was given, this is the fit alone".into(),
        };
        // The figures' font has no section sign.
        let fitted_to = source.fitted_to.replace('\u{a7}', "section ");
        let drawn = source.drawn.map(|n| format!(", {n} requests drawn")).unwrap_or_default();
        lines.push(format!("{}: {trace}; fit: {fitted_to}{drawn}{}.", source.title, gaps.concat()));
    }
    let ticks = record.sources.iter().filter_map(|source| Some((source, source.data.as_ref()?.tick_s?)));
    lines.extend(ticks.map(|(source, tick_s)| {
        format!(
            "{}: the trace counts time in ticks of {tick_s:.1} s, over which requests are spread at random: gaps shorter than \
             that are not its own.",
            source.title
        )
    }));
    lines.push(
        "Idle gaps, of 5 s and more, are left out. A source without arrivals of its own shows none.".into(),
    );
    lines.extend(judge(record).ok().and_then(|judged| caption_line(&judged)));
    lines
}
