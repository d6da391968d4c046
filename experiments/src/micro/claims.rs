//! What papers found about an operation, held against its times.

use super::{MicroClaim, MicroRecord};
use crate::claims::{Judged, Verdict, Why, verdict};
use crate::config::{ConfigError, panel_of};
use crate::metrics::Known;

/// Holds the records against the claims of their configuration.
///
/// # Errors
/// When the configuration that the records keep cannot be read.
pub fn judge(record: &MicroRecord) -> Result<Vec<Judged>, ConfigError> {
    Ok(record.config()?.claim.iter().map(|claim| judge_claim(record, claim)).collect())
}

fn judge_claim(record: &MicroRecord, claim: &MicroClaim) -> Judged {
    let panel = panel_of(claim.panel.as_deref(), record.plan.panels.iter().map(|panel| &*panel.name));
    // A value, its interval and the repeats that it is over.
    let found = panel.and_then(|panel| match &claim.over {
        Some(over) => record
            .ratio(panel, [&claim.line, over], claim.x)
            .map(|ratio| (ratio.ratio, ratio.interval, ratio.seeds)),
        None => record.estimate(panel, &claim.line, claim.x).map(|e| (e.mean, e.interval(), e.seeds)),
    });
    let verdict = match (claim.needs, found) {
        (Some(device), _) if device != record.device => Verdict::Undecided(Why::Needs(device)),
        (_, None) if panel.is_none() => {
            Verdict::Undecided(Why::NotRun("the run does not have its panel".into()))
        }
        (_, None) => Verdict::Undecided(Why::NotRun("it was not measured in this run".into())),
        (_, Some((value, interval, _))) => verdict(value, interval, (claim.at_least, claim.at_most)),
    };
    let over = claim.over.as_ref().map_or(String::new(), |over| format!(" / {over}"));
    let place = panel.map_or(String::new(), |panel| format!(" in {panel}"));
    Judged {
        says: claim.says.clone(),
        source: claim.source.clone(),
        what: format!("time of {}{over}{place} at {}", claim.line, claim.x),
        at_least: claim.at_least,
        at_most: claim.at_most,
        value: found.map(|found| found.0),
        known: Known::Exactly,
        interval: found.and_then(|found| found.1),
        seeds: found.map_or(0, |found| found.2),
        verdict,
    }
}
