//! What a step was made of and how long it took.

use std::time::{Duration, Instant};

use crate::KvUsage;

/// One step's composition: counts, the same whenever the same is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchStats {
    /// Sequences that hold KV memory and have not ended.
    pub running: u32,
    /// Requests waiting.
    pub waiting: u32,
    /// Prompt tokens computed, recomputation after preemption included.
    pub prefill_tokens: u32,
    /// Decode tokens computed.
    pub decode_tokens: u32,
    /// Tokens computed that were proposed and not known (speculative decoding).
    pub drafted_tokens: u32,
    /// Of these, accepted.
    pub accepted_tokens: u32,
    /// Sequences a proposal of which was looked at and refused: those after it were not looked at.
    pub refused_drafts: u32,
    /// Padding rows computed.
    pub padding_tokens: u32,
    /// Sequences preempted.
    pub preempted: u32,
    /// Tokens whose K and V went to host memory before the step.
    pub swapped_out: u32,
    /// Tokens whose K and V came back from there.
    pub swapped_in: u32,
    /// KV slots by state when the step's tokens are stored and before ended sequences give theirs back.
    pub kv: KvUsage,
}

/// One step of an engine's loop.
///
/// Its times are what the loop spent since the step before it landed, until its own tokens were applied. Where steps overlap
/// ([`SchedulerConfig::overlap`](crate::SchedulerConfig::overlap)), the next step is scheduled and begun in that time, so
/// `schedule` and `execute` are mostly the next step's and hide behind this one, and `sample` is the rest of this one,
/// waited for. Either way the times of all steps add up to the time the loop was busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepStats {
    /// Number of the step, from 0.
    pub step: u64,
    /// Since when the times count.
    pub started: Instant,
    /// Time spent choosing what to run.
    pub schedule: Duration,
    /// Time spent in the forward pass, proposals that it takes included; on a GPU, queueing it.
    pub execute: Duration,
    /// Time spent sampling; on a GPU, waiting for the step's end.
    pub sample: Duration,
    /// Time spent applying results.
    pub commit: Duration,
    /// What it was made of.
    pub batch: BatchStats,
}
