//! An experiment of scripted systems on a virtual clock.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::systems::Launched;
use quire_experiments::{Experiment, ExperimentError, Settings, Target};
use quire_workloads::mock::{ScriptedSystem, VirtualClock};
use quire_workloads::{ModelLimits, StepRecord, SystemError};

pub(crate) const CONFIG: &str = r#"
name = "scripted"
model = "dummy:smollm2-135m"
weights = "f32"
kv_dtype = "f32"
kv_bytes = 1_000_000
length_scale = 1.0
max_model_len = 256

[slo]
ttft_s = 0.5
tpot_s = 0.05

[run]
requests = 40
repeats = 2
seed = 5
warm_up = 0.1
drain = 0.1
drain_limit_s = 61.0
stop_after_saturation = true
warm_up_requests = 0
lag_bound_s = 0.02
lag_share = 0.01

[quick]
repeats = 1

[full]
from_rate = { wide = { fixed = 8 } }

[[panel]]
name = "fixed"
title = "Fixed lengths"
lengths = { kind = "independent", input = { kind = "fixed", tokens = 20 }, output = { kind = "fixed", tokens = 11 } }
arrivals = { kind = "uniform" }
rates = [1, 8, 16]

[[system]]
name = "narrow"
label = "One at a time"
serve = { kind = "external" }

[[system]]
name = "wide"
label = "All at once"
serve = { kind = "external" }
"#;

/// Milliseconds.
pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn settings(arguments: &str) -> (Source, Settings) {
    let source = Source::new("scripted.toml", CONFIG);
    let line = format!("experiment scripted.toml {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let settings = Settings::resolve(&source, &cli.run).unwrap();
    (source, settings)
}

/// First token after 100 ms, `gap` between the others: 11 tokens take 100 ms + 10 gaps.
pub(crate) fn scripted(
    at_once: usize,
    gap: Duration,
) -> impl FnMut(&Settings) -> Result<Launched, SystemError> {
    move |_: &Settings| {
        let clock = VirtualClock::new();
        let steps = (0..100).map(|i| StepRecord {
            step: i,
            start_s: i as f64,
            execute_s: 1.0,
            running: 4,
            kv_used: 25,
            kv_free: 75,
            ..StepRecord::default()
        });
        let system =
            ScriptedSystem::healthy(clock.clone(), ms(100), gap).at_once(at_once).steps(steps.collect());
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}

pub(crate) fn experiment(arguments: &str, gap: Duration) -> Experiment {
    let (source, settings) = settings(arguments);
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let experiment =
        Experiment::new(source, settings, vec!["scripted.toml".into()]).with_limits(limits).quiet();
    experiment.external("narrow", scripted(1, gap)).external("wide", scripted(usize::MAX, gap))
}

pub(crate) fn run(folder: &Path, arguments: &str, gap: Duration) -> PathBuf {
    experiment(arguments, gap).run(&Target::New(folder.to_owned()), &AtomicBool::new(false)).unwrap()
}

/// Ctrl-C while the `cut`th cell of the wide system runs. How many cells there are then, and how many there were to be.
pub(crate) fn interrupted(target: &Target, cut: usize) -> (usize, usize) {
    let interrupt = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupt);
    let mut launches = 0;
    let mut inner = scripted(usize::MAX, ms(10));
    let wide = move |settings: &Settings| {
        launches += 1;
        flag.store(launches == cut, Ordering::Relaxed);
        inner(settings)
    };
    let error = experiment("", ms(10)).external("wide", wide).run(target, &interrupt).unwrap_err();
    let ExperimentError::Interrupted { done, cells, .. } = error else { panic!("{error}") };
    (done, cells)
}

/// The message of a run that is refused.
pub(crate) fn refused(target: &Target) -> String {
    experiment("", ms(10)).run(target, &AtomicBool::new(false)).unwrap_err().to_string()
}
