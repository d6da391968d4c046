//! The runner: the matrix of panels, rates, systems and repeats, cell by cell.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quire_engine::{EngineError, EngineParts};
use quire_workloads::{LagReport, ModelLimits, SystemError, Trace, WorkloadError};

use crate::cell::{self, CellResult};
use crate::config::{ConfigError, PanelConfig, Source};
use crate::manifest::{Manifest, run_name};
use crate::plot::PlotError;
use crate::progress::{Display, human};
use crate::record::{CellEntry, CellKey, CellStatus, StoredSteps, WorkloadLimits};
use crate::settings::Settings;
use crate::store::{RunFolder, StoreError};
use crate::systems::{Launched, Models, SystemConfig, SystemFactory};

/// An error of running an experiment.
#[derive(Debug, thiserror::Error)]
pub enum ExperimentError {
    /// The configuration.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// The run's folder.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A system.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The model.
    #[error(transparent)]
    Model(#[from] EngineError),
    /// A workload.
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    /// The figure.
    #[error(transparent)]
    Plot(#[from] PlotError),
    /// A table.
    #[error(transparent)]
    Table(#[from] crate::frame::FrameError),
    /// What ended a run whose folder is there.
    #[error("{error}\n{done} of {cells} cells are written; go on with --resume {}", folder.display())]
    Stopped {
        /// What.
        error: Box<ExperimentError>,
        /// Cells written.
        done: usize,
        /// Cells of the matrix.
        cells: usize,
        /// The run.
        folder: PathBuf,
    },
    /// A system that served nothing: settings that are mended make another run.
    #[error("{error}\nno cell is written; {} can be removed", folder.display())]
    NotStarted {
        /// What.
        error: Box<ExperimentError>,
        /// The run.
        folder: PathBuf,
    },
    /// Another trace than that of the cells that are done.
    #[error("{cell} is done, and its requests were others than those of the trace that is given")]
    AnotherTrace {
        /// The cell.
        cell: CellKey,
    },
    /// Ctrl-C.
    #[error("interrupted after {done} of {cells} cells; go on with --resume {}", folder.display())]
    Interrupted {
        /// Cells written.
        done: usize,
        /// Cells of the matrix.
        cells: usize,
        /// The run.
        folder: PathBuf,
    },
}

/// Where a run's results go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `results/<name>/<time>`.
    Default,
    /// A new run in this folder.
    New(PathBuf),
    /// The interrupted run in this folder.
    Resume(PathBuf),
    /// A new folder, where an incomplete packed run goes on.
    ResumePacked {
        /// The packed run; it is not changed.
        packed: PathBuf,
        /// The new folder.
        out: PathBuf,
    },
}

/// An experiment, ready to run.
pub struct Experiment {
    source: Source,
    settings: Settings,
    arguments: Vec<String>,
    models: Models,
    external: HashMap<String, Box<dyn SystemFactory>>,
    parts: HashMap<String, Box<dyn FnMut() -> EngineParts>>,
    limits: Option<ModelLimits>,
    quiet: bool,
}

impl Experiment {
    /// An experiment with `settings` resolved from `source`; `arguments` are for the manifest.
    pub fn new(source: Source, settings: Settings, arguments: Vec<String>) -> Self {
        Self {
            source,
            settings,
            arguments,
            models: Models::default(),
            external: HashMap::new(),
            parts: HashMap::new(),
            limits: None,
            quiet: false,
        }
    }

    /// Gives the system that the configuration calls `system`, written there as `serve = { kind = "external" }`; of any
    /// other kind, it takes that one's place.
    #[must_use]
    pub fn external(mut self, system: &str, factory: impl SystemFactory + 'static) -> Self {
        self.external.insert(system.to_string(), Box::new(factory));
        self
    }

    /// Gives parts to the engine that the configuration calls `system`: a policy or a drafter of one's own. `parts` makes them
    /// anew for every cell; the rest of that engine is as configured.
    #[must_use]
    pub fn engine_parts(mut self, system: &str, parts: impl FnMut() -> EngineParts + 'static) -> Self {
        self.parts.insert(system.to_string(), Box::new(parts));
        self
    }

    /// Takes the model's limits from here instead of opening the configuration's model: for systems that have none.
    #[must_use]
    pub fn with_limits(mut self, limits: ModelLimits) -> Self {
        self.limits = Some(limits);
        self
    }

    /// Shows no progress.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// What would run, and for how long at least and at most.
    pub fn plan(&self) -> String {
        let cells = self.settings.cells();
        let run = &self.settings.run;
        let mut out = String::new();
        for key in &cells {
            let _ = writeln!(
                out,
                "{key}: {} requests, about {:.0} s",
                run.requests_at(key.rate),
                self.cell_s(key)
            );
        }
        let expected = self.expected_s();
        let most: f64 = cells.iter().map(|key| self.arrivals_s(key) * 1.5 + run.drain_limit_s).sum();
        let [expected, most] = [expected, most].map(human);
        let _ = writeln!(
            out,
            "{} cells, about {expected} while systems keep up; hardly more than {most} (each with its limit of {} s after its last arrival)",
            cells.len(),
            run.drain_limit_s
        );
        out
    }

    /// Seconds that all cells take while their systems keep up. Those that are left out once a system is overloaded count too.
    pub fn expected_s(&self) -> f64 {
        self.settings.cells().iter().map(|key| self.cell_s(key)).sum()
    }

    /// Seconds a cell takes while its system keeps up: its arrivals and a little for the last requests.
    fn cell_s(&self, key: &CellKey) -> f64 {
        self.arrivals_s(key) * 1.05 + 1.5
    }

    fn arrivals_s(&self, key: &CellKey) -> f64 {
        f64::from(self.settings.run.requests_at(key.rate)) / key.rate
    }

    /// Runs all cells that are not done yet and returns the run's folder. Setting `interrupt` ends it early.
    ///
    /// # Errors
    /// When a system cannot be started, a file cannot be written, or on an interrupt; cells that are over stay.
    pub fn run(&mut self, target: &Target, interrupt: &AtomicBool) -> Result<PathBuf, ExperimentError> {
        let manifest = Manifest::new(&self.source, self.settings.clone(), &self.arguments);
        let (limits, traces) = self.prepare()?;
        let mut folder = match target {
            Target::Default => {
                let folder = Path::new("results").join(&self.settings.name).join(run_name());
                RunFolder::create(&folder, &manifest)?
            }
            Target::New(folder) => RunFolder::create(folder, &manifest)?,
            Target::Resume(folder) => RunFolder::resume(folder, &manifest)?,
            Target::ResumePacked { packed, out } => RunFolder::resume_packed(packed, out, &manifest)?,
        };
        let cells = self.settings.cells();
        let ran = self.run_cells(&cells, &mut folder, &traces, &limits, interrupt);
        let done = cells.iter().filter(|key| folder.done(&key.id()).is_some()).count();
        let (cells, path) = (cells.len(), folder.path().to_owned());
        let error = match ran {
            Ok(false) => return Err(ExperimentError::Interrupted { done, cells, folder: path }),
            Ok(true) => match folder.finish() {
                Ok(()) => return Ok(path),
                Err(error) => error.into(),
            },
            Err(error) => error,
        };
        if done == 0 && matches!(error, ExperimentError::System(_)) {
            return Err(ExperimentError::NotStarted { error: Box::new(error), folder: path });
        }
        Err(ExperimentError::Stopped { error: Box::new(error), done, cells, folder: path })
    }

    /// Runs those of `cells` that are not done yet; false when it was interrupted.
    fn run_cells(
        &mut self,
        cells: &[CellKey],
        folder: &mut RunFolder,
        traces: &HashMap<String, Trace>,
        limits: &ModelLimits,
        interrupt: &AtomicBool,
    ) -> Result<bool, ExperimentError> {
        self.check_traces(folder, traces, limits)?;
        let cells: Vec<&CellKey> = cells.iter().filter(|key| folder.done(&key.id()).is_none()).collect();
        let expected = cells.iter().map(|key| self.cell_s(key)).sum();
        let mut display = Display::new(cells.len(), expected, self.quiet);
        for key in cells {
            let expected_s = self.cell_s(key);
            if let Some(saturated_at) = self.saturated_below(key, folder) {
                let entry = skipped(key, saturated_at);
                display.end(&entry, "", expected_s, None);
                folder.add(entry, &[], &[])?;
                continue;
            }
            let started = Instant::now();
            let result = self.run_cell(key, traces, limits, interrupt, &display)?;
            if result.aborted || interrupt.load(Ordering::Relaxed) {
                return Ok(false);
            }
            display.end(&result.entry, &result.losses, expected_s, Some(started.elapsed()));
            folder.add(result.entry, &result.requests, &result.steps)?;
        }
        display.finish();
        Ok(true)
    }

    /// Checks that the traces give what the cells that are done had: a trace's file may be another than it was, and the
    /// settings have its name only.
    fn check_traces(
        &self,
        folder: &RunFolder,
        traces: &HashMap<String, Trace>,
        limits: &ModelLimits,
    ) -> Result<(), ExperimentError> {
        for (name, trace) in traces {
            let ran = |cell: &&CellEntry| cell.key.panel == *name && !cell.workload_sha256.is_empty();
            let Some(cell) = folder.cells().find(ran) else { continue };
            let workload = cell::workload(&self.settings, self.panel(name), &cell.key, Some(trace), limits)?;
            if workload.sha256() != cell.workload_sha256 {
                return Err(ExperimentError::AnotherTrace { cell: cell.key.clone() });
            }
        }
        Ok(())
    }

    fn run_cell(
        &mut self,
        key: &CellKey,
        traces: &HashMap<String, Trace>,
        limits: &ModelLimits,
        interrupt: &AtomicBool,
        display: &Display,
    ) -> Result<CellResult, ExperimentError> {
        let panel = self.panel(&key.panel).clone();
        let workload = cell::workload(&self.settings, &panel, key, traces.get(&key.panel), limits)?;
        display.begin(key, workload.requests.len() as u64);
        self.models.listener = display.starting(key);
        let launched = self.launch(&key.system)?;
        // What computes elsewhere may do so on any GPU.
        let elsewhere = self.settings.is_elsewhere(&key.system);
        let gpu = self.models.gpu_uuid().filter(|_| !elsewhere);
        let mut progress = |progress| display.update(key, progress);
        cell::run(&self.settings, key.clone(), &workload, launched, gpu.as_deref(), interrupt, &mut progress)
    }

    /// Starts a system; errors have its name in the configuration.
    fn launch(&mut self, name: &str) -> Result<Launched, SystemError> {
        self.launch_unnamed(name).map_err(|error| named(error, name))
    }

    fn launch_unnamed(&mut self, name: &str) -> Result<Launched, SystemError> {
        if let Some(factory) = self.external.get_mut(name) {
            return factory.launch(&self.settings);
        }
        let system = self.settings.systems.iter().find(|s| s.name == name);
        let system = system.expect("cells are made from the settings' systems");
        if let (SystemConfig::Engine(engine), Some(parts)) = (&system.serve, self.parts.get_mut(name)) {
            return engine.launch(&self.settings, &mut self.models, parts());
        }
        system.serve.launch(&self.settings, &mut self.models)
    }

    /// Checks what can be checked before the first cell: that traces and the model can be read, and that systems can start.
    ///
    /// # Errors
    /// With what is wrong; the system that cannot start is named.
    pub fn check(&mut self) -> Result<(), ExperimentError> {
        self.prepare().map(|_| ())
    }

    /// The model's limits and the traces, when all that can be checked before the first cell is in order.
    fn prepare(&mut self) -> Result<(ModelLimits, HashMap<String, Trace>), ExperimentError> {
        let limits = match self.limits {
            Some(limits) => limits,
            None => self.models.limits(&self.settings)?,
        };
        let traces = self.load_traces()?;
        // One that is too short for a cell is found before hours have passed.
        let mut seen = HashSet::new();
        for key in self.settings.cells() {
            if traces.contains_key(&key.panel)
                && seen.insert((key.panel.clone(), key.rate.to_bits(), key.seed))
            {
                cell::workload(
                    &self.settings,
                    self.panel(&key.panel),
                    &key,
                    traces.get(&key.panel),
                    &limits,
                )?;
            }
        }
        for system in self.settings.selected_systems() {
            let own = self.parts.contains_key(&system.name);
            if self.external.contains_key(&system.name) {
                continue;
            }
            let checked = system.serve.check_start(&self.settings, &mut self.models, own);
            checked.map_err(|reason| SystemError::Start { system: system.name.clone(), reason })?;
        }
        Ok((limits, traces))
    }

    fn panel(&self, name: &str) -> &PanelConfig {
        let panel = self.settings.panels.iter().find(|p| p.name == name);
        panel.expect("cells are made from the settings' panels")
    }

    fn load_traces(&self) -> Result<HashMap<String, Trace>, WorkloadError> {
        let mut traces = HashMap::new();
        for panel in self.settings.selected_panels() {
            // What of it a cell takes is the cell's to say.
            let spec = panel.spec(0, self.settings.length_scale);
            if let Some(trace) = spec.load_trace(Path::new(""))? {
                traces.insert(panel.name.clone(), trace);
            }
        }
        Ok(traces)
    }

    /// The lower rate at which the system was overloaded in the first repeat, if such rates end its line. One repeat
    /// decides for all, so that every point has all seeds or none. A void cell decides nothing: its client was late.
    fn saturated_below(&self, key: &CellKey, folder: &RunFolder) -> Option<f64> {
        if !self.settings.run.stop_after_saturation {
            return None;
        }
        let seed = self.settings.seeds().next()?;
        let first = |rate: f64| CellKey { rate, repeat: 0, seed, ..key.clone() };
        let ran =
            |rate: f64| folder.done(&first(rate).id()).filter(|entry| entry.status == CellStatus::Done {});
        // What the first repeat ran, the others run, also where a lower rate that was void comes out overloaded later.
        if ran(key.rate).is_some() {
            return None;
        }
        let lower = self.panel(&key.panel).rates.iter().copied().filter(|rate| *rate < key.rate);
        lower.into_iter().find(|&rate| ran(rate).is_some_and(|entry| entry.overloaded))
    }
}

/// An error with the configuration's name of the system that could not start.
fn named(error: SystemError, name: &str) -> SystemError {
    match error {
        SystemError::Start { reason, .. } => SystemError::Start { system: name.to_string(), reason },
        other => other,
    }
}

fn skipped(key: &CellKey, saturated_at: f64) -> CellEntry {
    CellEntry {
        key: key.clone(),
        sitting: 0,
        status: CellStatus::Skipped { saturated_at },
        start_s: 0.0,
        end_s: 0.0,
        lag: LagReport::default(),
        overloaded: false,
        workload_sha256: String::new(),
        workload_limits: WorkloadLimits::default(),
        conversations: None,
        steps: StoredSteps::default(),
        cpu: None,
        gpu: None,
    }
}
