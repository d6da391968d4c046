//! Rules that decide what runs: a read-only view in, a [`Plan`] out. One file a policy.
//!
//! A policy outside this crate implements [`SchedulerPolicy`] and is given to `Engine::with_policy`.

mod continuous;
mod prefill_first;
mod priority;
mod static_batching;
mod view;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use continuous::Continuous;
pub use prefill_first::PrefillFirst;
pub use priority::Priority;
pub use static_batching::StaticBatching;
pub use view::{SchedulerView, SeqKey, SeqView};

use crate::config::is_on;
use crate::{EngineError, KvLayout, SchedulerConfig};

/// What to do in one step. Applied in this order: `reject`, `preempt`, `admit`, `run`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Waiting sequences to refuse, with the reason; none of their tokens was delivered.
    pub reject: Vec<(SeqKey, String)>,
    /// Running sequences to take the KV memory from; they wait again, and are recomputed or, where there is a swap space,
    /// swapped in.
    pub preempt: Vec<SeqKey>,
    /// Waiting sequences to give KV memory for all their known tokens (paged) or their reservation (contiguous).
    pub admit: Vec<SeqKey>,
    /// Sequences to compute tokens of, and how many: at least one, and at most as many as are pending and proposed.
    pub run: Vec<(SeqKey, u32)>,
    /// Padding rows to compute beside them.
    pub padding: u32,
    /// When nothing runs: the time at which to plan again, if nothing happens before.
    pub wait_until: Option<Instant>,
}

impl Plan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.reject.clear();
        self.preempt.clear();
        self.admit.clear();
        self.run.clear();
        self.padding = 0;
        self.wait_until = None;
    }
}

/// A rule that decides what runs in the next step.
pub trait SchedulerPolicy: Send {
    /// Fills `plan`, which is empty, for the state that `view` shows. A plan that breaks the engine's limits or
    /// asks for KV memory that is not there is an error that ends the engine: try it on [`SchedulerView::kv_trial`].
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan);

    /// Whether sequences that ended keep their place and KV memory until all that run have ended. They cannot be
    /// preempted: such a policy admits only what fits at its longest.
    fn ends_together(&self) -> bool {
        false
    }
}

/// Which of the engine's own policies runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum PolicyConfig {
    /// Iteration-level batching, first come first served, prefill split beside decodes (Orca, Sarathi-Serve).
    Continuous {
        /// Share of the KV memory kept free for growth when a request is admitted. A contiguous layout reserves what a
        /// request will grow to: there it is refused, but for the default, which stands for nothing said.
        #[serde(default = "default_watermark")]
        watermark: f64,
    },
    /// The same without chunked prefill: prompts go first, in steps of their own (early vLLM).
    PrefillFirst {
        /// Share of the KV memory kept free for growth when a request is admitted. A contiguous layout reserves what a
        /// request will grow to: there it is refused, but for the default, which stands for nothing said.
        #[serde(default = "default_watermark")]
        watermark: f64,
    },
    /// Continuous batching by classes of requests: a better class preempts a worse one.
    Priority {
        /// Share of the KV memory kept free for growth when a request is admitted. A contiguous layout reserves what a
        /// request will grow to: there it is refused, but for the default, which stands for nothing said.
        #[serde(default = "default_watermark")]
        watermark: f64,
        /// A request gains a class for each so many milliseconds it has been there, and without `chunked` decodes wait no longer for
        /// prompts, so that none starves; 0 is never.
        #[serde(default = "default_aging")]
        aging_ms: u64,
        /// Prefill split beside decodes (Sarathi-Serve). Off, prompts go first, whole and in steps of their own, as with
        /// `prefill_first`: so that chunks can be left out alone where there are classes.
        #[serde(default = "on", skip_serializing_if = "is_on")]
        chunked: bool,
    },
    /// Batches that start and end together, padded.
    Static {
        /// Requests in a batch, at most.
        batch_size: u32,
        /// How long the oldest request waits for a batch to fill, milliseconds.
        timeout_ms: u64,
    },
    /// A policy from outside, given to the engine ([`EngineParts::policy`](crate::EngineParts::policy)).
    External {},
}

/// A contiguous layout's configurations have it written in them too: committed manifests name every setting.
const DEFAULT_WATERMARK: f64 = 0.01;

fn default_watermark() -> f64 {
    DEFAULT_WATERMARK
}

fn default_aging() -> u64 {
    10_000
}

fn on() -> bool {
    true
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self::Continuous { watermark: DEFAULT_WATERMARK }
    }
}

impl PolicyConfig {
    /// The policy.
    ///
    /// # Errors
    /// When it is to be given from outside.
    pub fn build(&self) -> Result<Box<dyn SchedulerPolicy>, EngineError> {
        Ok(match *self {
            Self::Continuous { watermark } => Box::new(Continuous::new(watermark)),
            Self::PrefillFirst { watermark } => Box::new(PrefillFirst::new(watermark)),
            Self::Priority { watermark, aging_ms, chunked } => {
                Box::new(Priority::new(watermark, Duration::from_millis(aging_ms), chunked))
            }
            Self::Static { batch_size, timeout_ms } => {
                Box::new(StaticBatching::new(batch_size, Duration::from_millis(timeout_ms)))
            }
            Self::External {} => {
                let what = "scheduler.policy is external, and no policy was given (EngineParts::policy)";
                return Err(EngineError::Config(what.into()));
            }
        })
    }

    /// Checks the settings against each other and the scheduler's.
    pub(crate) fn validate(&self, scheduler: &SchedulerConfig, kv: KvLayout) -> Result<(), EngineError> {
        let grows = matches!(kv, KvLayout::Paged { .. });
        let problem = match *self {
            Self::Continuous { watermark }
            | Self::PrefillFirst { watermark }
            | Self::Priority { watermark, .. }
                if !(0.0..1.0).contains(&watermark) =>
            {
                format!("watermark is {watermark}: choose a share from 0 to below 1")
            }
            Self::Continuous { watermark }
            | Self::PrefillFirst { watermark }
            | Self::Priority { watermark, .. }
                if !grows && watermark != 0.0 && watermark != DEFAULT_WATERMARK =>
            {
                format!(
                    "watermark is {watermark}, and contiguous KV reserves what a request grows to, so that nothing need be \
                     kept free: leave it out, or set it to 0"
                )
            }
            Self::Static { batch_size: 0, .. } => "batch_size is 0: set it to at least 1".into(),
            Self::Static { batch_size, .. } if batch_size > scheduler.max_running => format!(
                "batch_size {batch_size} exceeds scheduler.max_running {}: lower the one or raise the other",
                scheduler.max_running
            ),
            Self::Static { batch_size, .. } if batch_size > scheduler.token_budget => format!(
                "batch_size {batch_size} exceeds scheduler.token_budget {}, and a step needs a row for each \
                 sequence: lower the one or raise the other",
                scheduler.token_budget
            ),
            _ => return Ok(()),
        };
        Err(EngineError::Config(format!("scheduler.policy: {problem}")))
    }
}
