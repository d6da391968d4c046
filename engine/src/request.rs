//! What a client asks, and what it hears back.

use std::sync::Arc;

use crate::beam_search::{BeamSearch, Hypothesis};

/// How output tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the most probable tokens up to this many; 0 keeps all.
    pub top_k: u32,
    /// Keep the most probable tokens up to this mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens below this share of the most probable one's probability; 0 drops none.
    pub min_p: f32,
    /// Multiplicative penalty on tokens seen in prompt or output (Keskar et al. 2019); 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 is none.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the output; 0 is none.
    pub frequency_penalty: f32,
    /// Seed of this request's random numbers.
    pub seed: u64,
    /// Whether to return the log-probability of each token.
    pub logprobs: bool,
    /// Return this many of the most probable tokens at each place, with their log-probabilities: at most
    /// [`MAX_TOP_LOGPROBS`].
    pub top_logprobs: u32,
}

/// The most tokens of a place that can be asked for.
pub const MAX_TOP_LOGPROBS: u32 = 32;

impl Eq for SamplingParams {}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: false,
            top_logprobs: 0,
        }
    }
}

impl SamplingParams {
    /// Whether sampling looks at the tokens so far.
    #[inline]
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks that every parameter has a meaning.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn validate(&self) -> Result<(), String> {
        let refuse = |name: &str, value: f32, range: &str| Err(format!("{name} is {value}: choose {range}"));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "more than 0, at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "0 to 1");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return refuse("repetition_penalty", self.repetition_penalty, "more than 0");
        }
        if !self.presence_penalty.is_finite() {
            return refuse("presence_penalty", self.presence_penalty, "a number");
        }
        if !self.frequency_penalty.is_finite() {
            return refuse("frequency_penalty", self.frequency_penalty, "a number");
        }
        if self.top_logprobs > MAX_TOP_LOGPROBS {
            return Err(format!("top_logprobs is {}: choose at most {MAX_TOP_LOGPROBS}", self.top_logprobs));
        }
        Ok(())
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Unique among the requests alive in an engine.
    pub id: u64,
    /// Prompt token ids, at least one.
    pub prompt: Vec<u32>,
    /// The most tokens to generate: all that a scheduler may know of the output's length.
    pub max_tokens: u32,
    /// Where the output ends, as at an end-of-sequence token: known to the workload, not to the scheduler, except
    /// through the `oracle` and `pow2` reservations.
    pub true_output_len: Option<u32>,
    /// Tokens that end the output.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are chosen.
    pub sampling: Arc<SamplingParams>,
    /// Another sample of the same prompt as this request, submitted before: it waits until that one's prompt is computed, and
    /// starts with its K and V (paged KV). For one that ended or was preempted meanwhile, another of its samples that runs
    /// stands in; where none does, this one computes the prompt itself. Prompt and salt must be the same.
    pub fork_of: Option<u64>,
    /// Search for the most probable outputs instead of sampling one: tokens come at the end, in an [`Event::Hypotheses`]. It
    /// takes the model's own probabilities, so `sampling` must be the default; and a policy whose batches do not end together.
    pub beam: Option<BeamSearch>,
    /// Its class, for a policy that has classes; 0 is the best.
    pub priority: u8,
    /// Requests find each other's prompts in the prefix cache only where this is equal: one number a tenant keeps tenants
    /// from learning what others asked.
    pub cache_salt: u64,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is no request that this engine serves.
    Invalid,
    /// It needs more than one sequence can have here, of the context or of KV memory.
    TooLarge,
    /// A request of its id is alive.
    DuplicateId,
    /// As many wait as may; later it may be taken.
    QueueFull,
    /// The policy refused it.
    Policy,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or the trace's end of the output.
    Stop,
    /// `max_tokens` or the model's limit.
    Length,
    /// The sequence alone outgrew the KV memory.
    KvExhausted,
}

/// Something that happened to a request in a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token.
    Token {
        /// The request.
        id: u64,
        /// The token and, when asked for, its log-probability.
        sampled: crate::Sampled,
    },
    /// What a beam search found, just before its end.
    Hypotheses {
        /// The request.
        id: u64,
        /// The best first; fewer than the width where no more outputs are possible.
        hypotheses: Vec<Hypothesis>,
    },
    /// The end.
    Finished {
        /// The request.
        id: u64,
        /// Why.
        reason: FinishReason,
        /// Times it was preempted.
        preemptions: u32,
        /// Prompt tokens that were there when it began: found in the prefix cache, or, of a fork whose blocks are shared, computed
        /// by the request that it is a fork of.
        cached_tokens: u32,
    },
    /// Refused. A request that is alive under the same id goes on.
    Rejected {
        /// The request.
        id: u64,
        /// Why, for a program.
        refusal: Refusal,
        /// Why, for a person.
        reason: String,
    },
    /// Ended by `Engine::cancel`.
    Cancelled {
        /// The request.
        id: u64,
    },
}

impl Event {
    /// The request that it is about.
    pub fn id(&self) -> u64 {
        let (Self::Token { id, .. }
        | Self::Hypotheses { id, .. }
        | Self::Finished { id, .. }
        | Self::Rejected { id, .. }
        | Self::Cancelled { id }) = self;
        *id
    }
}
