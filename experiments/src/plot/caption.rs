//! What a reader must know to judge a figure.

use crate::claims::{caption_line, judge};
use crate::config::FigureConfig;
use crate::metrics::Metric;
use crate::ratios::describe_limits;
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
    let mut lines = vec![
        format!("{}. {}.", manifest.machine.describe(), settings.describe_model()),
        format!("{}. {} a cell; {intervals}.", settings.describe_memory(), settings.run.describe_size()),
    ];
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
        lines.push(format!("Ratios to \"{}\", whose requests are the same, paired by seed.", label(over)));
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
    if run.any(|cell| cell.saturated() || cell.censored() > 0) {
        marks.push("hollow: the queue grows through the window, or requests were unfinished at the limit");
    }
    if figure.rows().iter().any(|&metric| run.any(|cell| cell.is_bound(metric))) {
        marks.push(match figure {
            FigureConfig::Ablation { .. } => {
                "> or <: unfinished requests count with lower bounds; ?: on both sides"
            }
            _ => "arrow: unfinished requests count with lower bounds",
        });
    }
    if run.any(|cell| cell.skipped()) {
        marks.push("a line ends after its first saturated rate");
    }
    if let FigureConfig::Tradeoff { .. } = figure {
        marks.push("each point is a rate");
    }
    if marks.is_empty() {
        return None;
    }
    let text = marks.join("; ");
    Some(format!("{}{}.", text[..1].to_uppercase(), &text[1..]))
}

fn losses(run: &RunData) -> Vec<String> {
    let (rejected, failed, voided) = run.losses();
    let mut lines = Vec::new();
    if rejected + failed > 0 {
        lines.push(format!(
            "{rejected} requests were rejected and {failed} failed; they count against goodput."
        ));
    }
    if voided > 0 {
        lines.push(format!("{voided} cells are void (the client fell behind) and not shown."));
    }
    lines
}
