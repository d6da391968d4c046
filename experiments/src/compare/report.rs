//! A comparison as text.

use std::fmt;

use super::{Comparison, Subject, Verdict};
use crate::metrics::Better;
use crate::text_table::render;

const HEADER: [&str; 8] = ["panel", "system", "metric", "compared", "new/old", "95% interval", "rates", ""];

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: Vec<Vec<String>> = self
            .lines
            .iter()
            .map(|line| {
                let worse = match line.metric.better() {
                    Better::Lower => line.ratio.ratio > 1.0,
                    Better::Higher => line.ratio.ratio < 1.0,
                };
                vec![
                    line.panel.clone(),
                    line.system.clone(),
                    line.metric.name().to_string(),
                    match &line.subject {
                        Subject::Absolute => "itself".into(),
                        Subject::RelativeTo(system) => format!("ratio to {system}"),
                    },
                    format!("{:.3}", line.ratio.ratio),
                    line.ratio.interval.map_or("-".into(), |(low, high)| format!("{low:.3} to {high:.3}")),
                    line.rates.to_string(),
                    match (line.verdict, worse) {
                        (Verdict::Regression, _) => "REGRESSION".into(),
                        (Verdict::Undecided, _) => "worse, within noise".into(),
                        // What the table prints as 1.000 is no change: packed runs have rounded times.
                        (Verdict::Fine, true) if (line.ratio.ratio - 1.0).abs() >= 5e-4 => {
                            "worse, allowed".into()
                        }
                        (Verdict::Fine, _) => String::new(),
                    },
                ]
            })
            .collect();
        f.write_str(&render(&HEADER, &rows, 4))?;
        for lost in &self.lost {
            writeln!(f, "{}: {}", if lost.fails { "LOST" } else { "Not compared" }, lost.what)?;
        }
        for change in &self.counts {
            writeln!(f, "COUNT CHANGED: {}: {} -> {}", change.what, change.old, change.new)?;
        }
        for remark in &self.remarks {
            writeln!(f, "Note: {remark}.")?;
        }
        let allowed = (self.options.max_regression * 1e8).round() / 1e6;
        let unsure = self.lines.iter().filter(|l| l.verdict == Verdict::Undecided).count();
        let worse = self.lines.iter().filter(|l| l.verdict == Verdict::Regression).count();
        let lost = self.lost.iter().filter(|lost| lost.fails).count();
        match (worse, lost, self.counts.len()) {
            (0, 0, 0) if unsure == 0 => writeln!(f, "Nothing is worse by more than {allowed}%."),
            (0, 0, 0) => writeln!(
                f,
                "Nothing is surely worse by more than {allowed}%; {unsure} figures are on average, within noise."
            ),
            (worse, lost, counts) => writeln!(
                f,
                "{worse} figures are worse by more than {allowed}%, {lost} were lost, {counts} counts changed."
            ),
        }
    }
}
