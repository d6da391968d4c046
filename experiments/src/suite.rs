//! Suites: a fixed small set of measurements that tells whether a change made something worse. See docs/regressions.md.
//!
//! Machines are noisy, so a suite never judges a time by itself: it compares counts that are the same everywhere
//! ([`Part::Counts`]), instructions ([`Part::Instructions`]), the ratio of two revisions' times in turns ([`Part::Base`]),
//! and ratios between systems inside one run ([`Part::Ratios`]).

mod args;
mod base;
mod baseline;
mod callgrind;
mod checkout;
mod config;
mod history;
mod host_path;
mod judge;
mod ratios;
mod replay;
mod report;
mod scripted;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};

pub use args::{HostPathArgs, Part, SuiteArgs};
pub use base::Turns;
pub use baseline::{Baseline, Change};
pub use config::{PathEntry, Profile, ReplayEntry, RunEntry, SuiteConfig, WorkEntry};
pub use history::{HistoryRow, Measured, SystemRatio, append, read, trend};
pub use host_path::walk;
pub use replay::{Counts, replay};
pub use report::{Outcome, PartReport, SuiteReport};

use crate::config::Device;
use crate::machine::{Machine, Revision};
use crate::manifest::{now, run_name};
use crate::plot::{save, with_extension};
use judge::Judge;

/// Runs a suite and writes its summary to `summary.md` in its folder, which is returned.
///
/// # Errors
/// When the suite cannot be read, its summary not written, or what it found not be accepted. A part that fails is red.
pub fn run(args: &SuiteArgs, interrupt: &AtomicBool) -> Result<(SuiteReport, PathBuf)> {
    if args.only.contains(&Part::Base) && args.base.is_none() {
        bail!("--only base runs in turns with a base revision: name it with --base REV");
    }
    if args.base.is_some() && !args.only.is_empty() && !args.only.contains(&Part::Base) {
        bail!("--base is for the part `base`, which --only leaves out: add --only base, or leave out --base");
    }
    let path = SuiteConfig::locate(&args.suite);
    let suite = SuiteConfig::read(&path)?;
    let out = args.out.clone();
    let out =
        out.unwrap_or_else(|| Path::new("results").join(format!("suite-{}", suite.name)).join(run_name()));
    if out.join("summary.md").exists() {
        bail!("{} has a suite's summary already: name another folder with --out", out.display());
    }
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let baseline = Baseline::read(&suite.baseline)?;
    let mut judge = Judge::new(args, &path, &suite, &baseline, &out);
    let parts = Part::ALL.into_iter().filter(|part| args.only.is_empty() || args.only.contains(part));
    let parts = parts.map(|part| {
        eprintln!("suite {}: {}", suite.name, part.name());
        judge.part(part, interrupt)
    });
    let parts = parts.collect();
    let mut report = SuiteReport {
        suite: suite.name.clone(),
        revision: Revision::current(),
        machine: Machine::this(Device::Cpu),
        remarks: Vec::new(),
        parts,
    };
    if args.inject_slow_gemm {
        let what = "For the part `base` this revision was built with a matrix product that is slowed on purpose \
                    (--inject-slow-gemm): what it says is not of the source.";
        report.remarks.push(what.into());
    }
    let (measured, base) = judge.into_measured();
    let summary = out.join("summary.md");
    std::fs::write(&summary, report.to_string())
        .with_context(|| format!("cannot write {}", summary.display()))?;
    if args.accept {
        accept(&suite, baseline, &report, measured, base)?;
    }
    Ok((report, out))
}

/// Makes what was counted the baseline, and adds a row to the history.
fn accept(
    suite: &SuiteConfig,
    mut baseline: Baseline,
    report: &SuiteReport,
    measured: Measured,
    base: Option<String>,
) -> Result<()> {
    if let Some(why) = report.refusal() {
        bail!("{why}: not accepted\n\n{report}");
    }
    if !measured.counts.is_empty() {
        baseline.counts.clone_from(&measured.counts);
    }
    if !measured.instructions.is_empty() {
        baseline.instructions.clone_from(&measured.instructions);
    }
    baseline.write(&suite.baseline)?;
    let (revision, machine) = (report.revision.clone(), report.machine.clone());
    let stem = suite.history.join(&suite.name);
    let rows = with_extension(&stem, "jsonl");
    append(&rows, &HistoryRow { time: now(), revision, machine, base, measured })?;
    save(&trend(&suite.name, &read(&rows)?), &stem)?;
    eprintln!("suite {}: accepted: {} and {}", suite.name, suite.baseline.display(), rows.display());
    Ok(())
}

/// Walks a host path: what callgrind runs.
///
/// # Errors
/// When there is no such path, or it does not work.
pub fn host_path(args: &HostPathArgs) -> Result<()> {
    let suite = SuiteConfig::read(&args.suite)?;
    let entry = suite.path.iter().find(|entry| entry.name == args.path);
    walk(entry.with_context(|| format!("{} has no path `{}`", args.suite.display(), args.path))?, args.steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_named_and_cannot_run_is_an_error() {
        let error = |only, base: Option<&str>| {
            let args = SuiteArgs {
                suite: "ci".into(),
                only: vec![only],
                base: base.map(str::to_string),
                out: None,
                accept: false,
                inject_slow_gemm: false,
            };
            run(&args, &AtomicBool::new(false)).unwrap_err().to_string()
        };
        let named = error(Part::Base, None);
        assert!(named.contains("--base REV"), "{named}");
        let left_out = error(Part::Counts, Some("HEAD"));
        assert!(left_out.contains("--only leaves out"), "{left_out}");
    }
}
