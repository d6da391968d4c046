//! What each system is worth beside one of them: fig12.

use super::caption::caption;
use super::rates::label;
use super::ratios::{Ratio, RatioBar, RatioColumn, RatioFigure, RatioRow};
use crate::config::{PanelConfig, SystemEntry};
use crate::metrics::{Better, Metric};
use crate::run_data::RunData;
use crate::stats::RatioEstimate;

/// Builds the figure of `rows` as ratios to those of `over`.
pub(super) fn ablation_figure(run: &RunData, over: &str, rows: &[Metric]) -> RatioFigure {
    let settings = &run.manifest.settings;
    let systems: Vec<&SystemEntry> =
        settings.selected_systems().filter(|system| system.name != over).collect();
    let column = |panel: &PanelConfig| RatioColumn {
        title: panel.title.clone(),
        subtitle: subtitle(run, panel),
        bars: rows
            .iter()
            .map(|&metric| systems.iter().map(|s| bar(run, panel, s, over, metric)).collect())
            .collect(),
    };
    let row = |&metric: &Metric| {
        let [name, unit] = label(metric);
        let better = match metric.better() {
            Better::Lower => "less is better",
            Better::Higher => "more is better",
        };
        RatioRow {
            title: format!("{name} ({unit}; {better})"),
            higher_is_better: metric.better() == Better::Higher,
        }
    };
    RatioFigure {
        labels: systems.iter().map(|system| system.label.clone()).collect(),
        rows: rows.iter().map(row).collect(),
        columns: settings.selected_panels().map(column).collect(),
        caption: caption(run),
    }
}

fn bar(run: &RunData, panel: &PanelConfig, system: &SystemEntry, over: &str, metric: Metric) -> RatioBar {
    let missing = |note: &str| RatioBar::Missing(note.into());
    if !system.runs_in(&panel.name) {
        return missing("");
    }
    let Some(&rate) = panel.rates.first() else { return missing("not measured") };
    let [own, other] = [&*system.name, over].map(|name| run.at(&panel.name, name, rate));
    let [values, divisors] = [&own, &other].map(|group| group.by_seed(metric));
    if values.is_empty() || divisors.is_empty() {
        return missing("not measured");
    }
    let pairs: Vec<(f64, f64)> =
        values.iter().filter_map(|(seed, value)| Some((*value, *divisors.get(seed)?))).collect();
    if pairs.is_empty() {
        return missing("no seed in common");
    }
    // A ratio over some of the seeds would be of those alone in which neither is zero.
    if pairs.iter().any(|&(value, divisor)| value <= 0.0 || divisor <= 0.0) {
        let mean = |group: &crate::run_data::Group<'_>| group.estimate(metric).map_or(0.0, |e| e.mean);
        return RatioBar::Missing(format!("{:.3} against {:.3}", mean(&own), mean(&other)));
    }
    let Some(ratio) = RatioEstimate::paired(&pairs) else { return missing("not measured") };
    RatioBar::Ratio(Ratio {
        value: ratio.ratio,
        interval: ratio.interval,
        hollow: own.hollow() || other.hollow(),
        bound: match (own.is_bound(metric), other.is_bound(metric)) {
            (false, false) => "",
            (true, false) => ">",
            (false, true) => "<",
            (true, true) => "?",
        },
    })
}

/// The rate, and the mean lengths as short as a column beside names has room for.
fn subtitle(run: &RunData, panel: &PanelConfig) -> String {
    let rate = panel.rates.first().map_or(String::new(), |rate| format!("{rate} requests/s"));
    match run.panel_lengths(&panel.name) {
        Some((input, output)) => format!("{rate}, {input:.0} in, {output:.0} out"),
        None => rate,
    }
}
