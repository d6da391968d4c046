//! The table that a figure of traces prints.

use std::fmt::Write;

use super::{Axis, CurveKind, TracesRecord, judge};
use crate::claims;
use crate::text_table::{number, render};

const HEADER: [&str; 8] = ["source", "of", "whose", "mean", "P50", "P95", "distance", "notes"];

/// The records as text: a row a curve, and what papers found.
pub fn text(record: &TracesRecord) -> String {
    let mut rows = Vec::new();
    for source in &record.sources {
        for distribution in &source.distributions {
            for curve in &distribution.curves {
                let (whose, distance) = match curve.kind {
                    CurveKind::Trace => ("trace", None),
                    CurveKind::Fit => ("fit", distribution.distance),
                    CurveKind::Poisson => ("Poisson", None),
                };
                let of = match distribution.of {
                    Axis::Input => "prompt tokens",
                    Axis::Output => "answer tokens",
                    Axis::Gap => "gap / mean gap",
                };
                let values = [Some(curve.mean), Some(curve.p50), Some(curve.p95), distance].map(number);
                let start = [source.name.clone(), of.into(), whose.into()];
                rows.push(start.into_iter().chain(values).chain([curve.what.clone()]).collect());
            }
        }
    }
    let mut out = render(&HEADER, &rows, 3);
    out.push('\n');
    for source in &record.sources {
        let _ = writeln!(out, "{}: {}.", source.name, describe(source));
    }
    match judge(record) {
        Ok(judged) => out.push_str(&claims::text(&judged)),
        Err(error) => {
            let _ = writeln!(out, "The claims cannot be read by this program: {error}");
        }
    }
    out
}

/// Where a source's curves come from.
pub(crate) fn describe(source: &super::SourceRecord) -> String {
    match &source.data {
        Some(data) => format!("{} requests of {}; fit: {}", data.requests, data.file, source.fitted_to),
        None => format!("no trace given (--trace {}=PATH), fit alone: {}", source.name, source.fitted_to),
    }
}
