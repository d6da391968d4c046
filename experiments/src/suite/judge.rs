//! The parts of a suite: each measures, judges, and tells.

use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::Result;

use super::args::{Part, SuiteArgs};
use super::baseline::{Baseline, Change};
use super::config::SuiteConfig;
use super::history::{Measured, SystemRatio};
use super::report::{Outcome, PartReport, markdown};
use super::{base, callgrind, checkout, ratios, replay};
use crate::compare::Verdict;

/// Runs parts and keeps what they measured.
pub(super) struct Judge<'a> {
    args: &'a SuiteArgs,
    path: &'a Path,
    suite: &'a SuiteConfig,
    baseline: &'a Baseline,
    out: &'a Path,
    measured: Measured,
    /// The base revision's commit.
    base: Option<String>,
}

impl<'a> Judge<'a> {
    pub(super) fn new(
        args: &'a SuiteArgs,
        path: &'a Path,
        suite: &'a SuiteConfig,
        baseline: &'a Baseline,
        out: &'a Path,
    ) -> Self {
        Self { args, path, suite, baseline, out, measured: Measured::default(), base: None }
    }

    /// What the parts measured, and the base's commit.
    pub(super) fn into_measured(self) -> (Measured, Option<String>) {
        (self.measured, self.base)
    }

    /// Runs a part. One that fails is red: what cannot be judged is not fine.
    pub(super) fn part(&mut self, part: Part, interrupt: &AtomicBool) -> PartReport {
        let report = match part {
            Part::Counts => self.counts(),
            Part::Instructions => self.instructions(),
            Part::Base => self.base(),
            Part::Ratios => self.ratios(interrupt),
        };
        report.unwrap_or_else(|error| PartReport::broken(part, &error))
    }

    fn counts(&mut self) -> Result<PartReport> {
        for entry in &self.suite.replay {
            self.measured.counts.insert(entry.name.clone(), replay(entry)?);
        }
        let counts: usize = self.measured.counts.values().map(|counts| counts.0.len()).sum();
        let changes = self.baseline.changes(&self.measured.counts);
        let number = |count: Option<u64>| count.map_or("-".into(), |count| count.to_string());
        let row = |change: &Change| {
            [change.replay.clone(), change.count.clone(), number(change.old), number(change.new)]
        };
        let mut details = String::new();
        if !changes.is_empty() {
            // Of a replay that one of them lacks, a line says enough.
            let shown = changes.iter().filter(|c| c.count == "steps" || (c.old.is_some() && c.new.is_some()));
            details = markdown(["replay", "count", "accepted", "now"], shown.map(row));
            details.push_str("\nCounts must be equal. If the change is meant, accept it with `--accept`.\n");
        }
        let line = format!(
            "{counts} counts of {} scripted workloads, exactly: {} differ",
            self.suite.replay.len(),
            changes.len()
        );
        let outcome = Outcome::of(!changes.is_empty());
        Ok(PartReport { part: Part::Counts, outcome, line, details, acceptable: true })
    }

    fn instructions(&mut self) -> Result<PartReport> {
        let version = match callgrind::version() {
            Ok(version) => version,
            // What was asked for by name and does not run is not fine.
            Err(why) if self.args.only.contains(&Part::Instructions) => anyhow::bail!("{why}"),
            Err(why) => return Ok(PartReport::skipped(Part::Instructions, why)),
        };
        let (mut rows, mut red, mut acceptable) = (Vec::new(), false, true);
        for entry in &self.suite.path {
            let count = callgrind::instructions(self.path, entry, self.out)?;
            let accepted = self.baseline.instructions.get(&entry.name).copied();
            let over = count > entry.max_instructions;
            let worse = accepted.is_some_and(|old| count as f64 > old as f64 * (1.0 + entry.max_regression));
            let verdict = match (over, worse) {
                (true, _) => "**above the limit**",
                (false, true) => "**worse than accepted**",
                (false, false) => "",
            };
            rows.push([
                entry.name.clone(),
                count.to_string(),
                entry.max_instructions.to_string(),
                accepted.map_or("-".into(), |old| format!("{old} + {}%", entry.max_regression * 100.0)),
                verdict.into(),
            ]);
            red |= over || worse;
            acceptable &= !over;
            self.measured.instructions.insert(entry.name.clone(), count);
        }
        let details = markdown(["path", "instructions a step", "limit", "accepted", ""], rows.into_iter());
        let line = format!("{} host paths, by {version}", self.suite.path.len());
        Ok(PartReport { part: Part::Instructions, outcome: Outcome::of(red), line, details, acceptable })
    }

    fn base(&mut self) -> Result<PartReport> {
        let Some(revision) = &self.args.base else {
            return Ok(PartReport::skipped(Part::Base, "no base revision was named (`--base REV`)"));
        };
        let log = self.out.join("build.log");
        let programs = checkout::build(revision, self.args.inject_slow_gemm, &log)?;
        self.base = Some(programs.commit.clone());
        let (mut rows, mut red) = (Vec::new(), false);
        for entry in &self.suite.work {
            let turns = base::take_turns(entry, &programs)?;
            let verdict = base::judge(entry, &turns);
            let interval = turns.ratio.interval;
            rows.push([
                entry.name.clone(),
                format!("{:.3} s", turns.seconds[0]),
                format!("{:.3} s", turns.seconds[1]),
                format!("{:.3}", turns.ratio.ratio),
                interval.map_or("-".into(), |(low, high)| format!("{low:.3} to {high:.3}")),
                match verdict {
                    Verdict::Regression => {
                        format!("**slower by more than {}%**", entry.max_regression * 100.0)
                    }
                    Verdict::Undecided => "slower, within noise".into(),
                    Verdict::Fine => String::new(),
                },
            ]);
            red |= verdict == Verdict::Regression;
            self.measured.turns.insert(entry.name.clone(), turns);
        }
        let header = ["work", "base", "new", "new/base", "95% interval", ""];
        let mut details = markdown(header, rows.into_iter());
        let groups: u32 = self.suite.work.iter().map(|entry| entry.groups).sum();
        let _ = writeln!(details, "\nThe base is {}. Seconds are means of this machine.", programs.commit);
        let line = format!("{groups} groups of four runs in turns with {revision}");
        Ok(PartReport { part: Part::Base, outcome: Outcome::of(red), line, details, acceptable: !red })
    }

    fn ratios(&mut self, interrupt: &AtomicBool) -> Result<PartReport> {
        let (mut details, mut red, mut lines) = (String::new(), false, 0);
        for entry in &self.suite.run {
            let name = entry.folder();
            let comparison = ratios::run(entry, &self.out.join(&name), interrupt)?;
            red |= comparison.regressed();
            lines += comparison.lines.len();
            let _ = writeln!(details, "{name} against {}:\n\n```\n{comparison}```", entry.baseline.display());
            self.measured.ratios.extend(comparison.lines.iter().map(|line| SystemRatio {
                config: name.clone(),
                panel: line.panel.clone(),
                system: line.system.clone(),
                metric: line.metric,
                ratio: line.ratio.ratio,
            }));
        }
        let line = format!("{lines} ratios between systems of {} experiments", self.suite.run.len());
        Ok(PartReport { part: Part::Ratios, outcome: Outcome::of(red), line, details, acceptable: !red })
    }
}
