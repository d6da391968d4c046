//! A suite as it is written: what runs, and what each part is judged by. Unknown fields are refused everywhere.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use quire_engine::{EngineConfig, MAX_BEAM_WIDTH};
use serde::Deserialize;

use crate::cli::RATE_FACTORS;
use crate::config::Source;
use crate::metrics::Metric;
use crate::names;

/// A suite: `configs/suites/<name>.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SuiteConfig {
    /// Its name, in reports and in its history.
    pub name: String,
    /// The counts that were accepted: written by `--accept`, committed.
    pub baseline: PathBuf,
    /// The folder of the rows and the plot of accepted runs.
    pub history: PathBuf,
    /// Experiments whose systems are held against each other.
    #[serde(default)]
    pub run: Vec<RunEntry>,
    /// Scripted workloads whose counts are compared exactly.
    #[serde(default)]
    pub replay: Vec<ReplayEntry>,
    /// Host paths whose instructions are counted.
    #[serde(default)]
    pub path: Vec<PathEntry>,
    /// Fixed work that the base revision's program and this one's do in turns.
    #[serde(default)]
    pub work: Vec<WorkEntry>,
}

/// An experiment and the committed run that it is compared with, by ratios between systems inside each.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunEntry {
    /// The configuration.
    pub config: PathBuf,
    /// Which of its profiles.
    #[serde(default)]
    pub profile: Profile,
    /// Which of its systems, as `--only`; all when left out.
    #[serde(default)]
    pub only: Vec<String>,
    /// All request rates times this, as `--rates-times`: low enough that a slow machine keeps up as well.
    #[serde(default = "as_written")]
    pub rates_times: f64,
    /// The committed run, made with the same profile, systems and rates.
    pub baseline: PathBuf,
    /// What is judged.
    pub metrics: Vec<Metric>,
    /// By which share a ratio may be worse.
    pub max_regression: f64,
}

/// A profile of a configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// The configuration as it stands.
    #[default]
    Default,
    /// With the changes of `[quick]`.
    Quick,
    /// With the changes of `[full]`.
    Full,
}

/// A scripted workload: arrivals by step, lengths by arithmetic, tokens by a rule. Nothing in it depends on time.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplayEntry {
    /// Its name.
    pub name: String,
    /// Prompts.
    pub prompts: u32,
    /// Samples of each prompt, all but the first forks of it.
    #[serde(default = "one")]
    pub samples: u32,
    /// Beams of a search for each prompt, in place of one output; 0 is none. Outputs are then as long as the longest.
    #[serde(default)]
    pub beams: u32,
    /// Turns of the engine's loop between two prompts' arrivals; 0 has all there at the start.
    pub every: u32,
    /// Shortest and longest prompt, tokens, without the shared ones.
    pub prompt: [u32; 2],
    /// Shortest and longest output, tokens.
    pub output: [u32; 2],
    /// Tokens that all prompts begin with.
    #[serde(default)]
    pub shared_prefix: u32,
    /// Classes that the prompts take turns in.
    #[serde(default = "one")]
    pub classes: u32,
    /// Slots of KV memory.
    pub kv_slots: u32,
    /// The engine.
    #[serde(default)]
    pub engine: EngineConfig,
}

/// A step of the engine's loop over decoding sequences, executor left out.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathEntry {
    /// Its name.
    pub name: String,
    /// Sequences that run.
    pub sequences: u32,
    /// Tokens of each, about.
    pub context: u32,
    /// Count this function alone, with what it calls, as callgrind names it; `*` stands for anything. The whole step when
    /// left out.
    pub function: Option<String>,
    /// Instructions of a step at most.
    pub max_instructions: u64,
    /// By which share they may exceed those that were accepted.
    pub max_regression: f64,
    /// The engine.
    #[serde(default)]
    pub engine: EngineConfig,
}

/// Work of a fixed amount for the `quire` command, which prints its `seconds` in JSON.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkEntry {
    /// Its name.
    pub name: String,
    /// Arguments of the command; both revisions must know them.
    pub arguments: Vec<String>,
    /// Groups of four runs: base, new, new, base, and the other way round in every second group.
    pub groups: u32,
    /// By which share the new revision may take longer.
    pub max_regression: f64,
}

fn one() -> u32 {
    1
}

fn as_written() -> f64 {
    1.0
}

/// Most tokens of a scripted prompt or output: a suite is small.
const MOST_TOKENS: u32 = 1 << 14;

impl SuiteConfig {
    /// Where a suite of this name is: `NAME` stands for `configs/suites/NAME.toml`, a path for itself.
    pub fn locate(name: &str) -> PathBuf {
        if name.ends_with(".toml") {
            return name.into();
        }
        Path::new("configs/suites").join(format!("{name}.toml"))
    }

    /// Reads a suite and checks it.
    ///
    /// # Errors
    /// When it cannot be read or means nothing, with what to change.
    pub fn read(path: &Path) -> Result<Self> {
        let source = Source::read(path).map_err(|error| anyhow!("{error}"))?;
        let suite: Self = source.parse().map_err(|error| anyhow!("{error}"))?;
        suite.check().map_err(|error| error.context(format!("{}", path.display())))?;
        Ok(suite)
    }

    fn check(&self) -> Result<()> {
        names::check("`name`", &self.name).map_err(|message| anyhow!(message))?;
        let names = [
            self.replay.iter().map(|entry| &entry.name).collect::<Vec<_>>(),
            self.path.iter().map(|entry| &entry.name).collect(),
            self.work.iter().map(|entry| &entry.name).collect(),
        ];
        for names in names {
            let mut seen = BTreeSet::new();
            if let Some(name) = names.into_iter().find(|name| !seen.insert(*name)) {
                bail!("two entries are called `{name}`: rename one");
            }
        }
        let mut folders = BTreeSet::new();
        if let Some(entry) = self.run.iter().find(|entry| !folders.insert(entry.folder())) {
            let name = entry.folder();
            bail!(
                "two [[run]]s would be in the folder `{name}`: leave one out, or rename its configuration's file"
            );
        }
        for entry in &self.replay {
            entry.check().map_err(|problem| anyhow!("replay `{}`: {problem}", entry.name))?;
        }
        for entry in &self.path {
            let fits = (1..=4096).contains(&entry.sequences) && (1..=4096).contains(&entry.context);
            if !fits {
                bail!("path `{}`: choose 1 to 4096 sequences and a context of 1 to 4096 tokens", entry.name);
            }
        }
        for entry in &self.work {
            if !(2..=1000).contains(&entry.groups) {
                bail!("work `{}`: {} groups give no interval: choose 2 to 1000", entry.name, entry.groups);
            }
        }
        if let Some(entry) = self.run.iter().find(|entry| !RATE_FACTORS.contains(&entry.rates_times)) {
            let (name, factor) = (entry.folder(), entry.rates_times);
            let (least, most) = RATE_FACTORS.into_inner();
            bail!("run `{name}`: rates_times is {factor}: choose {least} to {most}");
        }
        let shares = self.run.iter().map(|entry| entry.max_regression);
        let shares = shares.chain(self.path.iter().map(|entry| entry.max_regression));
        let mut shares = shares.chain(self.work.iter().map(|entry| entry.max_regression));
        if let Some(share) = shares.find(|share| !(share.is_finite() && *share >= 0.0)) {
            bail!("max_regression is {share}: choose a share of 0 or more, as 0.05 for 5%");
        }
        Ok(())
    }
}

impl RunEntry {
    /// The folder that it runs in, within the suite's.
    pub(super) fn folder(&self) -> String {
        self.config.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl ReplayEntry {
    fn check(&self) -> Result<(), String> {
        for (name, [low, high]) in [("prompt", self.prompt), ("output", self.output)] {
            if low == 0 || low > high || high > MOST_TOKENS {
                return Err(format!("{name} is {low} to {high}: choose 1 to {MOST_TOKENS}, ascending"));
            }
        }
        if self.shared_prefix > MOST_TOKENS {
            return Err(format!("shared_prefix is {}: choose 0 to {MOST_TOKENS}", self.shared_prefix));
        }
        for (name, value, most) in [
            ("prompts", self.prompts, 10_000),
            ("samples", self.samples, 64),
            ("classes", self.classes, 255),
            ("kv_slots", self.kv_slots, 1 << 22),
        ] {
            if !(1..=most).contains(&value) {
                return Err(format!("{name} is {value}: choose 1 to {most}"));
            }
        }
        if self.beams > MAX_BEAM_WIDTH || (self.beams > 0 && self.samples > 1) {
            let beams = self.beams;
            return Err(format!("beams is {beams}: choose 0 to {MAX_BEAM_WIDTH}, and one sample a prompt"));
        }
        Ok(())
    }

    /// The longest sequence.
    pub(super) fn max_model_len(&self) -> u32 {
        self.shared_prefix + self.prompt[1] + self.output[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        std::fs::write(&path, format!("name = 'a'\nbaseline = 'b'\nhistory = 'h'\n{text}")).unwrap();
        SuiteConfig::read(&path).map_or_else(|error| format!("{error:#}"), |_| String::new())
    }

    #[test]
    fn the_committed_suite_reads_and_its_files_are_there() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let suite = SuiteConfig::read(&top.join(SuiteConfig::locate("ci"))).unwrap();
        assert!(!suite.replay.is_empty() && !suite.path.is_empty() && !suite.work.is_empty());
        for entry in &suite.run {
            assert!(top.join(&entry.config).is_file() && top.join(&entry.baseline).is_dir(), "{entry:?}");
        }
        let baseline = super::super::Baseline::read(&top.join(&suite.baseline)).unwrap();
        assert_eq!(baseline.counts.len(), suite.replay.len());
    }

    #[test]
    fn what_means_nothing_is_refused_by_name() {
        let replay = "[[replay]]\nname = 'r'\nprompts = 1\nevery = 0\noutput = [1, 2]\nkv_slots = 64\n";
        assert_eq!(check(&format!("{replay}prompt = [1, 2]")), "");
        assert!(check(&format!("{replay}prompt = [3, 2]")).contains("replay `r`: prompt is 3 to 2"));
        assert!(check(&format!("{replay}promt = [1, 2]")).contains("promt"));
        let twice = format!("{replay}prompt = [1, 2]\n{replay}prompt = [1, 2]");
        assert!(check(&twice).contains("two entries are called `r`"));
        let run = |config: &str| {
            format!("[[run]]\nconfig = '{config}'\nbaseline = 'r'\nmetrics = []\nmax_regression = 0.1\n")
        };
        assert_eq!(check(&[run("a/f.toml"), run("a/g.toml")].concat()), "");
        assert_eq!(check(&format!("{}rates_times = 0.4", run("a/f.toml"))), "");
        for factor in ["0.0", "-1", "nan", "1e9"] {
            let wrong = check(&format!("{}rates_times = {factor}", run("a/f.toml")));
            assert!(wrong.contains("run `f`: rates_times is"), "{factor}: {wrong}");
        }
        let folder = check(&[run("a/f.toml"), run("b/f.toml")].concat());
        assert!(folder.contains("in the folder `f`"), "{folder}");
        let work = "[[work]]\nname = 'w'\narguments = []\ngroups = 1\nmax_regression = 0.1";
        assert!(check(work).contains("1 groups give no interval"));
        let path =
            "[[path]]\nname = 'p'\nsequences = 1\ncontext = 1\nmax_instructions = 1\nmax_regression = -1.0";
        assert!(check(path).contains("max_regression is -1"));
    }
}
