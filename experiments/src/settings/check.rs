//! Checks of a configuration as a whole: what its types cannot say.

use std::collections::{BTreeMap, HashSet};

use crate::config::{
    Config, ConfigError, CudaConfig, EngineChanges, FigureConfig, PanelConfig, ProfileConfig, RunConfig,
    Source, Step, SweepScale, SystemEntry, no_system,
};
use crate::names;
use crate::settings::are_rates;
use crate::systems::SystemConfig;
use quire_engine::MAX_RANKS;
use quire_workloads::WorkloadError;

/// Checks what types cannot say.
pub(super) struct Checker<'a> {
    pub(super) source: &'a Source,
    /// What is checked, where it is not what is written but what `[cuda]` makes of it.
    pub(super) on_gpu: Option<&'a Config>,
}

impl Checker<'_> {
    /// An error at `path`, which exists in what is written only: what is wrong on a GPU alone is the fault of its table.
    fn error(&self, path: &[Step<'_>], message: impl Into<String>) -> ConfigError {
        let message = message.into();
        let Some(config) = self.on_gpu else { return self.source.error(path, message) };
        let message = match path {
            [Step::Key("system"), Step::Index(i), ..] => {
                format!("with [cuda], of system `{}`: {message}", config.system[*i].name)
            }
            _ => format!("with [cuda]: {message}"),
        };
        self.source.error(&[Step::Key("cuda")], message)
    }

    pub(super) fn check(&self, config: &Config) -> Result<(), ConfigError> {
        use Step::{Index, Key};
        let require = |ok: bool, path: &[Step<'_>], message: &str| {
            if ok { Ok(()) } else { Err(self.error(path, message)) }
        };
        let check_name = |name: &str, path: &[Step<'_>]| {
            names::check("`name`", name).map_err(|message| self.error(path, message))
        };
        check_name(&config.name, &[Key("name")])?;
        let devices = usize::from(config.tensor_parallel);
        let message = format!("`tensor_parallel` must be 1 to {MAX_RANKS}");
        require((1..=MAX_RANKS).contains(&devices), &[Key("tensor_parallel")], &message)?;
        let an_engine = config.system.iter().any(|system| matches!(system.serve, SystemConfig::Engine(_)));
        let message = "`tensor_parallel` divides the engines' model, and no system is an engine";
        require(devices == 1 || an_engine, &[Key("tensor_parallel")], message)?;
        require(config.kv_bytes > 0, &[Key("kv_bytes")], "`kv_bytes` must be more than 0")?;
        require(config.max_model_len >= 2, &[Key("max_model_len")], "`max_model_len` must be 2 or more")?;
        let scale = config.length_scale;
        require(limit(scale), &[Key("length_scale")], "`length_scale` must be more than 0")?;
        require(config.threads != Some(0), &[Key("threads")], "`threads` must be 1 or more")?;
        for (key, value) in [("ttft_s", config.slo.ttft_s), ("tpot_s", config.slo.tpot_s)] {
            require(limit(value), &[Key("slo"), Key(key)], &format!("`{key}` must be a number above 0"))?;
        }
        self.check_run(&config.run)?;
        require(!config.panel.is_empty(), &[], "no [[panel]]: nothing arrives")?;
        require(!config.system.is_empty(), &[], "no [[system]]: nothing serves")?;
        let mut panels = HashSet::new();
        for (i, panel) in config.panel.iter().enumerate() {
            let at = [Key("panel"), Index(i), Key("name")];
            check_name(&panel.name, &at)?;
            require(panels.insert(&panel.name), &at, "another panel has this name")?;
            self.check_rates(&panel.rates, &config.figure, &[Key("panel"), Index(i), Key("rates")])?;
            let at = [Key("panel"), Index(i), Key("replay_one_in")];
            check_part(panel.replay_one_in, panel.replay).map_err(|message| self.error(&at, message))?;
            let requests = config.run.requests_at(panel.rates[0]);
            if let Err(error) = panel.spec(requests, config.length_scale).validate() {
                let at = [Key("panel"), Index(i), Key(panel_field(&error))];
                return Err(self.error(&at, error.to_string()));
            }
        }
        let mut systems = HashSet::new();
        for (i, system) in config.system.iter().enumerate() {
            let at = [Key("system"), Index(i), Key("name")];
            check_name(&system.name, &at)?;
            for name in system.names() {
                require(systems.insert(name), &at, "another system has this name")?;
            }
            if let Err(message) = system.serve.check() {
                return Err(self.error(&[Key("system"), Index(i), Key("serve")], message));
            }
            self.check_served(config, &system.serve, &[Key("system"), Index(i), Key("serve")])?;
            if let Err(message) = system.expand() {
                return Err(self.error(&[Key("system"), Index(i), Key("sweep")], message));
            }
            if let Err(message) = self.check_point(system, &config.figure) {
                return Err(self.error(&[Key("system"), Index(i), Key("point")], message));
            }
            self.check_panels(config, system, &[Key("system"), Index(i)])?;
        }
        for (name, profile) in [("quick", &config.quick), ("full", &config.full)] {
            self.check_profile(&[Key(name)], profile, config, &[])?;
        }
        if let Err(message) = config.figure.check() {
            return Err(self.error(&[Key("figure"), Key(config.figure.checked_field())], message));
        }
        if let Some(over) = config.figure.over()
            && !systems.contains(over)
        {
            let message = format!("nothing to hold the others against: {}", no_system(over, &config.system));
            return Err(self.error(&[Key("figure"), Key("over")], message));
        }
        let is_over =
            |system: &&SystemEntry| config.figure.over().is_some_and(|over| system.is_meant_by(over));
        let elsewhere = |system: &SystemEntry| config.panel.iter().find(|panel| !system.runs_in(&panel.name));
        if let Some(panel) = config.system.iter().find(is_over).and_then(elsewhere) {
            let message =
                format!("it does not run in panel `{}`: the others are held against it there", panel.name);
            return Err(self.error(&[Key("figure"), Key("over")], message));
        }
        match &config.cuda {
            Some(cuda) => self.check_cuda(cuda, config),
            None => Ok(()),
        }
    }

    /// Every system serves every panel.
    fn check_served(
        &self,
        config: &Config,
        serve: &SystemConfig,
        path: &[Step<'_>],
    ) -> Result<(), ConfigError> {
        let check = |panel: &PanelConfig| {
            if panel.conversations.is_some() {
                serve.check_conversations()?;
            }
            serve.check_decoding(panel.decoding)
        };
        config.panel.iter().try_for_each(check).map_err(|message| self.error(path, message))
    }

    /// Claims may be about any device's systems and rates: they are checked against the configuration as it is written.
    pub(super) fn check_claims(&self, config: &Config) -> Result<(), ConfigError> {
        config.claim.iter().enumerate().try_for_each(|(i, claim)| claim.check(config, self.source, i))
    }

    /// Checks the table of another device in its own places; what it makes of the rest is checked when it is applied.
    fn check_cuda(&self, cuda: &CudaConfig, config: &Config) -> Result<(), ConfigError> {
        use Step::{Index, Key};
        let at = |path: &[Step<'_>], message: &str| Err(self.error(&joined(&[Key("cuda")], path), message));
        let EngineChanges { token_budget, max_running, block_size, swap_bytes } = cuda.engine;
        match cuda {
            _ if cuda.kv_bytes == 0 => return at(&[Key("kv_bytes")], "`kv_bytes` must be more than 0"),
            _ if cuda.max_model_len < 2 => {
                return at(&[Key("max_model_len")], "`max_model_len` must be 2 or more");
            }
            _ if !limit(cuda.length_scale) => {
                return at(&[Key("length_scale")], "`length_scale` must be more than 0");
            }
            _ if token_budget == Some(0) => return at(&[Key("engine")], "`token_budget` must be 1 or more"),
            _ if max_running == Some(0) => return at(&[Key("engine")], "`max_running` must be 1 or more"),
            _ if swap_bytes == Some(0) => return at(&[Key("engine")], "`swap_bytes` must be more than 0"),
            _ if block_size.is_some_and(|size| !(8..=256).contains(&size)) => {
                return at(&[Key("engine")], "`block_size` must be 8 to 256 on a GPU");
            }
            _ => {}
        }
        for (i, system) in cuda.system.iter().enumerate() {
            if cuda.system[..i].iter().any(|other| other.name == system.name) {
                return at(&[Key("system"), Index(i), Key("name")], "another system has this name");
            }
            if let Err(message) = system.serve.check() {
                return at(&[Key("system"), Index(i), Key("serve")], &message);
            }
            let path = [Key("cuda"), Key("system"), Index(i), Key("serve")];
            self.check_served(config, &system.serve, &path)?;
            if let Err(message) = system.expand() {
                return at(&[Key("system"), Index(i), Key("sweep")], &message);
            }
            if let Err(message) = self.check_point(system, &config.figure) {
                return at(&[Key("system"), Index(i), Key("point")], message);
            }
            self.check_panels(config, system, &[Key("cuda"), Key("system"), Index(i)])?;
        }
        let systems = || config.system.iter().chain(&cuda.system);
        let known = |name: &String| systems().any(|system| system.is_meant_by(name));
        if let Some(unknown) = cuda.without.iter().find(|name| !known(name)) {
            return at(&[Key("without")], &no_system(unknown, systems()));
        }
        self.check_profile(&[Key("cuda"), Key("run")], &cuda.run, config, &cuda.system)
    }

    fn check_run(&self, run: &RunConfig) -> Result<(), ConfigError> {
        let at = |key, message: &str| self.error(&[Step::Key("run"), Step::Key(key)], message);
        let share = |x: f64| (0.0..1.0).contains(&x);
        match run {
            _ if !run.seconds.is_none_or(limit) => Err(at("seconds", "`seconds` must be more than 0")),
            _ if !run.longest_s.is_none_or(limit) => Err(at("longest_s", "`longest_s` must be more than 0")),
            _ if run.seconds.is_some() && run.longest_s.is_some() => {
                Err(at("longest_s", "`longest_s` bounds `requests`: it says nothing beside `seconds`"))
            }
            _ if run.seconds.is_some() && run.requests.is_some() => {
                Err(at("requests", "`seconds` stands in the place of `requests`: leave one of them out"))
            }
            _ if run.seconds.is_none() && run.requests.is_none() => {
                Err(self.error(&[Step::Key("run")], "`requests` or `seconds` must say how large a cell is"))
            }
            _ if run.requests.is_some_and(|n| n < 2) => Err(at("requests", "`requests` must be 2 or more")),
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

    fn check_profile(
        &self,
        table: &[Step<'_>],
        profile: &ProfileConfig,
        config: &Config,
        added: &[SystemEntry],
    ) -> Result<(), ConfigError> {
        let at = |key, message: &str| self.error(&joined(table, &[Step::Key(key)]), message);
        if profile.requests.is_some_and(|n| n < 2) {
            return Err(at("requests", "`requests` must be 2 or more"));
        }
        if profile.requests.is_some() && config.run.seconds.is_some() {
            return Err(at(
                "requests",
                "`run.seconds` stands in the place of `requests`: it says nothing here",
            ));
        }
        if profile.longest_s.is_some_and(|s| !limit(s)) {
            return Err(at("longest_s", "`longest_s` must be more than 0"));
        }
        if profile.longest_s.is_some() && config.run.seconds.is_some() {
            return Err(at(
                "longest_s",
                "`longest_s` bounds `requests`: it says nothing beside `run.seconds`",
            ));
        }
        if profile.repeats == Some(0) {
            return Err(at("repeats", "`repeats` must be 1 or more"));
        }
        if profile.drain_limit_s.is_some_and(|s| !limit(s)) {
            return Err(at("drain_limit_s", "`drain_limit_s` must be more than 0"));
        }
        for (panel, rates) in &profile.rates {
            let path = joined(table, &[Step::Key("rates"), Step::Key(panel)]);
            self.check_panel(config, panel, &path)?;
            self.check_rates(rates, &config.figure, &path)?;
        }
        for (panel, &one_in) in &profile.replay_one_in {
            let path = joined(table, &[Step::Key("replay_one_in"), Step::Key(panel)]);
            self.check_panel(config, panel, &path)?;
            let replayed = config.panel.iter().any(|p| p.name == *panel && p.replay);
            check_part(one_in, replayed).map_err(|message| self.error(&path, message))?;
        }
        for (system, panels) in &profile.from_rate {
            let path = joined(table, &[Step::Key("from_rate"), Step::Key(system)]);
            let systems = || config.system.iter().chain(added);
            if !systems().any(|known| known.is_meant_by(system)) {
                return Err(self.error(&path, no_system(system, systems())));
            }
            self.check_from_rate(config, panels, &path)?;
        }
        Ok(())
    }

    /// Where a system's cells are.
    fn check_panels(
        &self,
        config: &Config,
        system: &SystemEntry,
        path: &[Step<'_>],
    ) -> Result<(), ConfigError> {
        let panels = joined(path, &[Step::Key("panels")]);
        for (i, panel) in system.panels.iter().enumerate() {
            self.check_panel(config, panel, &panels)?;
            if system.panels[..i].contains(panel) {
                return Err(self.error(&panels, format!("`{panel}` is there twice")));
            }
        }
        let from_rate = joined(path, &[Step::Key("from_rate")]);
        if let Some(panel) = system.from_rate.keys().find(|panel| !system.runs_in(panel)) {
            return Err(self.error(&from_rate, format!("`panels` leaves `{panel}` out")));
        }
        self.check_from_rate(config, &system.from_rate, &from_rate)
    }

    fn check_from_rate(
        &self,
        config: &Config,
        from_rate: &BTreeMap<String, f64>,
        path: &[Step<'_>],
    ) -> Result<(), ConfigError> {
        for (panel, rate) in from_rate {
            let path = joined(path, &[Step::Key(panel)]);
            self.check_panel(config, panel, &path)?;
            if !limit(*rate) {
                return Err(self.error(&path, "a rate must be a number above 0"));
            }
        }
        Ok(())
    }

    fn check_panel(&self, config: &Config, panel: &str, path: &[Step<'_>]) -> Result<(), ConfigError> {
        match config.panel.iter().any(|p| p.name == panel) {
            true => Ok(()),
            false => Err(self.error(path, format!("no panel `{panel}`"))),
        }
    }

    fn check_rates(
        &self,
        rates: &[f64],
        figure: &FigureConfig,
        path: &[Step<'_>],
    ) -> Result<(), ConfigError> {
        if rates.is_empty() || !are_rates(rates) {
            return Err(self.error(path, "rates must be one or more numbers above 0, ascending"));
        }
        if figure.has_one_rate() && rates.len() > 1 {
            let message = "this kind of figure shows one rate a panel: leave one, or write a panel for each";
            return Err(self.error(path, message));
        }
        Ok(())
    }

    /// A figure over a parameter needs to know where each system lies.
    fn check_point(&self, system: &SystemEntry, figure: &FigureConfig) -> Result<(), &'static str> {
        if system.point.as_ref().is_some_and(|point| !point.x.is_finite()) {
            return Err("`x` must be a number");
        }
        let FigureConfig::Sweep { scale, .. } = figure else {
            return match system.point {
                // Of a GPU's systems those of a sweep have been put in its place, each with a point.
                Some(_) if self.on_gpu.is_none() => {
                    Err("a `point` is of a figure of the kind `sweep`, which this is not")
                }
                _ => Ok(()),
            };
        };
        match &system.point {
            _ if system.sweep.is_some() => Ok(()),
            None => Err("a system of a sweep must have a `sweep`, or a `point` with its `line` and `x`"),
            Some(point) if *scale == SweepScale::Log2 && point.x <= 0.0 => {
                Err("`x` must be more than 0 on a scale of logarithms")
            }
            Some(_) => Ok(()),
        }
    }
}

/// The field of a panel that an error of its workload is about.
fn panel_field(error: &WorkloadError) -> &'static str {
    let WorkloadError::Spec { field, .. } = error else { return "lengths" };
    let first = field.split('.').next().unwrap_or(field);
    let fields = ["arrivals", "shared_prefix", "conversations", "classes", "decoding"];
    fields.into_iter().find(|name| *name == first).unwrap_or("lengths")
}

/// Checks how much of a panel's trace is replayed.
fn check_part(one_in: u32, replayed: bool) -> Result<(), &'static str> {
    match one_in {
        0 => Err("`replay_one_in` must be 1 or more"),
        1 => Ok(()),
        _ if replayed => Ok(()),
        _ => Err("`replay_one_in` is of the trace that `replay = true` lets in"),
    }
}

/// A way through `table` and then `rest`.
fn joined<'a>(table: &[Step<'a>], rest: &[Step<'a>]) -> Vec<Step<'a>> {
    [table, rest].concat()
}

fn limit(seconds: f64) -> bool {
    seconds.is_finite() && seconds > 0.0
}
