//! What was rejected or failed, and what that says of the system.

use std::collections::HashMap;
use std::fmt::Write;

use quire_baselines::openai::{is_gone, is_silent};
use quire_workloads::{LoadResult, Outcome, RequestRecord, VoidReason};

/// The longest reason that a line repeats, in letters.
const REASON: usize = 200;

/// How many requests were rejected and failed, each with its most frequent reason; empty where none was.
pub(super) fn describe(records: &[RequestRecord]) -> String {
    let mut text = String::new();
    for (what, of) in [("rejected", rejected as fn(&RequestRecord) -> Option<&str>), ("failed", failed)] {
        let Some((count, reason)) = frequent(records.iter().filter_map(of)) else { continue };
        let separator = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{separator}{count} {what} ({reason})");
    }
    text
}

/// Why a system is not ready after its warm-up: it served none of the requests, and would serve none of the others either, or
/// has not ended one. None of one that stopped, which is the cell's to tell, or where somebody interrupted.
pub(super) fn is_cold(warm_up: &LoadResult) -> Option<String> {
    let ended = |void: &VoidReason| matches!(void, VoidReason::Aborted {} | VoidReason::SystemStopped { .. });
    let records = &warm_up.records;
    let lost = |record: &RequestRecord| rejected(record).or(failed(record)).is_some();
    if records.is_empty() || warm_up.void.iter().any(ended) {
        return None;
    }
    let censored = records.iter().filter(|record| matches!(record.outcome, Outcome::Censored {})).count();
    if censored > 0 {
        return Some(format!("{censored} of its {} warm-up requests did not end in time", records.len()));
    }
    if !records.iter().all(lost) {
        return None;
    }
    let what = describe(records);
    Some(format!("it served none of its {} warm-up requests: {what}", records.len()))
}

/// Why a server counts as gone: from some moment to the cell's end, all requests that ended failed for want of a connection,
/// and more than one. Those that it was answering may be found silent in between, where its machine is gone too.
pub(super) fn gone(records: &[RequestRecord]) -> Option<&str> {
    let mut ended: Vec<(f64, &RequestRecord)> =
        records.iter().filter_map(|record| Some((record.finish_s?, record))).collect();
    ended.sort_by(|a, b| a.0.total_cmp(&b.0));
    let reasons = ended.iter().rev().map(|(_, record)| failed(record));
    let reasons = reasons.filter(|reason| !reason.is_some_and(is_silent));
    let reasons = reasons.map_while(|reason| reason.filter(|reason| is_gone(reason)));
    let reasons: Vec<&str> = reasons.collect();
    // The first in time may be the connection that broke; the last says that there is no server.
    reasons.first().copied().filter(|_| reasons.len() > 1)
}

fn rejected(record: &RequestRecord) -> Option<&str> {
    match &record.outcome {
        Outcome::Rejected { reason } => Some(reason),
        _ => None,
    }
}

fn failed(record: &RequestRecord) -> Option<&str> {
    match &record.outcome {
        Outcome::Failed { reason } => Some(reason),
        _ => None,
    }
}

/// How many reasons there are, and the most frequent one; of equally frequent ones the first.
fn frequent<'a>(reasons: impl Iterator<Item = &'a str>) -> Option<(usize, String)> {
    let mut counts: HashMap<&str, (usize, usize)> = HashMap::new();
    let mut all = 0;
    for reason in reasons {
        counts.entry(reason).or_insert((0, all)).0 += 1;
        all += 1;
    }
    let (reason, _) = counts.into_iter().max_by_key(|(_, (count, place))| (*count, usize::MAX - place))?;
    let line = reason.lines().next().unwrap_or_default();
    let short: String = line.chars().take(REASON).collect();
    let more = if short.len() < reason.len() { "…" } else { "" };
    Some((all, format!("{short}{more}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use quire_workloads::FinishReason;

    fn record(finish_s: f64, outcome: Outcome) -> RequestRecord {
        RequestRecord {
            schema: quire_workloads::RECORD_SCHEMA,
            id: 0,
            intended_s: 0.0,
            sent_s: Some(0.0),
            first_token_s: None,
            token_times_s: Vec::new(),
            finish_s: Some(finish_s),
            outcome,
            prompt_tokens: 1,
            output_tokens: 0,
            max_tokens: 1,
            true_output_len: None,
            preemptions: 0,
            cached_tokens: 0,
            output_hash: String::new(),
            synthetic: false,
            turn: None,
            class: None,
            outputs: 1,
        }
    }

    fn failed(at: f64, reason: &str) -> RequestRecord {
        record(at, Outcome::Failed { reason: reason.into() })
    }

    #[test]
    fn the_most_frequent_reason_is_told() {
        let rejected = record(1.0, Outcome::Rejected { reason: "full".into() });
        let records = [failed(1.0, "a"), failed(2.0, "b\nmore"), failed(3.0, "b\nmore"), rejected];
        assert_eq!(describe(&records), "1 rejected (full); 3 failed (b…)");
        assert_eq!(describe(&[]), "");
    }

    #[test]
    fn a_server_is_gone_when_nothing_comes_after() {
        let refused = "it does not take a connection: refused";
        let done = |at| record(at, Outcome::Finished { reason: FinishReason::Stop });
        let dead = [failed(3.0, refused), done(1.0), failed(2.0, "its connection broke off: reset")];
        assert_eq!(gone(&dead), Some(refused));
        assert_eq!(gone(&dead[..2]), None, "one may be an accident");
        let back = [failed(2.0, refused), failed(3.0, refused), done(4.0)];
        assert_eq!(gone(&back), None, "it came back");
        let off = "it does not take a connection within 5 s";
        let silent = failed(4.0, "it was silent for 60 s");
        assert_eq!(gone(&[done(1.0), failed(2.0, off), failed(3.0, off), silent.clone()]), Some(off));
        assert_eq!(gone(&[done(1.0), failed(2.0, off), silent.clone(), silent]), None, "it may be slow");
        let other = [failed(2.0, refused), failed(3.0, "HTTP 500")];
        assert_eq!(gone(&other), None);
    }
}
