//! The table that a micro-benchmark prints.

use std::fmt::Write;

use super::{MeasureConfig, MicroRecord, MicroRun, Plan, judge};
use crate::claims;
use crate::stats::RatioEstimate;
use crate::text_table::{number, render};

const HEADER: [&str; 7] = ["line", "x", "microseconds", "fastest", "slowest", "ratio", "interval"];

impl Plan {
    /// What would be measured.
    pub(super) fn describe(&self, run: MicroRun) -> String {
        let names = |all: &[super::Named]| all.iter().map(|n| &*n.name).collect::<Vec<_>>().join(", ");
        let xs: Vec<String> = self.xs.iter().map(u32::to_string).collect();
        format!(
            "{}\npanels: {}\nlines: {}\n{}: {}\n{} repeats of {} rounds: {} times\n",
            self.what,
            names(&self.panels),
            names(&self.lines),
            self.x_label,
            xs.join(", "),
            run.repeats,
            run.rounds,
            (self.panels.len() * self.lines.len() * self.xs.len()) as u64
                * u64::from(run.repeats)
                * u64::from(run.rounds),
        )
    }
}

/// The records as text: a table a panel, and what papers found.
pub fn text(record: &MicroRecord) -> String {
    let (plan, over) = (&record.plan, record.over());
    let mut out = format!("{}.\n", plan.what);
    for panel in &plan.panels {
        let _ = writeln!(out, "\n{} ({})", panel.label, panel.name);
        let mut rows = Vec::new();
        for line in &plan.lines {
            for &x in &plan.xs {
                let micros = |seconds: Option<f64>| number(seconds.map(|s| s * 1e6));
                let all = || {
                    let at = record
                        .times
                        .iter()
                        .filter(|t| t.panel == panel.name && t.line == line.name && t.x == x);
                    at.flat_map(|t| t.seconds.iter().copied())
                };
                let ratio = record.ratio(&panel.name, [&line.name, &over], x);
                rows.push(vec![
                    line.name.clone(),
                    x.to_string(),
                    micros(record.estimate(&panel.name, &line.name, x).map(|e| e.mean)),
                    micros(all().reduce(f64::min)),
                    micros(all().reduce(f64::max)),
                    number(ratio.map(|r| r.ratio)),
                    interval(ratio),
                ]);
            }
        }
        out.push_str(&render(&HEADER, &rows, 1));
    }
    let _ = writeln!(
        out,
        "\nx: {}. Ratios are over {over}, paired by repeat. {}",
        plan.x_label,
        describe(record)
    );
    match judge(record) {
        Ok(judged) => out.push_str(&claims::text(&judged)),
        Err(error) => {
            let _ = writeln!(out, "The claims cannot be read by this program: {error}");
        }
    }
    out
}

fn interval(ratio: Option<RatioEstimate>) -> String {
    match ratio.and_then(|ratio| ratio.interval) {
        Some((low, high)) => format!("{} to {}", number(Some(low)), number(Some(high))),
        None => "-".into(),
    }
}

/// How often and where things were measured: a line for tables and captions.
pub(crate) fn describe(record: &MicroRecord) -> String {
    let MicroRun { repeats, rounds, .. } = record.run;
    let intervals = match repeats {
        1 => "one repeat: no intervals".to_string(),
        n => {
            // A model is loaded once, with its memory.
            let own = match record.measure {
                MeasureConfig::Attention { .. } => "memory",
                MeasureConfig::Preemption { .. } => "places in memory",
            };
            format!("{n} repeats, each with {own} of its own: 95% intervals over them (Student's t)")
        }
    };
    let threads = match record.device {
        crate::config::Device::Cpu => format!(", {} threads", record.threads),
        crate::config::Device::Cuda => String::new(),
    };
    format!("{}{threads}. Medians of {rounds} rounds in turns; {intervals}.", record.machine.describe())
}
