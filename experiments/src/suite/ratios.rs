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

/// Holds a run against another by what the entry judges.
fn judge(entry: &RunEntry, old: &RunData, new: &RunData) -> Result<Comparison> {
    let cells = |run: &RunData| (run.manifest.settings.only.clone(), run.manifest.settings.rates_times);
    if cells(old) != cells(new) {
        let baseline = entry.baseline.display();
        return Err(anyhow!(
            "{baseline} is of other systems or rates: make it again with `experiment {}`",
            arguments(entry).join(" ")
        ));
    }
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
            assert_eq!(old.manifest.settings.only, ours.only);
            assert_eq!(old.manifest.settings.rates_times, ours.rates_times);
            assert!(judge(&entry, &old, &old).is_ok_and(|same| same.lost.is_empty()));
            entry.baseline = top.join("results/cpu/fig3-quick");
            let other = RunData::load(&entry.baseline).unwrap();
            let refused = judge(&entry, &other, &old).unwrap_err().to_string();
            assert!(
                refused.contains("other systems or rates") && refused.contains("--rates-times"),
                "{refused}"
            );
        }
    }
}
