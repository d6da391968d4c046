//! What a reader must know to judge a figure.

use crate::cell::{BROKE_PROTOCOL, FELL_BEHIND, SYSTEM_STOPPED};
use crate::claims::{caption_line, judge};
use crate::config::FigureConfig;
use crate::metrics::{LOSS_SHARE, Metric};
use crate::ratios::describe_limits;
use crate::record::CellStatus;
use crate::run_data::RunData;

/// The lines below a run's figure.
pub(super) fn caption(run: &RunData) -> Vec<String> {
    let manifest = &run.manifest;
    let settings = &manifest.settings;
    let bars = matches!(settings.figure, FigureConfig::Memory {});
    let points = !bars && !matches!(settings.figure, FigureConfig::Table { .. });
    let seeds = run.seeds();
    let intervals = match (seeds, &settings.figure) {
        (0 | 1, _) => "one seed: no intervals".to_string(),
        (n, FigureConfig::Rates { .. } | FigureConfig::Sweep { .. }) => {
            format!("{n} seeds: bands are 95% intervals over seeds (Student's t)")
        }
        (n, FigureConfig::Tradeoff { .. }) => {
            format!("{n} seeds: bars are 95% intervals over seeds (Student's t)")
        }
        (n, FigureConfig::Speedup { .. }) => {
            format!("{n} seeds: bars are 95% intervals over seeds, of log-ratios (Student's t)")
        }
        (n, FigureConfig::Ablation { .. }) => {
            format!("{n} seeds: lines are 95% intervals over seeds, of log-ratios (Student's t)")
        }
        (n, FigureConfig::Table { .. }) => {
            format!("{n} seeds: ranges are 95% intervals over seeds, of log-ratios (Student's t)")
        }
        (n, FigureConfig::Memory {}) => {
            format!("{n} seeds: the line in a bar is the 95% interval of tokens over seeds (Student's t)")
        }
    };
    let whose = if settings.has_own() { "" } else { "Client on " };
    let mut lines = vec![
        format!("{whose}{}. {}.", manifest.machine.describe_on(settings.device), settings.describe_model()),
        format!("{}. {} per cell; {intervals}.", settings.describe_memory(), settings.run.describe_size()),
    ];
    lines.extend(run.describe_clocks());
    lines.extend(settings.describe_traces());
    if settings.figure.rows().contains(&Metric::Goodput) {
        lines.push(settings.describe_slo());
    }
    if bars {
        lines.push(
            "Free while requests wait: external fragmentation, and what is kept back or too small for the next one."
                .into(),
        );
    }
    let label = |name| settings.systems.iter().find(|s| &s.name == name).map_or(name, |s| &s.label);
    if let FigureConfig::Ablation { over, .. } = &settings.figure {
        lines.push(format!(
            "Ratios to \"{}\", whose requests are the same, paired by seed; scales are logarithmic.",
            label(over)
        ));
    }
    if let FigureConfig::Speedup { over } = &settings.figure {
        let label = label(over);
        lines.push(format!(
            "Speed-up: mean TPOT of \"{label}\" over the system's, same requests. Dashed: Leviathan et al. (ICML'23), \
             equation 1, if proposals and the rows that verify them cost nothing."
        ));
    }
    let speculates = matches!(settings.figure, FigureConfig::Speedup { .. } | FigureConfig::Ablation { .. });
    if speculates && settings.systems.iter().any(|system| settings.is_synthetic(&system.name)) {
        let line =
            "Chance decides which proposals are accepted (synthetic acceptance): outputs mean nothing.";
        lines.push(line.into());
    }
    lines.extend(conversations(run));
    if let FigureConfig::Table { over, .. } = &settings.figure {
        let label = label(over);
        lines.push(format!("Ratios to \"{label}\", same requests, and beside them the system's own mean."));
        lines.push(describe_limits(settings));
    }
    lines.extend(run.describe_making());
    lines.extend(if points { marks(run) } else { None });
    lines.extend(losses(run));
    lines.extend(run.describe_others());
    lines.extend(caption_line(&judge(run)));
    lines
}

/// When the turns of conversations come, where there are any.
fn conversations(run: &RunData) -> Option<String> {
    let panels: Vec<_> = run.manifest.settings.selected_panels().collect();
    let with: Vec<&str> =
        panels.iter().filter(|p| p.conversations.is_some()).map(|p| p.title.as_str()).collect();
    let what = match with.len() {
        0 => return None,
        n if n == panels.len() => "A turn".to_string(),
        _ => format!("{}: a turn", with.join("; ")),
    };
    Some(format!(
        "{what} is sent when the answer before it has ended and its user has thought. Conversations begin at the request \
         rate over their mean number of turns."
    ))
}

/// What hollow points, arrows and lines that end mean, where there are any.
fn marks(run: &RunData) -> Option<String> {
    let figure = &run.manifest.settings.figure;
    let mut marks = Vec::new();
    let why = hollow(run);
    if !why.is_empty() {
        marks.push(format!("hollow: {}", why.join(", or ")));
    }
    if figure.rows().iter().any(|&metric| run.any(|cell| cell.is_bound(metric))) {
        let bounds = match figure {
            FigureConfig::Ablation { .. } => {
                "> or <: unfinished requests count with lower bounds; ?: on both sides"
            }
            _ => "arrow: unfinished requests count with lower bounds",
        };
        marks.push(bounds.to_string());
    }
    if run.any(|cell| cell.skipped()) {
        marks.push("a line ends after the first rate at which its first seed is overloaded".into());
    }
    if let FigureConfig::Tradeoff { .. } = figure {
        marks.push("each point is a rate".into());
    }
    if marks.is_empty() {
        return None;
    }
    let text = marks.join("; ");
    Some(format!("{}{}.", text[..1].to_uppercase(), &text[1..]))
}

/// Why points are hollow, of the reasons that there are.
fn hollow(run: &RunData) -> Vec<String> {
    let mut why = Vec::new();
    if run.any(|cell| cell.saturated() || cell.censored() > 0) {
        why.push("the queue grows through the window".to_string());
        why.push("requests were unfinished at the limit".into());
    }
    if run.any(|group| group.loses_any()) {
        why.push(format!("more than {}% of requests were rejected or failed", LOSS_SHARE * 100.0));
    }
    why
}

fn losses(run: &RunData) -> Vec<String> {
    let (rejected, failed, _) = run.losses();
    let mut lines = Vec::new();
    if rejected + failed > 0 {
        lines.push(format!(
            "{rejected} requests were rejected and {failed} failed; they count against goodput."
        ));
    }
    lines.extend(voided(run));
    lines
}

/// The longest reason that a caption repeats, in letters.
const REASON: usize = 120;

/// How many cells are void, and why.
fn voided(run: &RunData) -> Option<String> {
    // In the order in which they came.
    let mut kinds: Vec<(&str, usize, &str)> = Vec::new();
    for cell in &run.cells {
        let CellStatus::Void { reason } = &cell.entry.status else { continue };
        let (kind, detail) = void_kind(reason);
        match kinds.iter_mut().find(|known| known.0 == kind) {
            Some(known) => known.1 += 1,
            None => kinds.push((kind, 1, detail)),
        }
    }
    let all: usize = kinds.iter().map(|kind| kind.1).sum();
    let why = kinds.iter().map(|(kind, count, detail)| {
        let count = if kinds.len() > 1 { format!(" {count} times") } else { String::new() };
        let detail =
            if detail.is_empty() { String::new() } else { format!(" ({})", shortened(detail, REASON)) };
        format!("{kind}{count}{detail}")
    });
    let why = why.collect::<Vec<_>>().join(", ");
    match all {
        0 => None,
        1 => Some(format!("1 cell is void and not shown: {why}.")),
        _ => Some(format!("{all} cells are void and not shown: {why}.")),
    }
}

/// The kind of a reason for which a cell is void, and what else of it the first of a kind is to say.
fn void_kind(reason: &str) -> (&str, &str) {
    let known =
        [FELL_BEHIND, SYSTEM_STOPPED, BROKE_PROTOCOL].into_iter().find(|kind| reason.starts_with(kind));
    match known {
        Some(kind) if kind != FELL_BEHIND => (kind, reason[kind.len()..].trim_start_matches([':', ' '])),
        Some(kind) => (kind, ""),
        None => (reason, ""),
    }
}

/// The first line of `text`, with an ellipsis where it is longer than `most` letters.
fn shortened(text: &str, most: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", line[..end].trim_end()),
        None => line.trim_end_matches('.').to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_void_cell_says_why() {
        assert_eq!(void_kind("the client fell behind: 3.0% of requests"), (FELL_BEHIND, ""));
        assert_eq!(void_kind("the system stopped: it panicked: x"), (SYSTEM_STOPPED, "it panicked: x"));
        assert_eq!(void_kind("the system broke the protocol 2 times, first: y").0, BROKE_PROTOCOL);
        assert_eq!(void_kind("another"), ("another", ""));
        assert_eq!((shortened("ab\ncd", 9), shortened("abcdef", 3)), ("ab".into(), "abc…".into()));
    }
}
