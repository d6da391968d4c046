//! Settings of an engine. What is written is what runs, or an error says what to change.

use serde::{Deserialize, Serialize};

use crate::policy::PolicyConfig;
use crate::{EngineError, Executor, KvLayout, SpeculationConfig};

/// Settings of an engine over an executor that is built already (weights, KV memory and its size are the
/// executor's).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// What runs when.
    pub scheduler: SchedulerConfig,
    /// How KV slots are given out.
    pub kv: KvLayout,
    /// Whether full blocks are kept, by what they hold, for later requests that begin alike; paged KV only.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prefix_cache: bool,
    /// Whether samples and beams of one prompt share its blocks. Without it each sample computes the prompt for itself, and a
    /// beam that forks copies all that it has. Contiguous KV has no blocks to share.
    #[serde(skip_serializing_if = "is_on")]
    pub share_blocks: bool,
    /// What becomes of the K and V of a sequence that is preempted.
    #[serde(skip_serializing_if = "PreemptionConfig::is_default")]
    pub preemption: PreemptionConfig,
    /// Whether and how tokens are proposed and verified several at a time; not when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub speculation: Option<SpeculationConfig>,
    /// The longest sequence, prompt and output, when it is to be shorter than the executor allows.
    pub max_model_len: Option<u32>,
}

/// Settings of the scheduler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerConfig {
    /// The rule.
    pub policy: PolicyConfig,
    /// Rows of a step's batch at most, padding included.
    pub token_budget: u32,
    /// Sequences that hold KV memory at most.
    pub max_running: u32,
    /// Requests that wait at most; more are rejected.
    pub max_waiting: u32,
    /// Whether a step is scheduled and begun while the one before it runs. By default it is where the executor runs
    /// beside the host (a GPU). On a CPU it gains nothing, and tokens come a step later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<bool>,
}

/// What becomes of the K and V of a sequence that is preempted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PreemptionConfig {
    /// They are given up, and computed again when it runs again.
    Recompute {},
    /// They go to host memory and come back. What finds no room there is computed again.
    Swap {
        /// Bytes of that memory.
        bytes: u64,
    },
}

impl Default for PreemptionConfig {
    fn default() -> Self {
        Self::Recompute {}
    }
}

impl PreemptionConfig {
    /// Whether it is the default: older configurations do not say.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether a switch that is on by default is on: it is not written down then, so that older configurations stay what they were.
pub(crate) fn is_on(switch: &bool) -> bool {
    *switch
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            scheduler: SchedulerConfig::default(),
            kv: KvLayout::default(),
            prefix_cache: false,
            share_blocks: true,
            preemption: PreemptionConfig::default(),
            speculation: None,
            max_model_len: None,
        }
    }
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            policy: PolicyConfig::default(),
            token_budget: 512,
            max_running: 256,
            max_waiting: 100_000,
            overlap: None,
        }
    }
}

impl EngineConfig {
    /// Checks the settings against each other.
    ///
    /// # Errors
    /// [`EngineError::Config`], saying what to change.
    pub fn validate(&self) -> Result<(), EngineError> {
        let scheduler = &self.scheduler;
        let refuse = |what: String| Err(EngineError::Config(what));
        for (name, value) in [
            ("scheduler.token_budget", scheduler.token_budget),
            ("scheduler.max_running", scheduler.max_running),
            ("scheduler.max_waiting", scheduler.max_waiting),
        ] {
            if value == 0 {
                return refuse(format!("{name} is 0: nothing could run; set it to at least 1"));
            }
        }
        if self.max_model_len.is_some_and(|len| len < 2) {
            return refuse("max_model_len must allow a prompt token and an output token: at least 2".into());
        }
        self.kv.validate()?;
        if self.prefix_cache && !matches!(self.kv, KvLayout::Paged { .. }) {
            return refuse(
                "prefix_cache shares blocks: set kv to { kind = \"paged\", .. }, or prefix_cache to false"
                    .into(),
            );
        }
        if !self.share_blocks && !matches!(self.kv, KvLayout::Paged { .. }) {
            return refuse(
                "share_blocks is off, and contiguous KV has no blocks to share: leave it out".into(),
            );
        }
        if self.preemption == (PreemptionConfig::Swap { bytes: 0 }) {
            return refuse(
                "preemption.bytes is 0: nothing could be swapped; give it some, or choose recompute".into(),
            );
        }
        if matches!(scheduler.policy, PolicyConfig::Static { .. }) && !self.preemption.is_default() {
            return refuse(
                "preemption is swap, and scheduler.policy static preempts nothing: leave it out".into(),
            );
        }
        if let Some(speculation) = &self.speculation {
            speculation.validate(scheduler)?;
        }
        scheduler.policy.validate(scheduler, self.kv)
    }

    /// Limits of an engine with these settings over `executor`.
    ///
    /// # Errors
    /// [`EngineError::Config`] when the settings ask for more than the executor has.
    pub(crate) fn limits(&self, executor: &impl Executor) -> Result<Limits, EngineError> {
        self.validate()?;
        let SchedulerConfig { token_budget, max_running, max_waiting, .. } = self.scheduler;
        if token_budget as usize > executor.max_batch_rows() {
            return Err(EngineError::Config(format!(
                "scheduler.token_budget is {token_budget}, but the executor takes {} rows: lower it, or build the \
                 executor with more",
                executor.max_batch_rows()
            )));
        }
        // A sequence in a batch has a row at least.
        if max_running.min(token_budget) as usize > executor.max_sequences() {
            return Err(EngineError::Config(format!(
                "scheduler.max_running is {max_running}, but the executor takes {} sequences: lower it, or build the \
                 executor for more",
                executor.max_sequences()
            )));
        }
        let model_len = u32::try_from(executor.max_model_len()).unwrap_or(u32::MAX);
        let max_model_len = self.max_model_len.unwrap_or(model_len);
        if max_model_len > model_len || max_model_len < 2 {
            return Err(EngineError::Config(format!(
                "max_model_len is {max_model_len}: choose 2 to {model_len}, the executor's limit"
            )));
        }
        let vocab_size = u32::try_from(executor.vocab_size()).unwrap_or(u32::MAX);
        let max_logit_rows = u32::try_from(executor.max_logit_rows()).unwrap_or(u32::MAX);
        Ok(Limits { token_budget, max_running, max_waiting, max_model_len, vocab_size, max_logit_rows })
    }
}

/// The bounds a scheduler keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Rows of a batch.
    pub(crate) token_budget: u32,
    /// Sequences with KV.
    pub(crate) max_running: u32,
    /// Requests that wait.
    pub(crate) max_waiting: u32,
    /// Tokens of a sequence.
    pub(crate) max_model_len: u32,
    /// Token ids are below it.
    pub(crate) vocab_size: u32,
    /// Rows of logits of a batch.
    pub(crate) max_logit_rows: u32,
}
