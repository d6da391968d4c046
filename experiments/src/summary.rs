//! The summary of a run: one row a cell, for other tools to read.

use std::collections::BTreeSet;
use std::path::Path;

use polars::prelude::DataFrame;

use crate::frame::{Compression, FrameError, column, frame, write_csv, write_parquet};
use crate::metrics::CellMetrics;
use crate::record::CellStatus;
use crate::run_data::{CellData, RunData};
use crate::stats::Distribution;

type Number = fn(&CellMetrics) -> Option<f64>;
type Spread = fn(&CellMetrics) -> &Distribution;

/// Single numbers; each becomes a column for the window and, with `full_` before it, one for the whole cell.
const NUMBERS: [(&str, Number); 35] = [
    ("start_s", |m| Some(m.window.start_s)),
    ("end_s", |m| Some(m.window.end_s)),
    ("requests", |m| Some(m.requests as f64)),
    ("finished", |m| Some(m.finished as f64)),
    ("censored", |m| Some(m.censored as f64)),
    ("rejected", |m| Some(m.rejected as f64)),
    ("failed", |m| Some(m.failed as f64)),
    ("cancelled", |m| Some(m.cancelled as f64)),
    ("cut", |m| Some(m.cut as f64)),
    ("single_token", |m| Some(m.single_token as f64)),
    ("goodput_rps", |m| m.goodput_rps),
    ("finished_rps", |m| Some(m.finished_rps)),
    ("throughput_tps", |m| Some(m.throughput_tps)),
    ("cached_share", |m| m.cached_share),
    ("queue_growth", |m| Some(m.queue_growth)),
    ("saturated", |m| Some(f64::from(u8::from(m.saturated)))),
    ("steps", |m| m.steps.map(|s| s.steps as f64)),
    ("running", |m| m.steps.map(|s| s.running)),
    ("waiting", |m| m.steps.map(|s| s.waiting)),
    ("kv_used", |m| m.steps.map(|s| s.kv_used)),
    ("kv_reserved", |m| m.steps.map(|s| s.kv_reserved)),
    ("kv_internal", |m| m.steps.map(|s| s.kv_internal)),
    ("kv_cached", |m| m.steps.map(|s| s.kv_cached)),
    ("kv_unusable", |m| m.steps.and_then(|s| s.kv_unusable)),
    ("kv_efficiency", |m| m.steps.and_then(|s| s.kv_efficiency)),
    ("kv_saved", |m| m.steps.and_then(|s| s.kv_saved)),
    ("busy", |m| m.steps.map(|s| s.busy)),
    ("padding", |m| m.steps.map(|s| s.padding)),
    ("preempted", |m| m.steps.map(|s| s.preempted as f64)),
    ("swapped_out", |m| m.steps.map(|s| s.swapped_out as f64)),
    ("swapped_in", |m| m.steps.map(|s| s.swapped_in as f64)),
    ("drafted", |m| m.steps.map(|s| s.drafted as f64)),
    ("acceptance", |m| m.steps.and_then(|s| s.acceptance)),
    ("itl_max_s", |m| m.itl.max),
    ("normalized_latency_lower_bounds", |m| Some(m.normalized_latency.lower_bounds as f64)),
];

/// Distributions; each becomes the columns mean, p50, p90 and p99, in seconds.
const SPREADS: [(&str, Spread); 5] = [
    ("normalized_latency", |m| &m.normalized_latency),
    ("ttft", |m| &m.ttft),
    ("tpot", |m| &m.tpot),
    ("itl", |m| &m.itl),
    ("itl_all_tokens", |m| &m.itl_all_tokens),
];

/// The summary as a table.
pub fn summary(run: &RunData) -> DataFrame {
    let cells = &run.cells;
    let keys = || cells.iter().map(|c| &c.entry.key);
    let text = |values: Vec<String>| values;
    let mut columns = vec![
        column("panel", text(keys().map(|k| k.panel.clone()).collect())),
        column("system", text(keys().map(|k| k.system.clone()).collect())),
        column("rate", keys().map(|k| k.rate).collect::<Vec<_>>()),
        column("repeat", keys().map(|k| k.repeat).collect::<Vec<_>>()),
        column("seed", keys().map(|k| k.seed).collect::<Vec<_>>()),
        column("status", text(cells.iter().map(|c| status(&c.entry.status).to_string()).collect())),
    ];
    let full = cells.iter().filter_map(|c| c.full.as_ref());
    let classes: BTreeSet<u8> = full.flat_map(|m| &m.classes).map(|c| c.class).collect();
    type Part = fn(&CellData) -> Option<&CellMetrics>;
    let parts: [(&str, Part); 2] = [("", |c| c.window.as_ref()), ("full_", |c| c.full.as_ref())];
    for (prefix, part) in parts {
        let mut add = |name: String, value: &dyn Fn(&CellMetrics) -> Option<f64>| {
            let values: Vec<Option<f64>> = cells.iter().map(|c| part(c).and_then(value)).collect();
            columns.push(column(&name, values));
        };
        for (name, number) in NUMBERS {
            add(format!("{prefix}{name}"), &number);
        }
        for (name, spread) in SPREADS {
            add(format!("{prefix}{name}_mean_s"), &|m| spread(m).mean);
            add(format!("{prefix}{name}_p50_s"), &|m| spread(m).p50);
            add(format!("{prefix}{name}_p90_s"), &|m| spread(m).p90);
            add(format!("{prefix}{name}_p99_s"), &|m| spread(m).p99);
        }
        for &class in &classes {
            let own = |m: &'_ CellMetrics| m.classes.iter().find(|c| c.class == class).cloned();
            add(format!("{prefix}class{class}_requests"), &|m| Some(own(m)?.requests as f64));
            add(format!("{prefix}class{class}_normalized_latency_mean_s"), &|m| {
                own(m)?.normalized_latency.mean
            });
            add(format!("{prefix}class{class}_ttft_mean_s"), &|m| own(m)?.ttft.mean);
            add(format!("{prefix}class{class}_ttft_p90_s"), &|m| own(m)?.ttft.p90);
            add(format!("{prefix}class{class}_goodput_rps"), &|m| own(m)?.goodput_rps);
        }
    }
    frame(cells.len(), columns)
}

fn status(status: &CellStatus) -> &'static str {
    match status {
        CellStatus::Done {} => "done",
        CellStatus::Void { .. } => "void",
        CellStatus::Skipped { .. } => "skipped",
    }
}

/// Writes summary.parquet and summary.csv into `folder`.
///
/// # Errors
/// When a file cannot be written.
pub fn write_summary(run: &RunData, folder: &Path) -> Result<(), FrameError> {
    let mut table = summary(run);
    write_parquet(&folder.join("summary.parquet"), &mut table, Compression::Small)?;
    write_csv(&folder.join("summary.csv"), &mut table)
}
