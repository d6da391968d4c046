//! The lines that go to and fro. One JSON object a line, told apart by `type`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use quire_workloads::{FinishReason, StepRecord};
use serde::{Deserialize, Serialize};

use super::{TorchDevice, TorchDtype, TransformersBatching, TransformersModel, TransformersOptions};
use crate::BaselineError;

/// Version of the protocol; both sides refuse another.
pub(super) const PROTOCOL: u32 = 2;

/// The longest line that is read.
pub(super) const MAX_LINE: usize = 16 << 20;

/// From us to the peer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Command {
    /// The first line: what to load and how to run.
    Hello(Hello),
    /// Our clock, for the times in step records; sent when the peer is ready.
    Clock { now_s: f64 },
    /// A request. `end` is where the trace's output ended.
    Submit { id: u64, prompt: Vec<u32>, max_tokens: u32, end: Option<u32> },
    /// Ends a request early.
    Cancel { id: u64 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) model: Source,
    pub(super) dtype: TorchDtype,
    pub(super) device: TorchDevice,
    pub(super) threads: usize,
    pub(super) batching: Batching,
    pub(super) max_model_len: Option<usize>,
    pub(super) kv_bytes: Option<u64>,
    pub(super) record_steps: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Source {
    Folder { path: PathBuf },
    Dummy { config: String, seed: u32 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Batching {
    Static { batch_size: usize, timeout_s: f64 },
    Continuous { token_budget: usize, max_running: usize, block_size: usize },
}

/// From the peer to us.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Reply {
    /// The answer to `hello`: requests may come.
    Ready { protocol: u32, versions: BTreeMap<String, String>, vocab_size: usize },
    /// Or: these Python packages cannot be imported.
    Missing { packages: Vec<String> },
    /// Or: it did not work.
    StartFailed { reason: String },
    /// One pass's tokens, `[request, token]` each.
    Tokens { tokens: Vec<(u64, u32)> },
    /// All tokens of a request were sent, and its static batch is over.
    Finished { id: u64, reason: FinishReason, preemptions: u32 },
    /// Refused.
    Rejected { id: u64, reason: String },
    /// Ended on our wish.
    Cancelled { id: u64 },
    /// One pass.
    Step(Step),
}

/// What the peer says about a pass; fields as in [`StepRecord`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Step {
    step: u64,
    start_s: f64,
    schedule_s: f64,
    execute_s: f64,
    commit_s: f64,
    running: u32,
    waiting: u32,
    prefill_tokens: u32,
    decode_tokens: u32,
    padding_tokens: u32,
    preempted: u32,
    kv_used: u64,
    kv_reserved: u64,
    kv_internal: u64,
    kv_free: u64,
}

impl From<Step> for StepRecord {
    fn from(step: Step) -> Self {
        Self {
            step: step.step,
            start_s: step.start_s,
            schedule_s: step.schedule_s,
            execute_s: step.execute_s,
            commit_s: step.commit_s,
            running: step.running,
            waiting: step.waiting,
            prefill_tokens: step.prefill_tokens,
            decode_tokens: step.decode_tokens,
            padding_tokens: step.padding_tokens,
            preempted: step.preempted,
            kv_used: step.kv_used,
            kv_reserved: step.kv_reserved,
            kv_internal: step.kv_internal,
            kv_free: step.kv_free,
            ..Self::default()
        }
    }
}

impl Hello {
    /// The first line for these options.
    pub(super) fn new(options: &TransformersOptions) -> Result<Self, BaselineError> {
        let wrong = |reason: &str| Err(BaselineError::Options(reason.into()));
        if options.threads == 0 {
            return wrong("threads is 0");
        }
        if options.max_model_len.is_some_and(|len| len < 2) {
            return wrong("max_model_len is below 2");
        }
        if let Err(reason) = options.batching.check() {
            return wrong(&reason);
        }
        if options.kv_bytes.is_none() && matches!(options.batching, TransformersBatching::Continuous { .. }) {
            return wrong("continuous batching needs kv_bytes: its cache has a fixed size");
        }
        Ok(Self {
            protocol: PROTOCOL,
            model: match &options.model {
                TransformersModel::Folder(path) => Source::Folder { path: path.clone() },
                TransformersModel::Dummy { config, seed } => {
                    Source::Dummy { config: config.clone(), seed: *seed }
                }
            },
            dtype: options.dtype,
            device: options.device,
            threads: options.threads,
            batching: match options.batching {
                TransformersBatching::Static { batch_size, timeout } => {
                    Batching::Static { batch_size, timeout_s: timeout.as_secs_f64() }
                }
                TransformersBatching::Continuous { token_budget, max_running, block_size } => {
                    Batching::Continuous { token_budget, max_running, block_size }
                }
            },
            max_model_len: options.max_model_len,
            kv_bytes: options.kv_bytes,
            record_steps: options.record_steps,
        })
    }
}
