//! Micro-benchmarks: one operation timed alone, in several ways that take turns, against a size. Nothing is served; their
//! records are times.
//!
//! The ways (lines) are measured in turns within every round, so that slow changes of the machine hit all alike. A repeat
//! has a seed of its own, and what that decides is anew (attention: memory, what it holds and where; preemption: tokens and
//! their places); its value at a point is the median over its rounds, and intervals are over repeats.

mod attention;
mod blocks;
mod claims;
mod config;
mod plan;
mod preemption;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use claims::judge;
pub use config::{Heads, MeasureConfig, MicroClaim, MicroConfig, MicroProfile, MicroRun};
pub use plan::{Named, Plan};
pub(crate) use report::describe;
pub use report::text;

use crate::cli::RunArgs;
use crate::config::{Device, Source};
use crate::machine::{Machine, Revision};
use crate::manifest::{Versions, kept_arguments, now, run_name};
use crate::settings::{Profile, hex};
use crate::stats::{Estimate, RatioEstimate};
use crate::{record_file, store};

/// Version of the records' schema.
pub const SCHEMA_VERSION: u32 = 1;

/// The file of the records.
const FILE: &str = "micro.json";

#[cfg(not(feature = "cuda"))]
const NO_GPU: &str =
    "this program was built without GPUs: build it with `--features cuda` (needs no CUDA to build)";

/// What is measured, in all its ways.
trait Subject {
    /// Begins a repeat: anew, all that its seed decides.
    fn renew(&mut self, seed: u64) -> Result<()>;

    /// Seconds that the way `line` takes at `x` of the panel whose value is `panel`.
    fn time(&mut self, panel: u32, x: u32, line: usize) -> Result<f64>;
}

/// The records of a micro-benchmark, as they lie in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroRecord {
    /// Version of the records' schema.
    pub schema_version: u32,
    /// Name of the figure.
    pub name: String,
    /// When it was made, UTC.
    pub started: String,
    /// The command line's arguments; paths without their folders.
    pub arguments: Vec<String>,
    /// The configuration as it was written.
    pub config_text: String,
    /// SHA-256 of it.
    pub config_sha256: String,
    /// Source.
    pub revision: Revision,
    /// Versions of this program and of the compiler that built it.
    pub versions: Versions,
    /// Where it ran.
    pub machine: Machine,
    /// On which device of it.
    pub device: Device,
    /// Threads on a CPU.
    pub threads: u16,
    /// Which profile.
    pub profile: Profile,
    /// What was measured.
    pub measure: MeasureConfig,
    /// How often.
    pub run: MicroRun,
    /// What that means.
    pub plan: Plan,
    /// What was found.
    pub times: Vec<Times>,
}

/// What one repeat found at a point of a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Times {
    /// The panel.
    pub panel: String,
    /// The line.
    pub line: String,
    /// The horizontal value.
    pub x: u32,
    /// Seed of the repeat.
    pub seed: u64,
    /// Seconds, one a round.
    pub seconds: Vec<f64>,
}

impl Times {
    /// Of an even number of rounds, the mean of the middle two.
    pub fn median(&self) -> Option<f64> {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.get(sorted.len() / 2)?;
        let below = sorted.get((sorted.len() - 1) / 2)?;
        Some((middle + below) / 2.0)
    }
}

impl MicroRecord {
    /// Median seconds by repeat, in the order of repeats.
    fn medians(&self, panel: &str, line: &str, x: u32) -> Vec<f64> {
        let at = |times: &&Times| times.panel == panel && times.line == line && times.x == x;
        self.times.iter().filter(at).filter_map(Times::median).collect()
    }

    /// Seconds at a point: the mean over repeats of their medians. None where nothing was measured.
    pub fn estimate(&self, panel: &str, line: &str, x: u32) -> Option<Estimate> {
        Estimate::over_seeds(&self.medians(panel, line, x))
    }

    /// The ratio of two lines at a point, paired by repeat.
    pub fn ratio(&self, panel: &str, [line, over]: [&str; 2], x: u32) -> Option<RatioEstimate> {
        let [own, other] = [line, over].map(|line| self.medians(panel, line, x));
        RatioEstimate::paired(&own.into_iter().zip(other).collect::<Vec<_>>())
    }

    /// The configuration that it was made with.
    ///
    /// # Errors
    /// When this program cannot read it.
    pub(crate) fn config(&self) -> Result<MicroConfig, crate::config::ConfigError> {
        MicroConfig::parse(&Source::new(FILE, &*self.config_text))
    }

    /// The line that others are divided by: the first where the configuration cannot be read.
    pub(crate) fn over(&self) -> String {
        let first = || self.plan.lines.first().map_or_else(String::new, |line| line.name.clone());
        self.config().map_or_else(|_| first(), |config| config.over().to_string())
    }
}

/// Measures what `config` asks for and writes it into a new folder, which it returns; none for a dry run, which says
/// what would be measured to `print`. A run that is interrupted leaves nothing.
///
/// # Errors
/// When an argument means nothing for such a figure, what is measured fails, or the folder cannot be written.
pub fn run(
    source: &Source,
    args: &RunArgs,
    arguments: &[String],
    print: impl FnOnce(&str) -> Result<()>,
) -> Result<Option<PathBuf>> {
    let config = MicroConfig::parse(source).map_err(|e| anyhow!("{e}"))?;
    refuse_arguments(args)?;
    let (mut measure, mut run) = (config.measure, config.run);
    let profile = match (args.device, args.quick, args.full) {
        (Device::Cuda, false, false) => {
            let cuda =
                config.cuda.context("--device cuda: there is no [cuda] table that says what runs there")?;
            measure = cuda.measure;
            cuda.run.apply(&mut run);
            Profile::Default
        }
        (Device::Cuda, ..) => bail!("--quick and --full are for --device cpu"),
        (Device::Cpu, true, _) => {
            config.quick.apply(&mut run);
            Profile::Quick
        }
        (Device::Cpu, _, true) => {
            config.full.apply(&mut run);
            Profile::Full
        }
        (Device::Cpu, ..) => Profile::Default,
    };
    run.repeats = args.repeats.unwrap_or(run.repeats);
    let plan = Plan::new(&measure);
    let folder = args.out.clone().unwrap_or_else(|| Path::new("results").join(&config.name).join(run_name()));
    store::refuse_a_run(&folder)?;
    if args.dry_run {
        print(&plan.describe(run))?;
        return Ok(None);
    }
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(1024) as u16);
    let threads = args.threads.or(config.threads).unwrap_or_else(cores);
    let started = now();
    let mut subject = subject(&measure, &plan, args.device, threads)?;
    let times = take(subject.as_mut(), &plan, run)?;
    let record = MicroRecord {
        schema_version: SCHEMA_VERSION,
        name: config.name,
        started,
        arguments: kept_arguments(arguments),
        config_text: source.text().to_string(),
        config_sha256: hex(&Sha256::digest(source.text().as_bytes())),
        revision: Revision::current(),
        versions: Versions::this(),
        machine: Machine::this(args.device),
        device: args.device,
        threads,
        profile,
        measure: measure.without_folders(),
        run,
        plan,
        times,
    };
    record_file::write(&record, &folder, FILE)?;
    Ok(Some(folder))
}

fn refuse_arguments(args: &RunArgs) -> Result<()> {
    let given = [
        ("--resume", args.resume.is_some()),
        ("--trace-steps", args.trace_steps),
        ("--trace", !args.trace.is_empty()),
        ("--only", !args.only.is_empty()),
        ("--model", args.model.is_some()),
        ("--rates-times", args.rates_times.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => bail!("{name}: nothing is served in a micro-benchmark: leave it out"),
        None => Ok(()),
    }
}

fn subject(measure: &MeasureConfig, plan: &Plan, device: Device, threads: u16) -> Result<Box<dyn Subject>> {
    match measure {
        MeasureConfig::Attention { heads, kv_dtype, .. } => {
            let needs = attention::Needs::of(plan, (*heads).into(), (*kv_dtype).into());
            match device {
                Device::Cpu => attention::on_cpu(plan, needs, threads),
                Device::Cuda => attention::on_gpu(plan, needs),
            }
        }
        MeasureConfig::Preemption { model, weights, kv_dtype, .. } => {
            let (weights, kv_dtype) = (*weights, *kv_dtype);
            let load = preemption::Load { model, weights, kv_dtype, device, threads };
            Ok(Box::new(preemption::Preemption::new(plan, load)?))
        }
    }
}

/// Measures everything.
fn take(subject: &mut dyn Subject, plan: &Plan, run: MicroRun) -> Result<Vec<Times>> {
    let lines = plan.lines.len();
    let progress = ProgressBar::new(u64::from(run.repeats) * (plan.panels.len() * plan.xs.len()) as u64);
    let mut found = Vec::new();
    for seed in (0..u64::from(run.repeats)).map(|repeat| run.seed.wrapping_add(repeat)) {
        subject.renew(seed)?;
        for panel in &plan.panels {
            for &x in &plan.xs {
                let mut seconds = vec![Vec::new(); lines];
                // The round before the first is not kept: code, buffers and clocks are cold in it.
                for round in 0..=run.rounds as usize {
                    // Each line is first in turn.
                    for line in (0..lines).map(|place| (place + round) % lines) {
                        let took = subject.time(panel.value, x, line)?;
                        if round > 0 {
                            seconds[line].push(took);
                        }
                    }
                }
                progress.inc(1);
                found.extend(plan.lines.iter().zip(seconds).map(|(line, seconds)| Times {
                    panel: panel.name.clone(),
                    line: line.name.clone(),
                    x,
                    seed,
                    seconds,
                }));
            }
        }
    }
    progress.finish_and_clear();
    Ok(found)
}

/// Whether `folder` has the records of a micro-benchmark.
pub fn is_record(folder: &Path) -> bool {
    folder.join(FILE).exists()
}

/// Reads the records in `folder`.
///
/// # Errors
/// When there are none, or they are damaged or of another schema.
pub fn read(folder: &Path) -> Result<MicroRecord> {
    record_file::read(folder, FILE, SCHEMA_VERSION)
}

/// Copies the records in `folder` to the new folder `dest`: they are small as they are.
///
/// # Errors
/// When they cannot be read, or `dest` exists or cannot be written.
pub fn pack(folder: &Path, dest: &Path) -> Result<()> {
    record_file::refuse_existing(dest)?;
    record_file::write(&read(folder)?, dest, FILE)
}
