//! What is driven: anything that takes requests and gives tokens.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What is wanted of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Decoding {
    /// One output.
    Single {},
    /// Several outputs, each drawn with random numbers of its own (parallel sampling).
    Parallel {
        /// How many: 2 to [`Decoding::MOST`], or 1 of more that are drawn.
        outputs: u32,
        /// How many are drawn, of which `outputs` are delivered: the most probable, when all have ended. By default as many,
        /// delivered as they come.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        best_of: Option<u32>,
    },
    /// What a beam search finds, as many outputs as beams. Its tokens come at its end.
    Beam {
        /// Beams: 1, which is greedy decoding, to [`Decoding::MOST`].
        width: u32,
        /// Outputs rank by their log-probability over their length to this power.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        length_penalty: f32,
        /// When the search stops, once there are as many outputs as beams.
        #[serde(default, skip_serializing_if = "EarlyStopping::is_default")]
        early_stopping: EarlyStopping,
    },
}

// A penalty that is not a number is refused.
impl Eq for Decoding {}

fn one() -> f32 {
    1.0
}

fn is_one(penalty: &f32) -> bool {
    *penalty == 1.0
}

/// When a beam search that has as many outputs as beams stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EarlyStopping {
    /// At once.
    Always,
    /// When the best beam, at its present length, would rank below them all.
    #[default]
    Unlikely,
    /// When nothing that the best beam may become can rank above one of them.
    Impossible,
}

impl EarlyStopping {
    /// Whether it is the default; settings do not write that down.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for Decoding {
    fn default() -> Self {
        Self::Single {}
    }
}

impl Decoding {
    /// The most outputs of a prompt.
    pub const MOST: u32 = 16;

    /// So many samples, each delivered as it comes.
    pub fn parallel(outputs: u32) -> Self {
        Self::Parallel { outputs, best_of: None }
    }

    /// A beam search as wide as this, by the plain mean of log-probabilities.
    pub fn beam(width: u32) -> Self {
        Self::Beam { width, length_penalty: one(), early_stopping: EarlyStopping::default() }
    }

    /// Outputs of a prompt that are delivered.
    pub fn outputs(self) -> u32 {
        match self {
            Self::Single {} => 1,
            Self::Parallel { outputs, .. } => outputs,
            Self::Beam { width, .. } => width,
        }
    }

    /// Checks that every parameter has a meaning.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn validate(self) -> Result<(), String> {
        let most = Self::MOST;
        match self {
            Self::Parallel { outputs, best_of: Some(best_of) }
                if outputs == 0 || best_of <= outputs || best_of > most =>
            {
                Err(format!(
                    "{outputs} outputs, the best of {best_of}: choose 1 or more of up to {most} that are more"
                ))
            }
            Self::Beam { length_penalty, .. } if !(-100.0..=100.0).contains(&length_penalty) => {
                Err(format!("the length penalty is {length_penalty}: choose -100 to 100"))
            }
            Self::Parallel { outputs, best_of: None } if !(2..=most).contains(&outputs) => {
                Err(format!("{outputs} outputs of a prompt: choose 2 to {most}"))
            }
            Self::Beam { width, .. } if !(1..=most).contains(&width) => {
                Err(format!("{width} beams: choose 1 to {most}"))
            }
            _ => Ok(()),
        }
    }

    /// Whether it is one output; settings do not write that down.
    pub fn is_single(&self) -> bool {
        *self == Self::Single {}
    }
}

/// One request as a client sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationRequest {
    /// Unique within a run.
    pub id: u64,
    /// Prompt token ids.
    pub prompt: Vec<u32>,
    /// The most tokens the client accepts: what a system may know.
    pub max_tokens: u32,
    /// Where this request's output ends in the trace. The system stops there as it would at an end-of-sequence
    /// token, and must not plan with it unless it is declared an oracle.
    pub true_output_len: Option<u32>,
    /// Priority class, 0 is the best. Systems without classes serve all alike.
    pub class: u8,
    /// What is wanted of the prompt. `max_tokens` and `true_output_len` are of each output. A system that gives one output only
    /// must refuse the rest.
    pub decoding: Decoding,
}

/// Why a request ended with all its tokens delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of sequence, real or the trace's.
    Stop,
    /// `max_tokens` or the model's limit.
    Length,
    /// The sequence alone outgrew the KV memory.
    KvExhausted,
    /// The system ended it before the length that was asked for: at an end of sequence of its own, or a limit of its own.
    Early,
}

/// What happened to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    /// Tokens emitted together (one, unless speculation accepted several).
    Tokens(Vec<u32>),
    /// All tokens were delivered.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Times the sequence was preempted.
        preemptions: u32,
        /// Prompt tokens whose KV was found in a cache.
        cached_tokens: u32,
    },
    /// Refused, with the reason; no token was or will be delivered.
    Rejected {
        /// Why, for a person.
        reason: String,
    },
    /// Ended on the client's wish.
    Cancelled,
    /// The system broke while serving it.
    Failed {
        /// Why, for a person.
        reason: String,
    },
}

/// Something that happened to one request, at a time of the run's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenEvent {
    /// The request's id.
    pub request: u64,
    /// When it was emitted.
    pub at: Duration,
    /// What.
    pub kind: EventKind,
}

/// One step of a system's loop. Token counts; times on the run's clock. Fields a system cannot know are zero.
///
/// Where a system schedules a step while another runs, the times are what its loop spent from the end of the step before
/// to this one's: scheduling and queueing are mostly the next step's and hide behind this one, and sampling is the wait
/// for its end.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct StepRecord {
    /// Number of the step in its run.
    pub step: u64,
    /// Start, seconds.
    pub start_s: f64,
    /// Seconds spent choosing what to run.
    pub schedule_s: f64,
    /// Seconds spent in the forward pass.
    pub execute_s: f64,
    /// Seconds spent sampling.
    pub sample_s: f64,
    /// Seconds spent applying results.
    pub commit_s: f64,
    /// Sequences running in this step.
    pub running: u32,
    /// Requests waiting.
    pub waiting: u32,
    /// Prompt tokens computed (recomputation after preemption included).
    pub prefill_tokens: u32,
    /// Decode tokens computed.
    pub decode_tokens: u32,
    /// Tokens computed that were proposed and not known (speculative decoding).
    #[serde(default)]
    pub drafted_tokens: u32,
    /// Of these, accepted.
    #[serde(default)]
    pub accepted_tokens: u32,
    /// Sequences a proposal of which was looked at and refused; those after it were not looked at.
    #[serde(default)]
    pub refused_drafts: u32,
    /// Padding rows computed.
    pub padding_tokens: u32,
    /// Sequences preempted in this step.
    pub preempted: u32,
    /// Tokens whose K and V went to host memory before it.
    #[serde(default)]
    pub swapped_out: u32,
    /// Tokens whose K and V came back from there.
    #[serde(default)]
    pub swapped_in: u32,
    /// KV slots that hold a token's K and V.
    pub kv_used: u64,
    /// KV slots set aside for tokens that the sequence will come to fill.
    pub kv_reserved: u64,
    /// KV slots set aside that the sequence will never fill (internal fragmentation).
    pub kv_internal: u64,
    /// KV slots kept for reuse by later requests.
    pub kv_cached: u64,
    /// KV slots free (external fragmentation included).
    pub kv_free: u64,
    /// KV slots more that would be used if nothing were shared.
    #[serde(default)]
    pub kv_shared: u64,
}

/// An error of driving a system; it voids the run.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// The system's thread or process is gone.
    #[error("{system} stopped: {reason}")]
    Stopped {
        /// Which.
        system: String,
        /// Why.
        reason: String,
    },
    /// The system cannot be started.
    #[error("cannot start {system}: {reason}")]
    Start {
        /// Which.
        system: String,
        /// Why, and what to do about it.
        reason: String,
    },
}

/// A system under test. The load generator is its only client and calls it from one thread.
///
/// It holds the system to this; a run in which something else happens is void, with the reason in its records:
///
/// - Times are of the clock that was launched with the system. Those of a request's events do not decrease, none is before the
///   request was sent, and none is later than the moment at which [`Self::next_event`] gives the event (by more than 1 ms).
/// - Each request ends once, by an event of another kind than [`EventKind::Tokens`], and has none after it. A rejected one has
///   no tokens. Of several outputs ([`GenerationRequest`]'s decoding) all tokens are the request's, and it ends with the last.
/// - One that finishes by [`FinishReason::Stop`] or [`FinishReason::Length`] has as many tokens as were asked for: the true
///   length where there is one, and at most `max_tokens`, for each output. One that ends elsewhere finishes by [`FinishReason::Early`]
///   or [`FinishReason::KvExhausted`].
/// - A cancelled request ends within the run's grace (30 s by default), by [`EventKind::Cancelled`] or as it would have.
pub trait ServingSystem {
    /// A short name for records and legends.
    fn name(&self) -> &str;

    /// Hands over a request. Returns at once; refusal comes as an [`EventKind::Rejected`] event.
    ///
    /// # Errors
    /// When the system is gone.
    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError>;

    /// Asks to end a request early. An unknown or ended id is ignored.
    ///
    /// # Errors
    /// When the system is gone.
    fn cancel(&mut self, request: u64) -> Result<(), SystemError>;

    /// The next event, waiting for it until the clock shows `until`; `None` when that time came first.
    ///
    /// # Errors
    /// When the system is gone.
    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError>;

    /// The steps since the last call; empty when the system does not say.
    fn take_steps(&mut self) -> Vec<StepRecord> {
        Vec::new()
    }
}
