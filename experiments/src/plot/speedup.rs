//! What speculation gains: fig11.

use quire_engine::DraftLength;
use quire_engine::speculation::expected_tokens;

use super::axis::Scale;
use super::caption::caption;
use super::figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
use crate::metrics::Metric;
use crate::run_data::RunData;
use crate::stats::RatioEstimate;
use crate::systems::SystemConfig;

/// Points of a curve.
const POINTS: u32 = 50;

/// Builds the figure of speed-ups over the system `over`.
pub(super) fn speedup_figure(run: &RunData, over: &str) -> Figure {
    let settings = &run.manifest.settings;
    let systems: Vec<_> = settings.selected_systems().filter(|system| system.name != over).collect();
    // One curve for each draft length that is always the same.
    let mut lengths: Vec<u32> = systems.iter().filter_map(|system| fixed_length(&system.serve)).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let measured = systems.iter().map(|s| Series { name: s.label.clone(), stroke: Stroke::Marked });
    let curves = lengths.iter().map(|&length| Series {
        name: format!("Equation 1, {length} {}", if length == 1 { "token" } else { "tokens" }),
        stroke: Stroke::Dashed,
    });
    let columns = settings.selected_panels().map(|panel| {
        let rates = run.rates(&panel.name);
        let against_rate = systems.iter().map(|system| {
            let at = |&rate: &f64| speedup(run, &panel.name, [&system.name, over], rate, rate);
            rates.iter().filter_map(at).collect()
        });
        let against_acceptance = systems.iter().map(|system| {
            let at = |&rate: &f64| {
                let acceptance = run.at(&panel.name, &system.name, rate).estimate(Metric::Acceptance)?.mean;
                speedup(run, &panel.name, [&system.name, over], rate, acceptance)
            };
            rates.first().and_then(at).into_iter().collect()
        });
        let none = lengths.iter().map(|_| Vec::new());
        Column {
            title: panel.title.clone(),
            subtitle: run.panel_subtitle(&panel.name),
            series: vec![
                against_rate.chain(none).collect(),
                against_acceptance.chain(lengths.iter().map(|&length| curve(length))).collect(),
            ],
        }
    });
    let row = |unit: &str, x: &str| Row {
        label: ["Speed-up".into(), unit.into()],
        scale: Scale::Linear,
        height: 1.6,
        x: Some(Horizontal { label: x.into(), scale: Scale::Linear }),
    };
    Figure {
        series: measured.chain(curves).collect(),
        x: Horizontal { label: String::new(), scale: Scale::Linear },
        intervals: Intervals::Bars,
        columns: columns.collect(),
        rows: vec![
            row("TPOT ratio", "Request rate (requests/s)"),
            row("at the lowest rate", "Acceptance (share of the proposals looked at)"),
        ],
        caption: caption(run),
    }
}

/// Tokens that a system always proposes; none where it adapts, or does not propose.
fn fixed_length(system: &SystemConfig) -> Option<u32> {
    let SystemConfig::Engine(engine) = system else { return None };
    match engine.speculation.as_ref()?.length {
        DraftLength::Fixed { tokens } => Some(tokens),
        DraftLength::Adaptive { .. } => None,
    }
}

/// How many times as fast as `over` the system gives tokens at a rate, shown at `x`.
fn speedup(run: &RunData, panel: &str, [system, over]: [&str; 2], rate: f64, x: f64) -> Option<Point> {
    let [own, other] = [system, over].map(|name| run.at(panel, name, rate));
    let [values, times] = [&own, &other].map(|group| group.by_seed(Metric::Tpot));
    let pairs: Vec<(f64, f64)> =
        values.iter().filter_map(|(seed, own)| Some((*times.get(seed)?, *own))).collect();
    let ratio = RatioEstimate::paired(&pairs)?;
    Some(Point {
        x,
        y: ratio.ratio,
        interval: ratio.interval,
        hollow: own.hollow() || other.hollow(),
        // Only where the system's own time is known.
        lower_bound: other.is_bound(Metric::Tpot) && !own.is_bound(Metric::Tpot),
    })
}

fn curve(length: u32) -> Vec<Point> {
    let at = |i: u32| {
        let acceptance = f64::from(i) / f64::from(POINTS);
        let y = expected_tokens(acceptance, length);
        Point { x: acceptance, y, interval: None, hollow: false, lower_bound: false }
    };
    (0..=POINTS).map(at).collect()
}
