//! One cell: a system, cold, under one workload.

mod losses;

use std::sync::atomic::AtomicBool;

use quire_workloads::{
    ArrivalProcess, Decoding, LengthDistribution, LengthSource, LoadGenerator, LoadOptions, LoadResult,
    ModelLimits, OverLimit, Progress, RequestRecord, SystemError, Trace, VoidReason, Workload, WorkloadError,
    WorkloadSpec,
};

use crate::config::PanelConfig;
use crate::cpu_use::{CpuUse, CpuWatch};
use crate::experiment::ExperimentError;
use crate::gpu_use::GpuWatch;
use crate::metrics::{Ending, Observed, Window, cell_metrics};
use crate::record::{CellEntry, CellKey, CellStatus, RequestRow, StoredSteps, WorkloadLimits, observe};
use crate::settings::Settings;
use crate::systems::Launched;

/// Prompt and output of a warm-up request: enough to touch all weights in prefill and in decode.
const WARM_UP_TOKENS: (u32, u32) = (16, 3);

/// Share of a cell's requests, unfinished at its limit, from which on the system counts as overloaded: some more are
/// only long.
const UNFINISHED_SHARE: f64 = 0.05;

/// Why a cell is void, as its reason begins.
pub(crate) const SYSTEM_STOPPED: &str = "the system stopped";
pub(crate) const BROKE_PROTOCOL: &str = "the system broke the protocol";
pub(crate) const FELL_BEHIND: &str = "the client fell behind";

/// A cell's results, ready to be written.
pub(crate) struct CellResult {
    pub(crate) entry: CellEntry,
    pub(crate) requests: Vec<RequestRow>,
    pub(crate) steps: Vec<quire_workloads::StepRecord>,
    /// How many requests were rejected and failed, and mostly why; empty where none was.
    pub(crate) losses: String,
    /// Whether somebody stopped it; then it is not to be written.
    pub(crate) aborted: bool,
}

/// The workload of a cell.
pub(crate) fn workload(
    settings: &Settings,
    panel: &PanelConfig,
    key: &CellKey,
    trace: Option<&Trace>,
    limits: &ModelLimits,
) -> Result<Workload, WorkloadError> {
    let spec = panel.spec(settings.run.requests_at(key.rate), settings.length_scale).at_rate(key.rate)?;
    Workload::generate_from(&spec, trace, key.seed, limits)
}

/// Runs a cell: a short warm-up, then the workload. The GPU of this UUID is watched meanwhile.
pub(crate) fn run(
    settings: &Settings,
    key: CellKey,
    workload: &Workload,
    launched: Launched,
    gpu: Option<&str>,
    abort: &AtomicBool,
    progress: &mut dyn FnMut(Progress),
) -> Result<CellResult, ExperimentError> {
    let Launched { mut system, clock } = launched;
    let options = LoadOptions {
        drain_limit_s: settings.run.drain_limit_s,
        lag_bound_s: settings.run.lag_bound_s,
        lag_share: settings.run.lag_share,
        ..LoadOptions::default()
    };
    // It takes a while to begin, and ends with the cell, however that ends.
    let gpu = gpu.and_then(|uuid| GpuWatch::start(uuid, clock.as_ref()));
    if settings.run.warm_up_requests > 0 {
        let warm_up = warm_up(settings, &key, &workload.header.limits)?;
        // A server may compile, or make room, at its first request: that has time of its own.
        let patient = LoadOptions { drain_limit_s: LoadOptions::default().drain_limit_s, ..options };
        let warmed = LoadGenerator::new(&warm_up, patient)?;
        let warmed = warmed.run(system.as_mut(), clock.as_ref(), abort, &mut |_| {});
        if let Some(reason) = losses::is_cold(&warmed) {
            return Err(SystemError::Start { system: key.system, reason }.into());
        }
    }
    let generator = LoadGenerator::new(workload, options)?;
    let watch = CpuWatch::start();
    let result = generator.run(system.as_mut(), clock.as_ref(), abort, progress);
    let cpu = watch.and_then(|watch| watch.stop(settings.is_elsewhere(&key.system)));
    Ok(CellResult::new(settings, key, workload, result, cpu, gpu.as_ref()))
}

fn warm_up(settings: &Settings, key: &CellKey, limits: &ModelLimits) -> Result<Workload, WorkloadError> {
    let room = limits.max_model_len;
    let fixed = |tokens: u32| LengthDistribution::Fixed { tokens: tokens.min(room / 2).max(1) };
    let spec = WorkloadSpec {
        requests: settings.run.warm_up_requests as usize,
        lengths: LengthSource::Independent {
            input: fixed(WARM_UP_TOKENS.0),
            output: fixed(WARM_UP_TOKENS.1),
        },
        arrivals: ArrivalProcess::AllAtOnce {},
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    };
    // Prompts that the workload does not have.
    Workload::generate(&spec, !key.seed, limits)
}

impl CellResult {
    fn new(
        settings: &Settings,
        key: CellKey,
        workload: &Workload,
        result: LoadResult,
        cpu: Option<CpuUse>,
        gpu: Option<&GpuWatch>,
    ) -> Self {
        let observed: Vec<Observed> = result.records.iter().map(|r| observe(r, result.ended_s)).collect();
        let arrivals: Vec<f64> = observed.iter().map(|r| r.intended_s).collect();
        let window = Window::stationary(&arrivals, settings.run.warm_up, settings.run.drain);
        let metrics = [window, Window::full(&arrivals, result.ended_s)]
            .map(|w| cell_metrics(&observed, &result.steps, w, None));
        let mut reasons: Vec<String> =
            result.void.iter().map(|v| describe(v, &result.protocol_errors)).collect();
        if let Some(reason) = losses::gone(&result.records) {
            reasons.insert(0, format!("{SYSTEM_STOPPED}: {reason}"));
        }
        let status = match reasons.is_empty() {
            true => CellStatus::Done {},
            false => CellStatus::Void { reason: reasons.join("; ") },
        };
        let unfinished = observed.iter().filter(|r| r.ending == Ending::Censored).count();
        let entry = CellEntry {
            key: key.clone(),
            // The run's folder knows which, and writes it.
            sitting: 0,
            status,
            start_s: result.started_s,
            end_s: result.ended_s,
            lag: result.lag,
            overloaded: metrics[0].saturated
                || metrics[0].loses()
                || unfinished as f64 > UNFINISHED_SHARE * observed.len() as f64,
            workload_sha256: workload.sha256(),
            workload_limits: WorkloadLimits {
                dropped: workload.header.dropped,
                inadmissible: workload.header.inadmissible,
                shortened: workload.header.shortened,
                ended_early: workload.header.conversations.map_or(0, |drawn| drawn.ended_early),
            },
            conversations: result.conversations,
            steps: StoredSteps { window: metrics[0].steps, full: metrics[1].steps },
            cpu,
            gpu: gpu.and_then(|watch| watch.over(&window)),
        };
        let synthetic = settings.is_synthetic(&key.system);
        let row = |record| RequestRow { key: key.clone(), record: RequestRecord { synthetic, ..record } };
        Self {
            entry,
            losses: losses::describe(&result.records),
            aborted: result.void.contains(&VoidReason::Aborted {}),
            requests: result.records.into_iter().map(row).collect(),
            steps: result.steps,
        }
    }
}

fn describe(void: &VoidReason, errors: &[String]) -> String {
    match void {
        VoidReason::ClientFellBehind { late_share, bound_s, max_s } => format!(
            "{FELL_BEHIND}: {:.1}% of requests were sent more than {:.0} ms late, the latest {:.0} ms",
            late_share * 100.0,
            bound_s * 1e3,
            max_s * 1e3
        ),
        VoidReason::Protocol { errors: count } => {
            let first = errors.first().map_or("", String::as_str);
            format!("{BROKE_PROTOCOL} {count} times, first: {first}")
        }
        // It names itself: the cell does too.
        VoidReason::SystemStopped { reason } => {
            let why = reason.split_once(" stopped: ").map_or(&**reason, |(_, why)| why);
            format!("{SYSTEM_STOPPED}: {why}")
        }
        VoidReason::Aborted {} => "interrupted".into(),
    }
}
