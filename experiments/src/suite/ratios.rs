//! Experiments of a suite: run, and held against committed runs by the ratios between the systems of each.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, anyhow};
use clap::Parser;

use super::config::{Profile, RunEntry};
use crate::cli::Cli;
use crate::compare::{Comparison, compare_ratios};
use crate::config::Source;
use crate::experiment::{Experiment, Target};
use crate::run_data::RunData;
use crate::settings::Settings;

/// Runs an entry's experiment in `folder` and compares it.
///
/// # Errors
/// When it cannot run, or the two runs have nothing of what is judged in common.
pub(super) fn run(entry: &RunEntry, folder: &Path, interrupt: &AtomicBool) -> Result<Comparison> {
    let old = RunData::load(&entry.baseline)
        .with_context(|| format!("the committed run {}", entry.baseline.display()))?;
    let source = Source::read(&entry.config).map_err(|error| anyhow!("{error}"))?;
    let config = entry.config.display().to_string();
    let profile = match entry.profile {
        Profile::Default => None,
        Profile::Quick => Some("--quick"),
        Profile::Full => Some("--full"),
    };
    let arguments: Vec<&str> = [&*config].into_iter().chain(profile).collect();
    let cli = Cli::try_parse_from(std::iter::once(&"experiment").chain(&arguments))?;
    let settings = Settings::resolve(&source, &cli.run).map_err(|error| anyhow!("{error}"))?;
    let arguments = arguments.into_iter().map(str::to_string).collect();
    Experiment::new(source, settings, arguments).run(&Target::New(folder.to_path_buf()), interrupt)?;
    judge(entry, &old, &RunData::load(folder)?)
}

/// Holds a run against another by what the entry judges.
fn judge(entry: &RunEntry, old: &RunData, new: &RunData) -> Result<Comparison> {
    let mut comparison = compare_ratios(old, new, entry.max_regression).map_err(|what| anyhow!(what))?;
    comparison.lines.retain(|line| entry.metrics.contains(&line.metric));
    comparison.lost.retain(|lost| lost.metric.is_none_or(|metric| entry.metrics.contains(&metric)));
    if comparison.lines.is_empty() && !comparison.lost.iter().any(|lost| lost.fails) {
        return Err(anyhow!(
            "no ratio of the metrics in {} is in both runs: name others in `metrics`",
            entry.config.display()
        ));
    }
    Ok(comparison)
}
