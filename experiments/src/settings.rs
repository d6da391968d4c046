//! What runs: a configuration with its profile and the command line applied, checked as a whole.

mod check;
mod describe;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use quire_engine::model::WeightDtype;
use quire_workloads::{LengthSource, TraceSource};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cli::{Only, RunArgs, TraceArg};
use crate::config::{
    Arrivals, Config, ConfigError, CudaConfig, Device, FigureConfig, KvPrecision, PanelConfig, ProfileConfig,
    RunConfig, Source, Step, SystemEntry, no_system, one_device,
};
use crate::metrics::Slo;
use crate::names;
use crate::record::CellKey;
use crate::systems::SystemConfig;
use check::Checker;

/// Most cells of a run.
const MOST_CELLS: u64 = 100_000;

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
    /// What the figure shows. Not written where it is the default, which all older runs have.
    #[serde(default, skip_serializing_if = "FigureConfig::is_default")]
    pub figure: FigureConfig,
    /// Which profile.
    pub profile: Profile,
    /// Where systems compute.
    #[serde(default, skip_serializing_if = "Device::is_cpu")]
    pub device: Device,
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
    /// Whether the engines' tokens must not depend on what is computed together. On a CPU they never do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub batch_invariant: bool,
    /// Devices that the engines' model is divided over.
    #[serde(default = "one_device", skip_serializing_if = "is_one_device")]
    pub tensor_parallel: u16,
    /// Factor on lengths.
    pub length_scale: f64,
    /// By what the configuration's rates were multiplied (`--rates-times`). The panels' are what they are after it.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub rates_times: f64,
    /// Limits for goodput.
    pub slo: Slo,
    /// How cells run.
    pub run: RunConfig,
    /// Workloads with their rates.
    pub panels: Vec<PanelConfig>,
    /// Systems.
    pub systems: Vec<SystemEntry>,
    /// Selected cells; all when empty. Runs of other selections are parts of one matrix: see [`Self::sha256`].
    pub only: Vec<SelectedCells>,
}

/// Older manifests do not say.
fn is_one_device(devices: &u16) -> bool {
    *devices == 1
}

fn one() -> f64 {
    1.0
}

/// Runs that are older than the factor have none written down.
fn is_one(factor: &f64) -> bool {
    *factor == 1.0
}

/// Whether these are numbers above 0 that ascend.
pub(crate) fn are_rates(rates: &[f64]) -> bool {
    rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) && rates.windows(2).all(|pair| pair[0] < pair[1])
}

/// A rate of the configuration times `factor`: to six digits, so that it is a number to read, and the same wherever it is
/// computed.
pub(crate) fn scaled_rate(rate: f64, factor: f64) -> f64 {
    if is_one(&factor) {
        return rate;
    }
    let rate = rate * factor;
    format!("{rate:.5e}").parse().unwrap_or(rate)
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
        let mut config: Config = source.parse()?;
        let checker = Checker { source, on_gpu: None };
        checker.check(&config)?;
        checker.check_claims(&config)?;
        // Its table is applied and checked on every device: a mistake in it should not wait for a GPU.
        let gpu = match config.cuda.take() {
            Some(changes) => {
                let invariant = changes.batch_invariant;
                let gpu = on_gpu(config.clone(), changes)
                    .map_err(|message| source.error(&[Step::Key("cuda"), Step::Key("engine")], message))?;
                Checker { source, on_gpu: Some(&gpu) }.check(&gpu)?;
                Some((gpu, invariant))
            }
            None => None,
        };
        if let Some(device) = config.needs {
            refuse_device(device, args, gpu.is_some())
                .map_err(|message| source.error(&[Step::Key("needs")], message))?;
        }
        let mut batch_invariant = false;
        if args.device == Device::Cuda {
            let Some((gpu, invariant)) = gpu else {
                return Err(
                    source.error(&[], "--device cuda: there is no [cuda] table that says what runs there")
                );
            };
            if args.quick || args.full {
                return Err(source.error(&[], "--quick and --full are for --device cpu"));
            }
            (config, batch_invariant) = (gpu, invariant);
        }
        config.system = expand(&config.system).map_err(|message| source.error(&[], message))?;
        let profile = match (args.quick, args.full) {
            (true, _) => Profile::Quick,
            (_, true) => Profile::Full,
            _ => Profile::Default,
        };
        let mut settings = Self::from_config(config, profile, args.threads);
        settings.device = args.device;
        settings.batch_invariant = batch_invariant;
        if let Some(model) = &args.model {
            settings.model.clone_from(model);
        }
        settings.run.repeats = args.repeats.unwrap_or(settings.run.repeats);
        settings
            .scale_rates(args.rates_times.unwrap_or(1.0))
            .map_err(|message| source.error(&[], message))?;
        settings.replay(source, args)?;
        settings.select(source, &args.only)?;
        settings.check_names_and_size().map_err(|message| source.error(&[Step::Key("run")], message))?;
        Ok(settings)
    }

    /// Checks what a manifest may have from anywhere: names become files' names, and cells take memory.
    pub(crate) fn check_names_and_size(&self) -> Result<(), String> {
        names::check("the experiment's name", &self.name)?;
        for panel in &self.panels {
            names::check("a panel's name", &panel.name)?;
        }
        for system in &self.systems {
            names::check("a system's name", &system.name)?;
        }
        if self.run.requests.is_none() && self.run.seconds.is_none() {
            return Err("neither `requests` nor `seconds` says how large a cell is".into());
        }
        let rates: usize = self.panels.iter().map(|panel| panel.rates.len()).sum();
        let of_a_seed = rates.max(1).saturating_mul(self.systems.len().max(1)) as u64;
        let cells = of_a_seed.saturating_mul(self.run.repeats.into());
        match cells > MOST_CELLS {
            true => {
                Err(format!("{cells} cells are more than {MOST_CELLS}: fewer `repeats`, rates or systems"))
            }
            false => Ok(()),
        }
    }

    fn from_config(config: Config, profile: Profile, threads: Option<u16>) -> Self {
        let Config { quick, full, mut run, mut panel, mut system, .. } = config;
        let changes = match profile {
            Profile::Default => ProfileConfig::default(),
            Profile::Quick => quick,
            Profile::Full => full,
        };
        changes.apply(&mut run, &mut panel, &mut system);
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(1024) as u16);
        Self {
            name: config.name,
            figure: config.figure,
            profile,
            device: Device::Cpu,
            model: config.model,
            weights: config.weights,
            kv_dtype: config.kv_dtype,
            threads: threads.or(config.threads).unwrap_or_else(cores),
            kv_bytes: config.kv_bytes,
            max_model_len: config.max_model_len,
            batch_invariant: false,
            tensor_parallel: config.tensor_parallel,
            length_scale: config.length_scale,
            rates_times: 1.0,
            slo: config.slo,
            run,
            panels: panel,
            systems: system,
            only: Vec::new(),
        }
    }

    fn scale_rates(&mut self, factor: f64) -> Result<(), String> {
        self.rates_times = factor;
        let rates = self.panels.iter_mut().flat_map(|panel| &mut panel.rates);
        let starts = self.systems.iter_mut().flat_map(|system| system.from_rate.values_mut());
        rates.chain(starts).for_each(|rate| *rate = scaled_rate(*rate, factor));
        // Rounding may have made two of them one, and cells are known by their rates.
        for panel in &self.panels {
            let (name, rates) = (&panel.name, &panel.rates);
            if !are_rates(rates) {
                return Err(format!(
                    "--rates-times {factor}: the rates of `{name}` would be {rates:?}, to six digits; they must be above 0 and \
                     ascend"
                ));
            }
        }
        Ok(())
    }

    fn select(&mut self, source: &Source, only: &[Only]) -> Result<(), ConfigError> {
        for Only { system, panel } in only {
            // A system by its name, or all points of a sweep by the name that they have in common.
            let meant: Vec<&SystemEntry> = self.systems.iter().filter(|s| s.is_meant_by(system)).collect();
            if meant.is_empty() {
                return Err(source.error(&[], format!("--only: {}", no_system(system, &self.systems))));
            }
            if let Some(panel) = panel.as_ref().filter(|p| !self.panels.iter().any(|known| &known.name == *p))
            {
                let names: Vec<String> = self.panels.iter().map(|p| format!("`{}`", p.name)).collect();
                let names = names.join(", ");
                return Err(source.error(&[], format!("--only: no panel `{panel}`; there are {names}")));
            }
            if let Some(panel) = panel.as_ref().filter(|panel| !meant.iter().any(|s| s.runs_in(panel))) {
                let message = format!("--only: `{system}` does not run in panel `{panel}`");
                return Err(source.error(&[], message));
            }
            let cells = |s: &SystemEntry| SelectedCells { system: s.name.clone(), panel: panel.clone() };
            let selected: Vec<SelectedCells> = meant.into_iter().map(cells).collect();
            self.only.extend(selected);
        }
        Ok(())
    }

    /// Adds what `other`, of the same matrix, selects.
    pub(crate) fn select_also(&mut self, other: &Self) {
        let both = !self.only.is_empty() && !other.only.is_empty();
        let new = other.only.iter().filter(|cells| !self.only.contains(cells)).cloned().collect::<Vec<_>>();
        self.only.extend(new);
        let whole = Self { only: Vec::new(), ..self.clone() };
        if !both || self.cells() == whole.cells() {
            self.only.clear();
        }
    }

    /// Puts the trace of the command line in the place of the statistics that stand for it.
    fn replay(&mut self, source: &Source, args: &RunArgs) -> Result<(), ConfigError> {
        let mut replayed = HashSet::new();
        for TraceArg { name, path } in &args.trace {
            let named = |panel: &PanelConfig| name.as_ref().is_none_or(|name| *name == panel.name);
            let mut panels = self.panels.iter_mut().filter(|p| p.replay && named(p)).peekable();
            if panels.peek().is_none() {
                let which = name.as_ref().map_or("no panel".into(), |name| format!("no panel `{name}`"));
                return Err(source.error(&[], format!("--trace: {which} with `replay = true`")));
            }
            for panel in panels {
                if !replayed.insert(panel.name.clone()) {
                    let message = format!("--trace: two traces for panel `{}`: give it one", panel.name);
                    return Err(source.error(&[], message));
                }
                let one_in = panel.replay_one_in;
                panel.lengths = LengthSource::Trace(TraceSource { one_in, ..TraceSource::new(path) });
                panel.arrivals = Arrivals::Trace {};
                // What its requests share, and when they come, is the trace's.
                panel.conversations = None;
                panel.shared_prefix = 0;
            }
        }
        // It has been carried out, or there is nothing that it is about.
        self.panels.iter_mut().for_each(|panel| panel.replay_one_in = 1);
        Ok(())
    }

    /// Whether the cells of `system` in `panel` are to run.
    pub fn selects(&self, system: &str, panel: &str) -> bool {
        self.only.is_empty()
            || self.only.iter().any(|o| o.system == system && o.panel.as_ref().is_none_or(|p| p == panel))
    }

    /// Systems of which cells are to run.
    pub fn selected_systems(&self) -> impl Iterator<Item = &SystemEntry> {
        self.systems
            .iter()
            .filter(|system| self.only.is_empty() || self.only.iter().any(|o| o.system == system.name))
    }

    /// Panels of which cells are to run.
    pub fn selected_panels(&self) -> impl Iterator<Item = &PanelConfig> {
        let runs =
            |system: &SystemEntry, panel: &str| self.selects(&system.name, panel) && system.runs_in(panel);
        self.panels.iter().filter(move |panel| self.systems.iter().any(|system| runs(system, &panel.name)))
    }

    /// Seed of each repeat.
    pub fn seeds(&self) -> impl Iterator<Item = u64> + '_ {
        (0..u64::from(self.run.repeats)).map(|repeat| self.run.seed.wrapping_add(repeat))
    }

    /// The cells of the whole matrix in the order they run: systems innermost, so that slow changes of the machine hit
    /// all alike.
    pub fn cells(&self) -> Vec<CellKey> {
        let mut cells = Vec::new();
        for (repeat, seed) in (0..).zip(self.seeds()) {
            for panel in &self.panels {
                for &rate in &panel.rates {
                    let systems = self.systems.iter();
                    let systems = systems.filter(|s| self.selects(&s.name, &panel.name));
                    let systems = systems.filter(|s| s.runs_at(&panel.name, rate));
                    cells.extend(systems.map(|system| CellKey {
                        panel: panel.name.clone(),
                        system: system.name.clone(),
                        rate,
                        repeat,
                        seed,
                    }));
                }
            }
        }
        cells
    }

    /// SHA-256 of the settings but for the selection: runs with the same one ran the same matrix or parts of it, and a
    /// cell means the same in each.
    pub fn sha256(&self) -> String {
        let whole = Self { only: Vec::new(), ..self.clone() };
        let text = serde_json::to_string(&whole).expect("settings are plain data");
        hex(&Sha256::digest(text.as_bytes()))
    }

    /// The settings without the folders of this machine: of absolute paths, only the last part.
    pub(crate) fn without_folders(mut self) -> Self {
        let last = |path: &Path| path.file_name().map_or_else(|| path.to_owned(), PathBuf::from);
        if Path::new(&self.model).is_absolute() {
            self.model = last(Path::new(&self.model)).display().to_string();
        }
        for system in &mut self.systems {
            match &mut system.serve {
                SystemConfig::Transformers(system) if system.python.is_absolute() => {
                    system.python = last(&system.python);
                }
                SystemConfig::Engine(engine) => {
                    if let Some(model) = engine.draft_model.as_mut().filter(|m| Path::new(m).is_absolute()) {
                        *model = last(Path::new(model)).display().to_string();
                    }
                }
                _ => {}
            }
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

    /// Whether all engines give the same greedy tokens.
    pub fn has_equal_tokens(&self) -> bool {
        self.device.is_cpu() || self.batch_invariant
    }

    /// Whether chance decides which of a system's proposed tokens are accepted.
    pub fn is_synthetic(&self, system: &str) -> bool {
        let system = self.systems.iter().find(|known| known.name == system);
        system.is_some_and(|s| matches!(&s.serve, SystemConfig::Engine(engine) if engine.is_synthetic()))
    }

    /// Whether what is accepted of a system's proposals says something. Prompts are random tokens, of which a drafter that
    /// looks text up (and one from outside may) shows nothing. How often models agree is theirs, unless weights are random.
    pub fn tells_acceptance(&self, system: &str) -> bool {
        let by_model = |s: &SystemEntry| matches!(&s.serve, SystemConfig::Engine(e) if e.drafts_by_model());
        let drafts_by_model = self.systems.iter().any(|known| known.name == system && by_model(known));
        self.is_synthetic(system) || (drafts_by_model && !self.is_dummy())
    }

    /// Whether a system computes outside of this program and its children, maybe on this machine.
    pub(crate) fn is_elsewhere(&self, system: &str) -> bool {
        let system = self.systems.iter().find(|known| known.name == system);
        system.is_some_and(|s| matches!(s.serve, SystemConfig::OpenAi(_) | SystemConfig::External {}))
    }

    /// Whether weights are random.
    pub fn is_dummy(&self) -> bool {
        self.model.starts_with("dummy:")
    }
}

/// The systems that entries stand for.
fn expand(entries: &[SystemEntry]) -> Result<Vec<SystemEntry>, String> {
    Ok(entries.iter().map(SystemEntry::expand).collect::<Result<Vec<_>, _>>()?.concat())
}

/// Refuses a run on another device than the one that the configuration is for; a dry run takes nothing there.
fn refuse_device(needed: Device, args: &RunArgs, has_cuda: bool) -> Result<(), String> {
    match needed {
        Device::Cuda if !has_cuda => Err("there is no [cuda] table that says what runs there".into()),
        _ if needed == args.device || args.dry_run => Ok(()),
        _ => Err(format!(
            "this configuration is for --device {needed}: on {} it would take long and show nothing (--dry-run says what \
             would run)",
            args.device
        )),
    }
}

/// The configuration with what changes on a GPU in its place, without profiles, which are for a CPU. What a sweep varies
/// it varies there too.
fn on_gpu(mut config: Config, changes: CudaConfig) -> Result<Config, String> {
    let CudaConfig { engine, system, without, run, .. } = changes;
    config.model = changes.model;
    config.weights = changes.weights;
    config.kv_dtype = changes.kv_dtype;
    config.tensor_parallel = changes.tensor_parallel.unwrap_or(config.tensor_parallel);
    config.kv_bytes = changes.kv_bytes;
    config.max_model_len = changes.max_model_len;
    config.length_scale = changes.length_scale;
    config.slo = changes.slo.unwrap_or(config.slo);
    for new in system {
        match config.system.iter_mut().find(|old| old.name == new.name) {
            Some(old) => *old = new,
            None => config.system.push(new),
        }
    }
    for system in &mut config.system {
        if let SystemConfig::Engine(system) = &mut system.serve {
            system.change(engine);
        }
    }
    config.system = expand(&config.system)?;
    config.system.retain(|system| !without.iter().any(|name| system.is_meant_by(name)));
    run.apply(&mut config.run, &mut config.panel, &mut config.system);
    (config.quick, config.full) = Default::default();
    Ok(config)
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
