//! What papers found about traces, held against the trace, or against quantiles that were computed from it.

use super::{Axis, Curve, CurveKind, SourceRecord, Statistic, TraceClaim, TracesConfig, TracesRecord};
use crate::claims::{Judged, Verdict, Why};
use crate::config::{ConfigError, Source};
use crate::metrics::Known;

/// Holds the records against the claims of their configuration. A trace is not a sample of something else, so what is
/// counted in it is exact; a fit to a stated value says nothing of that value.
///
/// # Errors
/// When the configuration that the records keep cannot be read.
pub fn judge(record: &TracesRecord) -> Result<Vec<Judged>, ConfigError> {
    let config = TracesConfig::parse(&Source::new("traces.json", &*record.config_text))?;
    Ok(config.claim.iter().map(|claim| judge_claim(record, claim)).collect())
}

fn judge_claim(record: &TracesRecord, claim: &TraceClaim) -> Judged {
    let source = record.sources.iter().find(|source| source.name == claim.trace);
    let curve = source.and_then(|source| curve(source, claim.of));
    let value = curve.map(|curve| match claim.statistic {
        Statistic::Mean => curve.mean,
        Statistic::Median => curve.p50,
        Statistic::P95 => curve.p95,
    });
    let is_counted = |source: &SourceRecord| {
        source.data.is_some() || (source.fitted_requests > 0 && source.drawn.is_none())
    };
    let counted = source.is_some_and(is_counted);
    let drawn = source.is_some_and(|source| source.drawn.is_some());
    let verdict = match value {
        None => Verdict::Undecided(Why::Missing(format!("{} has no such distribution", claim.trace))),
        Some(_) if !counted => Verdict::Undecided(Why::Missing(format!(
            "{}; judging needs the trace (--trace {}=PATH)",
            if drawn { "the fit is drawn from" } else { "the fit was made to have it" },
            claim.trace
        ))),
        Some(value) => {
            let low = claim.at_least.is_none_or(|bound| value >= bound);
            let high = claim.at_most.is_none_or(|bound| value <= bound);
            if low && high { Verdict::Holds } else { Verdict::Fails }
        }
    };
    let of = match claim.of {
        Axis::Input => "prompt tokens",
        Axis::Output => "answer tokens",
        Axis::Gap => "gap over mean gap",
    };
    Judged {
        says: claim.says.clone(),
        source: claim.source.clone(),
        what: format!("{} of {of} in {}", claim.statistic.name(), claim.trace),
        at_least: claim.at_least,
        at_most: claim.at_most,
        value,
        known: Known::Exactly,
        interval: None,
        seeds: 0,
        verdict,
    }
}

/// The trace's curve where there is a trace, else the fit's.
fn curve(source: &SourceRecord, of: Axis) -> Option<&Curve> {
    let curves = &source.distributions.iter().find(|distribution| distribution.of == of)?.curves;
    let kind = |kind| curves.iter().find(move |curve| curve.kind == kind);
    kind(CurveKind::Trace).or(kind(CurveKind::Fit))
}
