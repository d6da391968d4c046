//! The configuration as it is written: one TOML a figure. Unknown fields are refused everywhere.

mod claim;
mod figure;
mod source;
mod sweep;

use std::collections::BTreeMap;

use quire_engine::model::WeightDtype;
use quire_kernels::KvDtype;
use quire_workloads::{ArrivalProcess, ConversationSpec, Decoding, LengthSource, OverLimit, WorkloadSpec};
use serde::{Deserialize, Serialize};

pub use claim::{ClaimConfig, Quantity, RateChoice, RateEnd, ServedEnd};
pub(crate) use claim::{Claims, check_bounds, panel_of};
pub use figure::{FigureConfig, SweepScale};
pub(crate) use figure::{FigureKind, Head};
pub(crate) use source::Step;
pub use source::{ConfigError, Source};
pub(crate) use sweep::no_system;
pub use sweep::{SweepConfig, SweepPoint};

use crate::metrics::Slo;
use crate::systems::SystemConfig;

/// A configuration file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of the experiment: its folder under `results/` and its figure's file name.
    pub name: String,
    /// The device that it is for, where a run on another would show nothing; such a run is refused.
    pub needs: Option<Device>,
    /// What the figure shows; metrics against the request rate when left out.
    #[serde(default)]
    pub figure: FigureConfig,
    /// The model: `dummy:SHAPE`, a Hugging Face folder or a GGUF file.
    pub model: String,
    /// How weights are held.
    pub weights: WeightDtype,
    /// How K and V are held.
    pub kv_dtype: KvPrecision,
    /// Threads of each system; all cores when left out.
    pub threads: Option<u16>,
    /// Devices that the engines' model is divided over (tensor parallelism): GPUs, or on a CPU groups of threads.
    #[serde(default = "one_device")]
    pub tensor_parallel: u16,
    /// Bytes of KV memory of each system, of all its devices together.
    pub kv_bytes: u64,
    /// The longest sequence, prompt and output: what a system must be ready for.
    pub max_model_len: u32,
    /// Factor on the lengths of every panel's workload.
    pub length_scale: f64,
    /// Limits for goodput.
    pub slo: Slo,
    /// How cells run.
    pub run: RunConfig,
    /// Columns of the figure: one workload each.
    pub panel: Vec<PanelConfig>,
    /// Lines of the figure.
    pub system: Vec<SystemEntry>,
    /// What `--quick` changes.
    #[serde(default)]
    pub quick: ProfileConfig,
    /// What `--full` changes.
    #[serde(default)]
    pub full: ProfileConfig,
    /// What `--device cuda` changes.
    pub cuda: Option<CudaConfig>,
    /// What papers found. They are no part of what runs: a run is held against them when it is shown.
    #[serde(default)]
    pub claim: Vec<ClaimConfig>,
}

pub(crate) fn one_device() -> u16 {
    1
}

/// What runs differently on a GPU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CudaConfig {
    /// Instead of `model`.
    pub model: String,
    /// Instead of `weights`.
    pub weights: WeightDtype,
    /// Instead of `kv_dtype`.
    pub kv_dtype: KvPrecision,
    /// Instead of `tensor_parallel`.
    pub tensor_parallel: Option<u16>,
    /// Instead of `kv_bytes`.
    pub kv_bytes: u64,
    /// Instead of `max_model_len`.
    pub max_model_len: u32,
    /// Whether the engines' tokens must not depend on what is computed together, at some cost in speed.
    #[serde(default)]
    pub batch_invariant: bool,
    /// Instead of `length_scale`.
    pub length_scale: f64,
    /// Instead of `[slo]`.
    pub slo: Option<Slo>,
    /// What changes in every engine.
    #[serde(default)]
    pub engine: EngineChanges,
    /// Instead of the systems of the same names; others are added.
    #[serde(default)]
    pub system: Vec<SystemEntry>,
    /// Systems that do not run there; of a sweep, all of its points or some.
    #[serde(default)]
    pub without: Vec<String>,
    /// Changes of `[run]` and of the rates.
    #[serde(default)]
    pub run: ProfileConfig,
}

/// What changes in every engine on another device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineChanges {
    /// Instead of `scheduler.token_budget`.
    pub token_budget: Option<u32>,
    /// Instead of `scheduler.max_running`.
    pub max_running: Option<u32>,
    /// Instead of `kv.block_size`, where there is one.
    pub block_size: Option<u32>,
    /// Instead of `preemption.bytes`, of engines that swap: a token's K and V are of another size there.
    pub swap_bytes: Option<u64>,
}

/// Where the systems compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
}

impl Device {
    /// Whether it is the CPU: older manifests do not say.
    pub(crate) fn is_cpu(&self) -> bool {
        *self == Self::Cpu
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("'{text}' is neither cpu nor cuda")),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}

/// How K and V are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvPrecision {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// Half precision, on a GPU.
    F16,
    /// e4m3, on a GPU.
    Fp8,
}

impl KvPrecision {
    /// Its name in configurations and captions.
    pub fn name(self) -> &'static str {
        KvDtype::from(self).name()
    }
}

impl From<KvPrecision> for KvDtype {
    fn from(precision: KvPrecision) -> Self {
        match precision {
            KvPrecision::F32 => KvDtype::F32,
            KvPrecision::Bf16 => KvDtype::Bf16,
            KvPrecision::F16 => KvDtype::F16,
            KvPrecision::Fp8 => KvDtype::Fp8,
        }
    }
}

/// How cells run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Requests in a cell; left out where `seconds` says how many. Manifests of older runs have both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u32>,
    /// Instead of `requests`: as many as come in this many seconds at the cell's rate, so that all cells take alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// A cell ends its arrivals after this many seconds even where `requests` wants more: at rates that only a slow
    /// system needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_s: Option<f64>,
    /// Repeats, each with a seed of its own shared by all systems.
    pub repeats: u32,
    /// Seed of the first repeat; the others count up.
    pub seed: u64,
    /// Share of the arrivals' time left out at the start of the stationary window.
    pub warm_up: f64,
    /// Share left out at its end.
    pub drain: f64,
    /// Seconds after the last intended arrival at which a cell ends; requests unfinished then are censored.
    pub drain_limit_s: f64,
    /// Leave out the rates above the first at which a system is saturated (decided in the first repeat).
    pub stop_after_saturation: bool,
    /// Requests sent before each cell so that code and memory are warm.
    pub warm_up_requests: u32,
    /// A request sent later than this after its intended arrival is late, seconds.
    pub lag_bound_s: f64,
    /// Share of late requests above which a cell is void.
    pub lag_share: f64,
}

impl RunConfig {
    /// Requests of a cell at `rate`.
    pub fn requests_at(&self, rate: f64) -> u32 {
        // A fraction of a request that is only a rounding error is none.
        let within = |seconds: f64| ((seconds * rate - 1e-9).ceil() as u32).max(2);
        // One of them is there: that is checked.
        let requests = self.requests.unwrap_or_default();
        match (self.seconds, self.longest_s) {
            (Some(seconds), _) => within(seconds),
            (None, Some(longest)) => requests.min(within(longest)),
            (None, None) => requests,
        }
    }

    /// How large a cell is, for captions.
    pub fn describe_size(&self) -> String {
        let requests = self.requests.unwrap_or_default();
        match (self.seconds, self.longest_s) {
            (Some(seconds), _) => format!("{seconds} s of requests"),
            (None, Some(longest)) => format!("{requests} requests or {longest} s"),
            (None, None) => format!("{requests} requests"),
        }
    }
}

/// A column of the figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PanelConfig {
    /// Name for records and `--only`.
    pub name: String,
    /// Title in the figure.
    pub title: String,
    /// How long requests are.
    pub lengths: LengthSource,
    /// When they come.
    pub arrivals: Arrivals,
    /// What becomes of requests longer than the model's limit.
    #[serde(default)]
    pub over_limit: OverLimit,
    /// Tokens with which every prompt begins, before those of its own; scaled as lengths are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shared_prefix: u32,
    /// Factor on this panel's lengths beside the configuration's, where its workload is too long for the others' machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length_scale: Option<f64>,
    /// Requests are turns of conversations. A rate is of requests all the same: see [`ConversationSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversations: Option<ConversationSpec>,
    /// Weights of priority classes, the best first; none when empty. Systems without classes serve them all alike.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<u32>,
    /// What is wanted of each prompt: one output when left out.
    #[serde(default, skip_serializing_if = "Decoding::is_single")]
    pub decoding: Decoding,
    /// Request rates, ascending.
    pub rates: Vec<f64>,
    /// Whether `--trace` puts a real trace in the place of this panel's lengths, arrivals, conversations and shared prefix.
    #[serde(default)]
    pub replay: bool,
    /// Of that trace, one conversation in this many ([`TraceSource::one_in`](quire_workloads::TraceSource::one_in)). Settings
    /// have none: it is in the lengths then.
    #[serde(default = "all", skip_serializing_if = "is_all")]
    pub replay_one_in: u32,
}

fn all() -> u32 {
    1
}

fn is_all(one_in: &u32) -> bool {
    *one_in == 1
}

fn is_zero(tokens: &u32) -> bool {
    *tokens == 0
}

/// The kind of an arrival process; the rate is the panel's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Arrivals {
    /// Exponential gaps.
    Poisson {},
    /// Gamma gaps.
    Gamma {
        /// Coefficient of variation of the gaps.
        cv: f64,
    },
    /// Equal gaps.
    Uniform {},
    /// The times of the trace that the lengths come from, sped up or slowed down as a whole.
    Trace {},
}

impl PanelConfig {
    /// The workload of a cell; its rate is still to be set by [`WorkloadSpec::at_rate`].
    pub fn spec(&self, requests: u32, length_scale: f64) -> WorkloadSpec {
        let arrivals = match self.arrivals {
            Arrivals::Poisson {} => ArrivalProcess::Poisson { rate: 1.0 },
            Arrivals::Gamma { cv } => ArrivalProcess::Gamma { rate: 1.0, cv },
            Arrivals::Uniform {} => ArrivalProcess::Uniform { rate: 1.0 },
            Arrivals::Trace {} => ArrivalProcess::Trace { rate_scale: 1.0 },
        };
        WorkloadSpec {
            requests: requests as usize,
            lengths: self.lengths.clone(),
            arrivals,
            length_scale: length_scale * self.length_scale.unwrap_or(1.0),
            over_limit: self.over_limit,
            shared_prefix: self.shared_prefix,
            conversations: self.conversations.clone(),
            classes: self.classes.clone(),
            decoding: self.decoding,
        }
    }
}

/// A line of the figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemEntry {
    /// Name for records and `--only`.
    pub name: String,
    /// Name in the legend.
    pub label: String,
    /// What serves.
    pub serve: SystemConfig,
    /// The panels that it runs in; all of them when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub panels: Vec<String>,
    /// Where this system's line starts, by panel; at the panel's lowest rate when left out. A fast system's cells at
    /// rates that only a slow one needs would take long and show nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub from_rate: BTreeMap<String, f64>,
    /// One system for each value of a setting, in the place of this one. Settings have none: it was carried out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepConfig>,
    /// Where it lies in a figure over a parameter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<SweepPoint>,
}

impl SystemEntry {
    /// Whether this system has cells in `panel`.
    pub fn runs_in(&self, panel: &str) -> bool {
        self.panels.is_empty() || self.panels.iter().any(|name| name == panel)
    }

    /// Whether this system has cells at `rate` of `panel`.
    pub fn runs_at(&self, panel: &str, rate: f64) -> bool {
        self.runs_in(panel) && self.from_rate.get(panel).is_none_or(|&from| rate >= from)
    }
}

impl ProfileConfig {
    /// Makes the changes.
    pub(crate) fn apply(&self, run: &mut RunConfig, panels: &mut [PanelConfig], systems: &mut [SystemEntry]) {
        run.requests = self.requests.or(run.requests);
        run.longest_s = self.longest_s.or(run.longest_s);
        run.repeats = self.repeats.unwrap_or(run.repeats);
        run.drain_limit_s = self.drain_limit_s.unwrap_or(run.drain_limit_s);
        run.stop_after_saturation = self.stop_after_saturation.unwrap_or(run.stop_after_saturation);
        for panel in panels {
            if let Some(rates) = self.rates.get(&panel.name) {
                panel.rates.clone_from(rates);
            }
            if let Some(&one_in) = self.replay_one_in.get(&panel.name) {
                panel.replay_one_in = one_in;
            }
        }
        for system in systems {
            let of_sweep = || self.from_rate.iter().find(|(name, _)| system.is_point_of(name));
            let from_rate = self.from_rate.get(&system.name).or_else(|| of_sweep().map(|(_, rates)| rates));
            if let Some(from_rate) = from_rate {
                system.from_rate = from_rate.clone();
            }
        }
    }
}

/// What a profile changes.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileConfig {
    /// Instead of `run.requests`.
    pub requests: Option<u32>,
    /// Instead of `run.longest_s`.
    pub longest_s: Option<f64>,
    /// Instead of `run.repeats`.
    pub repeats: Option<u32>,
    /// Instead of `run.drain_limit_s`.
    pub drain_limit_s: Option<f64>,
    /// Instead of `run.stop_after_saturation`.
    pub stop_after_saturation: Option<bool>,
    /// Instead of a panel's rates, by its name.
    #[serde(default)]
    pub rates: BTreeMap<String, Vec<f64>>,
    /// Instead of a panel's `replay_one_in`, by its name: longer cells need more of a trace.
    #[serde(default)]
    pub replay_one_in: BTreeMap<String, u32>,
    /// Instead of a system's `from_rate`, by its name; that of a sweep is for all of its points.
    #[serde(default)]
    pub from_rate: BTreeMap<String, BTreeMap<String, f64>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "requests = 60\nrepeats = 1\nseed = 1\nwarm_up = 0.0\ndrain = 0.0\ndrain_limit_s = 4.0\n\
                       stop_after_saturation = true\nwarm_up_requests = 2\nlag_bound_s = 0.05\nlag_share = 0.02";

    #[test]
    fn seconds_give_requests_by_rate() {
        let mut run: RunConfig = toml::from_str(RUN).unwrap();
        assert_eq!(run.requests_at(7.0), 60);
        (run.requests, run.seconds) = (None, Some(30.0));
        assert_eq!([3.2, 7.6, 19.0, 0.01].map(|rate| run.requests_at(rate)), [96, 228, 570, 2]);
    }

    #[test]
    fn a_longest_time_bounds_requests_at_low_rates() {
        let mut run: RunConfig = toml::from_str(RUN).unwrap();
        run.longest_s = Some(20.0);
        assert_eq!([0.01, 0.25, 3.0, 7.0].map(|rate| run.requests_at(rate)), [2, 5, 60, 60]);
        assert_eq!(run.describe_size(), "60 requests or 20 s");
    }
}
