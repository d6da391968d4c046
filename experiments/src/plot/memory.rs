//! The figure of KV memory by state: fig1.

use plotters::prelude::RGBColor;

use super::bars::{Bar, BarColumn, BarFigure, BarGroup, Part};
use super::caption::caption;
use crate::metrics::Metric;
use crate::run_data::{Group, RunData};

/// States with a metric of their own; what is left of the memory is free while nobody waits. Neighbours in a bar are clearly
/// lighter or darker than each other, so that print without colours tells them apart; hues are Okabe and Ito's or darker.
const STATES: [(Metric, Part); 5] = [
    (Metric::KvUsed, Part { name: "Tokens", colour: RGBColor(0, 114, 178) }),
    (Metric::KvReserved, Part { name: "Reserved, to be filled", colour: RGBColor(86, 180, 233) }),
    (Metric::KvInternal, Part { name: "Internal fragmentation", colour: RGBColor(165, 55, 0) }),
    (Metric::KvUnusable, Part { name: "Free while requests wait", colour: RGBColor(230, 159, 0) }),
    (Metric::KvCached, Part { name: "Cached for reuse", colour: RGBColor(125, 50, 100) }),
];
const REST: Part = Part { name: "Free, nobody waits", colour: RGBColor(232, 232, 232) };

/// Builds the figure of a run.
pub(super) fn memory_figure(run: &RunData) -> BarFigure {
    let settings = &run.manifest.settings;
    // A state that nothing in the run has would only fill the legend.
    let shown: Vec<(Metric, Part)> = STATES
        .into_iter()
        .filter(|(metric, _)| *metric != Metric::KvCached || run.any(|group| share(group, *metric) > 0.0))
        .collect();
    let columns = settings.selected_panels().map(|panel| BarColumn {
        title: panel.title.clone(),
        subtitle: run.panel_subtitle(&panel.name),
        groups: panel
            .rates
            .iter()
            .map(|&rate| BarGroup {
                title: format!("{rate} requests/s"),
                bars: settings
                    .selected_systems()
                    .map(|system| bar(&run.at(&panel.name, &system.name, rate), &shown))
                    .collect(),
            })
            .collect(),
    });
    BarFigure {
        parts: shown.iter().map(|(_, part)| *part).chain([REST]).collect(),
        labels: settings.selected_systems().map(|s| s.label.clone()).collect(),
        x_label: "KV slots (%), mean over time".into(),
        columns: columns.collect(),
        caption: caption(run),
    }
}

fn share(group: &Group<'_>, metric: Metric) -> f64 {
    group.estimate(metric).map_or(0.0, |e| e.mean)
}

fn bar(group: &Group<'_>, shown: &[(Metric, Part)]) -> Bar {
    let Some(used) = group.estimate(Metric::KvUsed) else {
        let note = if group.skipped() { "left out: saturated below" } else { "not measured" };
        return Bar { parts: Vec::new(), interval: None, note };
    };
    let mut parts: Vec<f64> = shown.iter().map(|(metric, _)| share(group, *metric)).collect();
    parts.push((1.0 - parts.iter().sum::<f64>()).max(0.0));
    Bar { parts, interval: used.interval(), note: "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_differ_in_print_without_colours() {
        let grey = |part: &Part| {
            let RGBColor(red, green, blue) = part.colour;
            0.299 * f64::from(red) + 0.587 * f64::from(green) + 0.114 * f64::from(blue)
        };
        let all: Vec<Part> = STATES.iter().map(|(_, part)| *part).chain([REST]).collect();
        let without_cache: Vec<Part> =
            all.iter().copied().filter(|part| part.name != "Cached for reuse").collect();
        for parts in [all, without_cache] {
            for pair in parts.windows(2) {
                let apart = (grey(&pair[0]) - grey(&pair[1])).abs();
                assert!(apart >= 60.0, "{} and {}: {apart:.0}", pair[0].name, pair[1].name);
            }
        }
    }
}
