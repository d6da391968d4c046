//! The numbers of a figure of traces.

use anyhow::{Result, anyhow};
use serde::Serialize;

use super::ClaimNumbers;
use crate::traces::{Axis, CurveKind, TracesRecord, judge};

/// A figure of traces for a document.
#[derive(Debug, Serialize)]
pub(super) struct TracesNumbers {
    started: String,
    commit: String,
    caption: Vec<String>,
    sources: Vec<SourceNumbers>,
    claims: Vec<ClaimNumbers>,
}

#[derive(Debug, Serialize)]
struct SourceNumbers {
    name: String,
    title: String,
    fitted_to: String,
    fitted_requests: u64,
    /// Requests of the trace; none without one.
    requests: Option<u64>,
    curves: Vec<CurveNumbers>,
}

#[derive(Debug, Serialize)]
struct CurveNumbers {
    of: Axis,
    kind: CurveKind,
    what: String,
    mean: f64,
    p50: f64,
    p95: f64,
    /// Of a fit beside a trace: the largest distance between the two functions.
    distance: Option<f64>,
}

impl TracesNumbers {
    pub(super) fn new(record: &TracesRecord, caption: Vec<String>) -> Result<Self> {
        let judged = judge(record).map_err(|error| anyhow!("its claims cannot be read: {error}"))?;
        let sources = record.sources.iter().map(|source| {
            let curves = source.distributions.iter().flat_map(|distribution| {
                distribution.curves.iter().map(|curve| CurveNumbers {
                    of: distribution.of,
                    kind: curve.kind,
                    what: curve.what.clone(),
                    mean: curve.mean,
                    p50: curve.p50,
                    p95: curve.p95,
                    distance: distribution.distance.filter(|_| curve.kind == CurveKind::Fit),
                })
            });
            SourceNumbers {
                name: source.name.clone(),
                title: source.title.clone(),
                fitted_to: source.fitted_to.clone(),
                fitted_requests: source.fitted_requests,
                requests: source.data.as_ref().map(|data| data.requests),
                curves: curves.collect(),
            }
        });
        Ok(Self {
            started: record.started.clone(),
            commit: record.revision.commit.clone(),
            caption,
            sources: sources.collect(),
            claims: judged.iter().map(ClaimNumbers::from).collect(),
        })
    }
}
