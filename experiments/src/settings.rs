//! What runs: a configuration with its profile and the command line applied, checked as a whole.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use quire_engine::model::WeightDtype;
use quire_workloads::{LengthSource, TraceSource};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cli::{Only, RunArgs};
use crate::config::{
    Arrivals, Config, ConfigError, KvPrecision, PanelConfig, ProfileConfig, RunConfig, Source, Step,
    SystemEntry,
};
use crate::metrics::Slo;

/// Which profile of the configuration runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// As the configuration says.
    Default,
    /// With its `[quick]` changes.
    Quick,
    /// With its `[full]` changes.
    Full,
}

/// A resolved experiment. It is kept in the manifest, so that a run can be repeated and drawn from it alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the experiment.
    pub name: String,
    /// Which profile.
    pub profile: Profile,
    /// The model.
    pub model: String,
    /// How weights are held.
    pub weights: WeightDtype,
    /// How K and V are held.
    pub kv_dtype: KvPrecision,
    /// Threads of each system.
    pub threads: u16,
    /// Bytes of KV memory of each system.
    pub kv_bytes: u64,
    /// The longest sequence.
    pub max_model_len: u32,
    /// Factor on lengths.
    pub length_scale: f64,
    /// Limits for goodput.
    pub slo: Slo,
    /// How cells run.
    pub run: RunConfig,
    /// Workloads with their rates.
    pub panels: Vec<PanelConfig>,
    /// Systems, those of `only` alone.
    pub systems: Vec<SystemEntry>,
    /// Selected cells; all when empty.
    pub only: Vec<SelectedCells>,
}

/// A selection of cells that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectedCells {
    /// Name of a system.
    pub system: String,
    /// Name of a panel; all when none.
    pub panel: Option<String>,
}

impl Settings {
    /// Reads and resolves a configuration.
    ///
    /// # Errors
    /// With the line of the configuration that is wrong.
    pub fn resolve(source: &Source, args: &RunArgs) -> Result<Self, ConfigError> {
        let config: Config = source.parse()?;
        Checker { source }.check(&config)?;
        let profile = match (args.quick, args.full) {
            (true, _) => Profile::Quick,
            (_, true) => Profile::Full,
            _ => Profile::Default,
        };
        let mut settings = Self::from_config(config, profile, args.threads);
        if let Some(model) = &args.model {
            settings.model.clone_from(model);
        }
        settings.replay(source, args)?;
        settings.select(source, &args.only)?;
        Ok(settings)
    }

    fn from_config(config: Config, profile: Profile, threads: Option<u16>) -> Self {
        let Config { quick, full, mut run, mut panel, .. } = config;
        let changes = match profile {
            Profile::Default => ProfileConfig::default(),
            Profile::Quick => quick,
            Profile::Full => full,
        };
        run.requests = changes.requests.unwrap_or(run.requests);
        run.repeats = changes.repeats.unwrap_or(run.repeats);
        run.drain_limit_s = changes.drain_limit_s.unwrap_or(run.drain_limit_s);
        run.stop_after_saturation = changes.stop_after_saturation.unwrap_or(run.stop_after_saturation);
        for panel in &mut panel {
            if let Some(rates) = changes.rates.get(&panel.name) {
                panel.rates.clone_from(rates);
            }
        }
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(1024) as u16);
        Self {
            name: config.name,
            profile,
            model: config.model,
            weights: config.weights,
            kv_dtype: config.kv_dtype,
            threads: threads.or(config.threads).unwrap_or_else(cores),
            kv_bytes: config.kv_bytes,
            max_model_len: config.max_model_len,
            length_scale: config.length_scale,
            slo: config.slo,
            run,
            panels: panel,
            systems: config.system,
            only: Vec::new(),
        }
    }

    fn select(&mut self, source: &Source, only: &[Only]) -> Result<(), ConfigError> {
        let known = |names: &mut dyn Iterator<Item = &String>| {
            names.map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
        };
        for Only { system, panel } in only {
            if !self.systems.iter().any(|s| &s.name == system) {
                let names = known(&mut self.systems.iter().map(|s| &s.name));
                return Err(source.error(&[], format!("--only: no system `{system}`; there are {names}")));
            }
            if let Some(panel) = panel.as_ref().filter(|p| !self.panels.iter().any(|known| &known.name == *p))
            {
                let names = known(&mut self.panels.iter().map(|p| &p.name));
                return Err(source.error(&[], format!("--only: no panel `{panel}`; there are {names}")));
            }
            self.only.push(SelectedCells { system: system.clone(), panel: panel.clone() });
        }
        if !self.only.is_empty() {
            let only = self.only.clone();
            self.systems.retain(|s| only.iter().any(|o| o.system == s.name));
            self.panels.retain(|p| only.iter().any(|o| o.panel.as_ref().is_none_or(|name| *name == p.name)));
        }
        Ok(())
    }

    /// Puts the trace of the command line in the place of the statistics that stand for it.
    fn replay(&mut self, source: &Source, args: &RunArgs) -> Result<(), ConfigError> {
        let Some(path) = &args.trace else { return Ok(()) };
        let mut panels = self.panels.iter_mut().filter(|p| p.replay).peekable();
        if panels.peek().is_none() {
            return Err(source.error(&[], "--trace: no panel has `replay = true`"));
        }
        for panel in panels {
            panel.lengths = LengthSource::Trace(TraceSource::new(path));
            panel.arrivals = Arrivals::Trace {};
        }
        Ok(())
    }

    /// Whether the cells of `system` in `panel` are to run.
    pub fn selects(&self, system: &str, panel: &str) -> bool {
        self.only.is_empty()
            || self.only.iter().any(|o| o.system == system && o.panel.as_ref().is_none_or(|p| p == panel))
    }

    /// Seed of each repeat.
    pub fn seeds(&self) -> impl Iterator<Item = u64> + '_ {
        (0..u64::from(self.run.repeats)).map(|repeat| self.run.seed.wrapping_add(repeat))
    }

    /// SHA-256 of the settings: two runs with the same one ran the same matrix.
    pub fn sha256(&self) -> String {
        let text = serde_json::to_string(self).expect("settings are plain data");
        hex(&Sha256::digest(text.as_bytes()))
    }

    /// The settings without the folders of this machine: of absolute paths, only the last part.
    pub(crate) fn without_folders(mut self) -> Self {
        let last = |path: &Path| path.file_name().map_or_else(|| path.to_owned(), PathBuf::from);
        if Path::new(&self.model).is_absolute() {
            self.model = last(Path::new(&self.model)).display().to_string();
        }
        for panel in &mut self.panels {
            if let LengthSource::Trace(trace) = &mut panel.lengths
                && trace.path.is_absolute()
            {
                trace.path = last(&trace.path);
            }
        }
        self
    }

    /// Whether weights are random.
    pub fn is_dummy(&self) -> bool {
        self.model.starts_with("dummy:")
    }

    /// The model, for captions.
    pub fn describe_model(&self) -> String {
        let name = match self.model.strip_prefix("dummy:") {
            Some(shape) => format!("random weights of {shape}'s shape (dummy)"),
            None => self.model.rsplit(['/', '\\']).next().unwrap_or(&self.model).to_string(),
        };
        format!("Model: {name}, {} weights, {} threads", self.weights, self.threads)
    }

    /// Memory and scaling, for captions.
    pub fn describe_memory(&self) -> String {
        let mib = self.kv_bytes as f64 / f64::from(1 << 20);
        let scale = match self.length_scale {
            1.0 => "lengths as they are".to_string(),
            scale => format!("lengths scaled by {}", fraction(scale)),
        };
        format!(
            "KV memory {mib:.1} MiB ({}), limit {} tokens, {scale}",
            match self.kv_dtype {
                KvPrecision::F32 => "f32",
                KvPrecision::Bf16 => "bf16",
            },
            self.max_model_len
        )
    }

    /// The limits of goodput, for captions.
    pub fn describe_slo(&self) -> String {
        let Slo { ttft_s, tpot_s } = self.slo;
        format!("Goodput counts requests with TTFT up to {ttft_s} s and TPOT up to {} ms.", tpot_s * 1e3)
    }
}

/// `1/16` for 0.0625, the number itself where it is no such fraction.
fn fraction(value: f64) -> String {
    let inverse = 1.0 / value;
    if (inverse - inverse.round()).abs() < 1e-9 && inverse > 1.0 {
        format!("1/{inverse:.0}")
    } else {
        value.to_string()
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Checks what types cannot say.
struct Checker<'a> {
    source: &'a Source,
}

impl Checker<'_> {
    fn check(&self, config: &Config) -> Result<(), ConfigError> {
        use Step::{Index, Key};
        let require = |ok: bool, path: &[Step<'_>], message: &str| {
            if ok { Ok(()) } else { Err(self.source.error(path, message)) }
        };
        let plain = |name: &str| {
            !name.is_empty()
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && name != ".."
        };
        require(plain(&config.name), &[Key("name")], "`name` must be letters, digits, `-`, `_` and `.`")?;
        require(config.kv_bytes > 0, &[Key("kv_bytes")], "`kv_bytes` must be more than 0")?;
        require(config.max_model_len >= 2, &[Key("max_model_len")], "`max_model_len` must be 2 or more")?;
        let scale = config.length_scale;
        require(
            scale.is_finite() && scale > 0.0,
            &[Key("length_scale")],
            "`length_scale` must be more than 0",
        )?;
        require(config.threads != Some(0), &[Key("threads")], "`threads` must be 1 or more")?;
        for (key, value) in [("ttft_s", config.slo.ttft_s), ("tpot_s", config.slo.tpot_s)] {
            require(value > 0.0, &[Key("slo"), Key(key)], &format!("`{key}` must be more than 0"))?;
        }
        self.check_run(&config.run)?;
        require(!config.panel.is_empty(), &[], "no [[panel]]: nothing arrives")?;
        require(!config.system.is_empty(), &[], "no [[system]]: nothing serves")?;
        let mut names = HashSet::new();
        for (i, panel) in config.panel.iter().enumerate() {
            let at = [Key("panel"), Index(i), Key("name")];
            require(plain(&panel.name), &at, "`name` must be letters, digits, `-`, `_` and `.`")?;
            require(names.insert(&panel.name), &at, "another panel has this name")?;
            self.check_rates(&panel.rates, &[Key("panel"), Index(i), Key("rates")])?;
            if let Err(error) = panel.spec(config.run.requests, config.length_scale).validate() {
                return Err(self.source.error(&[Key("panel"), Index(i), Key("lengths")], error.to_string()));
            }
        }
        names.clear();
        for (i, system) in config.system.iter().enumerate() {
            let at = [Key("system"), Index(i), Key("name")];
            require(plain(&system.name), &at, "`name` must be letters, digits, `-`, `_` and `.`")?;
            require(names.insert(&system.name), &at, "another system has this name")?;
            if let Err(message) = system.serve.check() {
                return Err(self.source.error(&[Key("system"), Index(i), Key("serve")], message));
            }
        }
        for (name, profile) in [("quick", &config.quick), ("full", &config.full)] {
            self.check_profile(name, profile, config)?;
        }
        Ok(())
    }

    fn check_run(&self, run: &RunConfig) -> Result<(), ConfigError> {
        let at = |key, message: &str| self.source.error(&[Step::Key("run"), Step::Key(key)], message);
        let share = |x: f64| (0.0..1.0).contains(&x);
        match run {
            _ if run.requests < 2 => Err(at("requests", "`requests` must be 2 or more")),
            _ if run.repeats == 0 => Err(at("repeats", "`repeats` must be 1 or more")),
            _ if !share(run.warm_up) => Err(at("warm_up", "`warm_up` is a share: 0 up to, not including, 1")),
            _ if !share(run.drain) => Err(at("drain", "`drain` is a share: 0 up to, not including, 1")),
            _ if run.warm_up + run.drain > 0.9 => {
                Err(at("warm_up", "`warm_up` and `drain` leave less than a tenth of the cell for the window"))
            }
            _ if !limit(run.lag_bound_s) => Err(at("lag_bound_s", "`lag_bound_s` must be more than 0")),
            _ if !(0.0..=1.0).contains(&run.lag_share) => {
                Err(at("lag_share", "`lag_share` is a share: 0 to 1"))
            }
            _ if !limit(run.drain_limit_s) => Err(at("drain_limit_s", "`drain_limit_s` must be more than 0")),
            _ => Ok(()),
        }
    }

    fn check_profile(&self, name: &str, profile: &ProfileConfig, config: &Config) -> Result<(), ConfigError> {
        let at = |key, message: &str| self.source.error(&[Step::Key(name), Step::Key(key)], message);
        if profile.requests.is_some_and(|n| n < 2) {
            return Err(at("requests", "`requests` must be 2 or more"));
        }
        if profile.repeats == Some(0) {
            return Err(at("repeats", "`repeats` must be 1 or more"));
        }
        if profile.drain_limit_s.is_some_and(|s| !limit(s)) {
            return Err(at("drain_limit_s", "`drain_limit_s` must be more than 0"));
        }
        for (panel, rates) in &profile.rates {
            let path = [Step::Key(name), Step::Key("rates"), Step::Key(panel)];
            if !config.panel.iter().any(|p| &p.name == panel) {
                return Err(self.source.error(&path, format!("no panel `{panel}`")));
            }
            self.check_rates(rates, &path)?;
        }
        Ok(())
    }

    fn check_rates(&self, rates: &[f64], path: &[Step<'_>]) -> Result<(), ConfigError> {
        let ascending = rates.windows(2).all(|pair| pair[0] < pair[1]);
        if rates.is_empty() || !ascending || !rates.iter().all(|r| r.is_finite() && *r > 0.0) {
            return Err(self.source.error(path, "rates must be one or more numbers above 0, ascending"));
        }
        Ok(())
    }
}

fn limit(seconds: f64) -> bool {
    seconds.is_finite() && seconds > 0.0
}
