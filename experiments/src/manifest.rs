//! What a run was made from: enough to repeat it and to know what its figures may be compared with.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Source;
use crate::machine::{Machine, Revision};
use crate::settings::{Settings, hex};

/// Version of the records' schema. A run of another version is refused with an explanation.
pub const SCHEMA_VERSION: u32 = 1;

/// The manifest of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the records' schema.
    pub schema_version: u32,
    /// When the run began, UTC. Like revision and machine below, that of its first sitting.
    pub started: String,
    /// The command line's arguments; paths without their folders.
    pub arguments: Vec<String>,
    /// What a reader must not overlook: random weights, a scripted system.
    pub labels: Vec<String>,
    /// The configuration as it was written.
    pub config_text: String,
    /// SHA-256 of it.
    pub config_sha256: String,
    /// SHA-256 of the settings below.
    pub settings_sha256: String,
    /// What ran.
    pub settings: Settings,
    /// Seed of each repeat.
    pub seeds: Vec<u64>,
    /// Source.
    pub revision: Revision,
    /// Versions of this program and of the compiler that built it.
    pub versions: Versions,
    /// Where it ran.
    pub machine: Machine,
    /// When, from which source and where its cells ran: one sitting when the run is made, one more each time it is
    /// resumed. Never empty: older manifests have none, and get their first when they are read.
    #[serde(default)]
    pub sittings: Vec<Sitting>,
}

/// A part of a run, made without interruption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sitting {
    /// When it began, UTC.
    pub started: String,
    /// Source.
    pub revision: Revision,
    /// Where it ran.
    pub machine: Machine,
}

/// Versions of what ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Versions {
    /// This crate.
    pub quire: String,
    /// The compiler.
    pub rustc: String,
}

impl Versions {
    /// Of this program.
    pub(crate) fn this() -> Self {
        Self { quire: env!("CARGO_PKG_VERSION").into(), rustc: env!("QUIRE_RUSTC_VERSION").into() }
    }
}

impl Manifest {
    /// The manifest of a run that begins now.
    pub fn new(source: &Source, settings: Settings, arguments: &[String]) -> Self {
        let machine = Machine::this(settings.device);
        let mut manifest = Self {
            schema_version: SCHEMA_VERSION,
            started: now(),
            arguments: kept_arguments(arguments),
            labels: labels(&settings),
            config_text: source.text().to_string(),
            config_sha256: hex(&Sha256::digest(source.text().as_bytes())),
            // Folders do not change what runs, and the settings below are without them.
            settings_sha256: settings.clone().without_folders().sha256(),
            seeds: settings.seeds().collect(),
            settings: settings.without_folders(),
            revision: Revision::current(),
            versions: Versions::this(),
            machine,
            sittings: Vec::new(),
        };
        manifest.complete();
        manifest
    }

    /// Adds the sittings of `other`, which ran cells of the same matrix on the same kind of machine.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.settings.select_also(&other.settings);
        self.labels = labels(&self.settings);
        self.sittings.extend_from_slice(&other.sittings);
    }

    /// Adds the first sitting, which the manifest's own fields tell, where there is none yet.
    pub(crate) fn complete(&mut self) {
        if self.sittings.is_empty() {
            self.sittings.push(Sitting {
                started: self.started.clone(),
                revision: self.revision.clone(),
                machine: self.machine.clone(),
            });
        }
    }
}

fn labels(settings: &Settings) -> Vec<String> {
    let weights = settings.is_dummy().then(|| format!("random weights ({})", settings.model));
    let systems = settings.selected_systems();
    let systems = systems.filter_map(|s| Some(format!("{}: {}", s.name, s.serve.label()?)));
    weights.into_iter().chain(systems).collect()
}

/// The time, for records.
pub(crate) fn now() -> String {
    utc(SystemTime::now(), "-", "T", ":")
}

/// The name of a new run's folder.
pub(crate) fn run_name() -> String {
    utc(SystemTime::now(), "", "-", "")
}

/// The arguments of a command line without the folders of this machine. What `--only` selects has none.
pub(crate) fn kept_arguments(arguments: &[String]) -> Vec<String> {
    let mut before = "";
    let kept = arguments.iter().map(|argument| {
        let selects = before == "--only" || argument.starts_with("--only=");
        before = argument;
        if selects { argument.clone() } else { without_folders(argument) }
    });
    kept.collect()
}

/// An argument of the command line without the folders of this machine.
pub(crate) fn without_folders(argument: &str) -> String {
    let last = |path: &str| path.rsplit(['/', '\\']).next().unwrap_or(path).to_string();
    match argument.split_once('=') {
        Some((name, path)) if !name.contains(['/', '\\']) => format!("{name}={}", last(path)),
        _ => last(argument),
    }
}

/// Date and time in UTC (days to date after Hinnant, "chrono-compatible low-level date algorithms").
fn utc(time: SystemTime, date_sign: &str, between: &str, time_sign: &str) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!(
        "{year:04}{date_sign}{month:02}{date_sign}{day:02}{between}{hour:02}{time_sign}{minute:02}{time_sign}{second:02}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_right() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds), "-", "T", ":");
        assert_eq!(at(0), "1970-01-01T00:00:00");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59");
    }

    #[test]
    fn arguments_lose_the_machines_folders() {
        assert_eq!(without_folders("/home/someone/configs/fig3.toml"), "fig3.toml");
        assert_eq!(without_folders("--quick"), "--quick");
        assert_eq!(without_folders("conv=/home/someone/conv.csv"), "conv=conv.csv");
        assert_eq!(without_folders("/some=one/conv.csv"), "conv.csv");
        let line = ["a/fig3.toml", "--only", "paged/decode", "--only=max/decode", "--out", "b/c"];
        let kept = kept_arguments(&line.map(str::to_string));
        assert_eq!(kept, ["fig3.toml", "--only", "paged/decode", "--only=max/decode", "--out", "c"]);
    }
}
