//! Experiments of a suite: run, and held against committed runs by the ratios between the systems of each.

use std::iter;
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
    let arguments = arguments(entry);
    let settings = settings(&source, &arguments)?;
    check_committed(entry, &old.manifest.settings, &settings)?;
    Experiment::new(source, settings, arguments).run(&Target::New(folder.to_path_buf()), interrupt)?;
    judge(entry, &old, &RunData::load(folder)?)
}

/// What the experiment's command would be given.
fn arguments(entry: &RunEntry) -> Vec<String> {
    let mut arguments = vec![entry.config.display().to_string()];
    match entry.profile {
        Profile::Default => {}
        Profile::Quick => arguments.push("--quick".into()),
        Profile::Full => arguments.push("--full".into()),
    }
    for only in &entry.only {
        arguments.extend(["--only".into(), only.clone()]);
    }
    if entry.rates_times != 1.0 {
        arguments.extend(["--rates-times".into(), entry.rates_times.to_string()]);
    }
    arguments
}

fn settings(source: &Source, arguments: &[String]) -> Result<Settings> {
    let cli = Cli::try_parse_from(iter::once("experiment").chain(arguments.iter().map(String::as_str)))?;
    Settings::resolve(source, &cli.run).map_err(|error| anyhow!("{error}"))
}

/// Refuses a committed run of other cells than the suite's, of which some would silently not be compared.
fn check_committed(entry: &RunEntry, old: &Settings, new: &Settings) -> Result<()> {
    if (old.profile, &old.only, old.rates_times) == (new.profile, &new.only, new.rates_times) {
        return Ok(());
    }
    Err(anyhow!(
        "{} is of another profile, or of other systems or rates: make it again with `experiment {}`",
        entry.baseline.display(),
        arguments(entry).join(" ")
    ))
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::SuiteConfig;
    use super::*;

    #[test]
    fn an_entrys_profile_systems_and_rates_are_the_experiments() {
        let mut entry = RunEntry {
            config: Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/fig3.toml"),
            profile: Profile::Quick,
            only: Vec::new(),
            rates_times: 1.0,
            baseline: PathBuf::new(),
            metrics: Vec::new(),
            max_regression: 0.5,
        };
        let source = Source::read(&entry.config).unwrap();
        let as_written = settings(&source, &arguments(&entry)).unwrap();
        entry.rates_times = 0.5;
        let halved = settings(&source, &arguments(&entry)).unwrap();
        assert_eq!((as_written.run.requests, halved.rates_times), (Some(12), 0.5));
        for (a, b) in as_written.panels.iter().zip(&halved.panels) {
            assert!(a.rates.iter().zip(&b.rates).all(|(a, b)| a / 2.0 == *b), "{:?}, {:?}", a.rates, b.rates);
        }
        entry.only = vec!["pow2".into(), "paged".into()];
        let some = settings(&source, &arguments(&entry)).unwrap();
        assert!(["pow2", "paged"].iter().all(|system| some.selects(system, "decode")));
        assert!(!some.selects("max", "decode"));
        entry.profile = Profile::Full;
        assert_ne!(settings(&source, &arguments(&entry)).unwrap().run.requests, Some(12));
    }

    #[test]
    fn committed_runs_are_of_the_committed_suites_systems_and_rates() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let suite = SuiteConfig::read(&top.join(SuiteConfig::locate("ci"))).unwrap();
        for mut entry in suite.run {
            entry.config = top.join(&entry.config);
            let source = Source::read(&entry.config).unwrap();
            let ours = settings(&source, &arguments(&entry)).unwrap();
            let old = RunData::load(&top.join(&entry.baseline)).unwrap();
            check_committed(&entry, &old.manifest.settings, &ours).unwrap();
            let others = [
                Settings { rates_times: 0.3, ..ours.clone() },
                Settings { only: Vec::new(), ..ours.clone() },
            ];
            for other in others {
                let refused = check_committed(&entry, &other, &ours).unwrap_err().to_string();
                assert!(refused.contains("--rates-times 0.4"), "{refused}");
            }
        }
    }
}
