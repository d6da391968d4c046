//! Speculative decoding (Leviathan et al., ICML'23): cheap proposals of the next tokens, verified in one forward pass.
//!
//! A step computes a decoding sequence's last token and the tokens proposed to follow it, and samples a token after each:
//! from the same logits and with the same random numbers as without speculation, because a draw is a function of the
//! request's seed and the token's index alone. A proposal is accepted where it is the token sampled in its place. What is
//! given out is always what the model sampled, and never depends on the proposal: outputs are exactly those without
//! speculation, greedy or not, however proposals come about. (Synthetic acceptance is for experiments and keeps nothing of this.)
//!
//! So proposals may depend on those very random numbers, and those of models do: a draft model and an early exit draw with
//! the seed and the index of the token that they stand for (common random numbers). The two draws are coupled: where the
//! distributions are near each other they mostly give the same token, and the share of proposals accepted is that of the
//! coupling, not the sum over tokens of min(p, q) of the paper's rejection sampling (§2.3), which draws the proposal apart.
//! A look-up is a function of the tokens known: it is accepted with the probability that the model gives it, as there.

mod early_exit;
mod length;
mod model;
mod ngram;
mod passes;
mod suffix;
mod synthetic;

use std::time::Instant;

use serde::{Deserialize, Serialize};

pub(crate) use self::length::LengthRule;
pub use self::length::expected_tokens;
pub use self::model::DraftModel;
use crate::kv::KvHold;
use crate::sampling::uniform;
use crate::{EngineError, Executor, KvLayout, PolicyConfig, ScheduledBatch, SchedulerConfig, StepStats};

/// How tokens are proposed, and how many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeculationConfig {
    /// Where proposals come from.
    pub drafter: DrafterConfig,
    /// How many tokens are proposed.
    pub length: DraftLength,
}

/// Where proposals come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DrafterConfig {
    /// What followed the last tokens where they stood in the sequence before (prompt look-up decoding).
    NGram {
        /// Most tokens to look up; tried first.
        #[serde(default = "default_longest")]
        longest: u32,
        /// Fewest tokens to look up.
        #[serde(default = "default_shortest")]
        shortest: u32,
    },
    /// What followed the last tokens most often in this and in earlier requests (SuffixDecoding, Oliaro et al., 2024).
    Suffix {
        /// Most tokens of context that are kept and looked up.
        #[serde(default = "default_depth")]
        depth: u32,
    },
    /// The model's own first layers and its output head (self-speculation; Elhoushi et al., LayerSkip, ACL'24).
    EarlyExit {
        /// Layers, fewer than the model has.
        layers: u32,
    },
    /// A smaller model of the same vocabulary: a [`DraftModel`] that is given to the engine
    /// ([`EngineParts::drafter`](crate::EngineParts::drafter)).
    Model {},
    /// A drafter from outside, given in the same way.
    External {},
    /// Made-up proposals of which a stated share is accepted: for experiments on systems with random weights. Outputs mean
    /// nothing and are not those without speculation.
    Synthetic {
        /// Probability with which a proposal is accepted when those before it were.
        acceptance: f64,
        /// Seed of what is accepted.
        #[serde(default)]
        seed: u64,
    },
}

fn default_longest() -> u32 {
    4
}

fn default_shortest() -> u32 {
    2
}

fn default_depth() -> u32 {
    16
}

/// How many tokens are proposed for a sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DraftLength {
    /// Always as many, where there are.
    Fixed {
        /// Tokens.
        tokens: u32,
    },
    /// As many as promise most tokens a second, by what was accepted and by how long steps took lately; none under a load
    /// at which speculation does not pay (Liu et al., 2024, SmartSpec).
    Adaptive {
        /// Tokens at most.
        most: u32,
    },
}

impl DraftLength {
    /// Tokens at most.
    pub fn most(self) -> u32 {
        match self {
            Self::Fixed { tokens } => tokens,
            Self::Adaptive { most } => most,
        }
    }
}

/// Most tokens that may be proposed for a sequence.
const LENGTH_LIMIT: u32 = 64;

impl SpeculationConfig {
    /// Checks the settings against each other and the scheduler's.
    pub(crate) fn validate(&self, scheduler: &SchedulerConfig) -> Result<(), EngineError> {
        let most = self.length.most();
        let problem = if scheduler.overlap == Some(true) {
            "the next step's tokens are proposed when this one's are known: leave scheduler.overlap away"
                .into()
        } else if matches!(scheduler.policy, PolicyConfig::Static { .. }) {
            "static batching has no steps of several tokens: choose another scheduler.policy".into()
        } else if !(1..=LENGTH_LIMIT).contains(&most) {
            format!("length: {most} tokens: choose 1 to {LENGTH_LIMIT}")
        } else {
            match self.drafter {
                DrafterConfig::NGram { longest, shortest }
                    if shortest == 0 || shortest > longest || longest > ngram::LONGEST_LIMIT =>
                {
                    format!(
                        "drafter: look-ups of {shortest} to {longest} tokens: choose 1 to {}, ascending",
                        ngram::LONGEST_LIMIT
                    )
                }
                DrafterConfig::Suffix { depth } if !(1..=suffix::DEPTH_LIMIT).contains(&depth) => {
                    format!("drafter.depth is {depth}: choose 1 to {}", suffix::DEPTH_LIMIT)
                }
                DrafterConfig::Synthetic { acceptance, .. } if !(0.0..=1.0).contains(&acceptance) => {
                    format!("drafter.acceptance is {acceptance}: choose 0 to 1")
                }
                _ => return Ok(()),
            }
        };
        Err(EngineError::Config(format!("speculation: {problem}")))
    }

    /// What decides which proposals are accepted.
    pub(crate) fn acceptance(&self) -> Acceptance {
        match self.drafter {
            DrafterConfig::Synthetic { acceptance, seed } => Acceptance::Synthetic { rate: acceptance, seed },
            _ => Acceptance::Sampled,
        }
    }

    /// The drafter; `given` is one from outside.
    pub(crate) fn build(&self, given: Option<Box<dyn Drafter>>) -> Result<Box<dyn Drafter>, EngineError> {
        let own: Box<dyn Drafter> = match self.drafter {
            DrafterConfig::NGram { longest, shortest } => Box::new(ngram::NGram::new(longest, shortest)),
            DrafterConfig::Suffix { depth } => Box::new(suffix::Suffix::new(depth)),
            DrafterConfig::EarlyExit { layers } => Box::new(early_exit::EarlyExit::new(layers)),
            DrafterConfig::Synthetic { .. } => Box::new(synthetic::Synthetic::default()),
            DrafterConfig::Model {} | DrafterConfig::External {} => {
                let what = "speculation: drafter.kind says that a drafter is given, and none was (EngineParts::drafter)";
                return given.ok_or_else(|| EngineError::Config(what.into()));
            }
        };
        match given {
            None => Ok(own),
            Some(_) => {
                let what = "speculation: a drafter was given, and drafter.kind is neither \"model\" nor \"external\"";
                Err(EngineError::Config(what.into()))
            }
        }
    }
}

/// What proposals are for.
#[derive(Clone, Copy)]
pub struct DraftTarget<'a> {
    /// What verifies them.
    pub executor: &'a dyn Executor,
    /// How KV slots are given out.
    pub layout: KvLayout,
    /// Sequences of a step, at most.
    pub sequences: u32,
    /// Tokens of a sequence, at most.
    pub max_model_len: u32,
    /// Rows of a step, at most.
    pub token_budget: u32,
}

/// A sequence for which tokens are to be proposed: all its tokens are known, and all but the last are computed.
#[derive(Debug, Clone, Copy)]
pub struct DraftContext<'a> {
    /// The request.
    pub id: u64,
    /// Prompt and output so far.
    pub tokens: &'a [u32],
    /// The request's [`Request::cache_salt`](crate::Request::cache_salt): what others had is to be proposed only where theirs is
    /// the same.
    pub cache_salt: u64,
    /// Times it was preempted: its K and V lie elsewhere after each.
    pub preemptions: u32,
    /// Where the K and V of its computed tokens lie.
    pub(crate) kv: &'a KvHold,
}

/// Rows of a batch that hold proposals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DraftSpan {
    /// The request.
    pub id: u64,
    /// The sequence's place in the batch.
    pub sequence: u32,
    /// Row of its last known token; the rows after it hold the proposals.
    pub row: u32,
    /// Place of that row among the batch's `logit_rows` and `sampling`; the proposals' follow.
    pub sample: u32,
    /// Proposals.
    pub drafted: u32,
}

/// Proposes tokens. What is proposed changes no output: a proposal is accepted where it is what the model samples in its place.
/// So it may be a function of anything known before the step, the random numbers that the model will draw with included.
pub trait Drafter: Send {
    /// Makes ready to propose for an engine, once.
    ///
    /// # Errors
    /// When it cannot propose for this one, saying what to change.
    fn prepare(&mut self, _target: DraftTarget<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// Begins a step's proposals. What was proposed in a step that did not run is void.
    fn begin(&mut self) {}

    /// Appends at most `most` tokens to `drafts` that may follow `context`; placeholders where [`Self::complete`] knows
    /// better. It need not be asked in every step.
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>);

    /// Puts the proposals into the rows of `batch.drafts`, before it runs on `executor`: for drafters that need the
    /// model, or the slots. Called for every batch, whether it has proposals or not.
    ///
    /// # Errors
    /// When a device fails.
    fn complete(
        &mut self,
        _executor: &mut dyn Executor,
        _batch: &mut ScheduledBatch,
    ) -> Result<(), EngineError> {
        Ok(())
    }

    /// Forgets a request that ended.
    fn forget(&mut self, _id: u64) {}
}

/// What decides which proposals are accepted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Acceptance {
    /// The token sampled in its place.
    Sampled,
    /// Chance.
    Synthetic { rate: f64, seed: u64 },
}

impl Acceptance {
    /// Whether `proposed` is accepted as output token `index` of request `id`, where `sampled` was.
    pub(crate) fn accepts(self, proposed: u32, sampled: u32, id: u64, index: u32) -> bool {
        match self {
            Self::Sampled => proposed == sampled,
            Self::Synthetic { rate, seed } => uniform(seed ^ id.rotate_left(32), index) < rate,
        }
    }
}

/// Tokens of a sequence that every step may make known to a drafter: what a step brings it, at most.
const STEP_TOKENS: usize = LENGTH_LIMIT as usize + 1;

/// Tokens of all sequences that a step may make known beside these: a long prompt is taken in parts, and nobody waits long
/// for it.
const PROMPT_TOKENS: usize = 1024;

/// How many of [`PROMPT_TOKENS`] a step has left.
#[derive(Debug)]
struct Allowance(usize);

impl Default for Allowance {
    /// That of a step's beginning.
    fn default() -> Self {
        Self(PROMPT_TOKENS)
    }
}

impl Allowance {
    /// How many of a sequence's `unknown` tokens this step takes.
    fn take(&mut self, unknown: usize) -> usize {
        let more = unknown.saturating_sub(STEP_TOKENS).min(self.0);
        self.0 -= more;
        unknown.min(STEP_TOKENS + more)
    }
}

/// A drafter and the rule of how many tokens it proposes.
pub(crate) struct Speculator {
    drafter: Box<dyn Drafter>,
    length: LengthRule,
    /// Time that completing the last batch's proposals took.
    draft_s: f64,
}

impl Speculator {
    pub(crate) fn new(drafter: Box<dyn Drafter>, length: DraftLength) -> Self {
        Self { drafter, length: LengthRule::new(length), draft_s: 0.0 }
    }

    /// Begins a step's proposals: so many tokens for each of `sequences` that decode.
    pub(crate) fn begin(&mut self, sequences: usize) -> u32 {
        self.drafter.begin();
        self.length.choose(sequences)
    }

    pub(crate) fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        self.drafter.propose(context, most, drafts);
    }

    pub(crate) fn complete(
        &mut self,
        executor: &mut dyn Executor,
        batch: &mut ScheduledBatch,
    ) -> Result<(), EngineError> {
        let started = Instant::now();
        self.drafter.complete(executor, batch)?;
        self.draft_s = started.elapsed().as_secs_f64();
        Ok(())
    }

    /// Learns from a step that landed.
    pub(crate) fn observe(&mut self, stats: &StepStats) {
        self.length.observe(&stats.batch, (stats.execute + stats.sample).as_secs_f64(), self.draft_s);
    }

    pub(crate) fn forget(&mut self, id: u64) {
        self.drafter.forget(id);
    }
}

impl std::fmt::Debug for Speculator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Speculator").field("length", &self.length).finish_non_exhaustive()
    }
}
