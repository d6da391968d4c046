//! Figures of traces: how long requests are and when they come, beside the fits that the project draws from. Nothing is
//! served for them; their records are distributions.
//!
//! The project carries statistics, not traces. Without `--trace NAME=PATH` a source shows its fit alone, and says so.

mod claims;
mod config;
mod curves;
mod fit;
mod report;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use quire_workloads::{Trace, TraceSource};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use claims::judge;
pub use config::{Statistic, TraceClaim, TracesConfig};
pub use curves::{Axis, Curve, CurveKind, Distribution};
pub use report::text;

use crate::cli::RunArgs;
use crate::config::{Device, Source};
use crate::machine::Revision;
use crate::manifest::{Versions, kept_arguments, now, run_name, without_folders};
use crate::settings::hex;
use crate::{record_file, store};
use config::SourceConfig;
use fit::Fit;

/// Version of the records' schema.
pub const SCHEMA_VERSION: u32 = 1;

/// Of what is drawn: fits that have no function of their own, and places in a tick.
const SEED: u64 = 1;

/// The file of the records.
const FILE: &str = "traces.json";

/// The records of a figure of traces, as they lie in its folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesRecord {
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
    /// What is shown.
    pub sources: Vec<SourceRecord>,
}

/// One source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecord {
    /// Name.
    pub name: String,
    /// Title in the figure.
    pub title: String,
    /// What the fit was computed from, in words.
    pub fitted_to: String,
    /// Requests that it was computed from; 0 when it was not computed from data.
    pub fitted_requests: u64,
    /// Requests that the fit's functions are counted in, where it says how they are drawn and not how they are distributed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drawn: Option<u64>,
    /// The trace beside it, if one was given.
    pub data: Option<DataRecord>,
    /// Its distributions.
    pub distributions: Vec<Distribution>,
}

/// A trace that was read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecord {
    /// The file, without its folder.
    pub file: String,
    /// SHA-256 of it.
    pub sha256: String,
    /// Requests in it.
    pub requests: u64,
    /// Seconds of a tick of its clock, over which the requests of one tick were spread, as they are when it is replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tick_s: Option<f64>,
}

/// Computes the distributions that `config` asks for and writes them into a new folder, which it returns.
///
/// # Errors
/// When an argument means nothing for such a figure, a trace cannot be read, or the folder cannot be written.
pub fn run(config_source: &Source, args: &RunArgs, arguments: &[String]) -> Result<PathBuf> {
    let config = TracesConfig::parse(config_source).map_err(|e| anyhow!("{e}"))?;
    refuse_arguments(args)?;
    let sources = config.sources();
    for trace in &args.trace {
        let names: Vec<&str> = sources.iter().map(|s| &*s.name).collect();
        match &trace.name {
            Some(name) if args.trace.iter().filter(|other| other.name.as_ref() == Some(name)).count() > 1 => {
                bail!("--trace: two traces for {name}: give it one")
            }
            Some(name) if names.contains(&&**name) => {}
            _ => bail!("--trace: write NAME=PATH, with NAME one of {}", names.join(", ")),
        }
    }
    let record = TracesRecord {
        schema_version: SCHEMA_VERSION,
        name: config.name.clone(),
        started: now(),
        arguments: kept_arguments(arguments),
        config_text: config_source.text().to_string(),
        config_sha256: hex(&Sha256::digest(config_source.text().as_bytes())),
        revision: Revision::current(),
        versions: Versions::this(),
        sources: sources
            .iter()
            .map(|source| {
                let trace = args.trace.iter().find(|trace| trace.name.as_ref() == Some(&source.name));
                measure(config_source, source, trace.map(|trace| &*trace.path))
            })
            .collect::<Result<_>>()?,
    };
    let folder = args.out.clone().unwrap_or_else(|| Path::new("results").join(&config.name).join(run_name()));
    store::refuse_a_run(&folder)?;
    record_file::write(&record, &folder, FILE)?;
    Ok(folder)
}

/// What computes nothing has no settings of computing.
fn refuse_arguments(args: &RunArgs) -> Result<()> {
    let given = [
        ("--quick", args.quick),
        ("--full", args.full),
        ("--device", args.device != Device::Cpu),
        ("--dry-run", args.dry_run),
        ("--resume", args.resume.is_some()),
        ("--trace-steps", args.trace_steps),
        ("--only", !args.only.is_empty()),
        ("--model", args.model.is_some()),
        ("--threads", args.threads.is_some()),
        ("--repeats", args.repeats.is_some()),
        ("--rates-times", args.rates_times.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => bail!("{name}: nothing runs for a figure of traces: leave it out"),
        None => Ok(()),
    }
}

fn measure(config: &Source, source: &SourceConfig, path: Option<&Path>) -> Result<SourceRecord> {
    let fit = Fit::of(source, config)?;
    let (trace, data) = path.map(read_trace).transpose()?.unzip();
    Ok(SourceRecord {
        name: source.name.clone(),
        title: source.title.clone(),
        distributions: curves::distributions(&fit, trace.as_ref()),
        fitted_to: fit.source,
        fitted_requests: fit.requests,
        drawn: fit.drawn,
        data,
    })
}

fn read_trace(path: &Path) -> Result<(Trace, DataRecord)> {
    let source = TraceSource::new(path);
    let mut trace = source.load(Path::new("")).map_err(|e| anyhow!("--trace: {e}"))?;
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let tick_s = trace.tick_s().filter(|_| source.spreads(&trace));
    if tick_s.is_some() {
        trace.spread_ticks(SEED);
    }
    let data = DataRecord {
        file: without_folders(&path.display().to_string()),
        sha256: hex(&Sha256::digest(&bytes)),
        requests: trace.requests.len() as u64,
        tick_s,
    };
    Ok((trace, data))
}

/// Whether `folder` has the records of a figure of traces.
pub fn is_record(folder: &Path) -> bool {
    folder.join(FILE).exists()
}

/// Reads the records in `folder`.
///
/// # Errors
/// When there are none, or they are damaged or of another schema.
pub fn read(folder: &Path) -> Result<TracesRecord> {
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
