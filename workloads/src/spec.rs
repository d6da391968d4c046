//! What a workload is to be.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::arrivals::ArrivalProcess;
use crate::conversations::ConversationSpec;
use crate::error::{WorkloadError, positive};
use crate::lengths::LengthDistribution;
use crate::stats::StatsName;
use crate::system::Decoding;
use crate::trace::{LogFilter, MAX_TOKENS, ReadOptions, TokenCounter, Trace, TraceFormat, Turns};

/// What a workload is to be; with a seed and a model's limits it gives a [`Workload`](crate::Workload).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadSpec {
    /// How many requests.
    pub requests: usize,
    /// How long they are.
    pub lengths: LengthSource,
    /// When they come.
    pub arrivals: ArrivalProcess,
    /// Factor on all lengths, for machines smaller than the workload's; rounded, at least 1 token.
    #[serde(default = "one")]
    pub length_scale: f64,
    /// What becomes of requests that the model's limit does not admit.
    #[serde(default)]
    pub over_limit: OverLimit,
    /// Tokens with which every prompt begins, before those of its own; scaled as lengths are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shared_prefix: u32,
    /// Conversations of several turns, for lengths that are drawn; requests of their own when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversations: Option<ConversationSpec>,
    /// Weights of priority classes, the best class first; all turns of a conversation have the class of its user. No
    /// classes when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<u32>,
    /// What is wanted of each prompt: one output when not given.
    #[serde(default, skip_serializing_if = "Decoding::is_single")]
    pub decoding: Decoding,
}

/// The most priority classes.
pub const MAX_CLASSES: usize = 16;

/// Where lengths come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LengthSource {
    /// Statistics that the project carries.
    Stats {
        /// Which.
        name: StatsName,
    },
    /// Prompts and answers drawn each for itself.
    Independent {
        /// Prompts.
        input: LengthDistribution,
        /// Answers.
        output: LengthDistribution,
    },
    /// Pairs `[prompt, answer]` drawn with replacement.
    Pairs {
        /// The pairs.
        pairs: Vec<[u32; 2]>,
    },
    /// A trace's requests, in its order.
    Trace(TraceSource),
}

/// Which part of which trace, and how to read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSource {
    /// The file.
    pub path: PathBuf,
    /// Its format; told from its beginning when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<TraceFormat>,
    /// Which of its requests.
    #[serde(default)]
    pub window: Window,
    /// One conversation in this many, with all of its requests; the seed chooses. A cache then sees what one of so many times its
    /// size sees of the whole trace (Waldspurger et al., FAST'15). Requests belong together whose prompts begin with the same
    /// blocks, but for those that most prompts begin with; where a trace tells neither blocks nor turns, each stands alone.
    #[serde(default = "all", skip_serializing_if = "is_all")]
    pub one_in: u32,
    /// Whether requests with the same time are spread over a tick of the trace's clock. When not given: for Mooncake
    /// (milliseconds, in ticks of 3 s) and BurstGPT (whole seconds), not for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread_ticks: Option<bool>,
    /// Which of BurstGPT's services; refused with other formats, but for the default.
    #[serde(default)]
    pub log: LogFilter,
    /// Which of ShareGPT's exchanges; refused with other formats, but for the default.
    #[serde(default)]
    pub turns: Turns,
    /// ShareGPT's texts are taken for this many characters a token: an estimate. Refused with other formats, but for the
    /// default.
    #[serde(default = "four")]
    pub chars_per_token: f64,
}

/// Which requests of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Window {
    /// Those after the first `requests`: the same under every seed.
    Skip {
        /// How many are skipped.
        requests: usize,
    },
    /// A run of consecutive requests at a place that the seed chooses, so that repeats see different parts.
    Random {},
}

impl Default for Window {
    fn default() -> Self {
        Self::Skip { requests: 0 }
    }
}

/// What becomes of a request whose prompt leaves no room for an answer under the model's limit, or whose prompt and
/// true answer together are longer than it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OverLimit {
    /// It is sent: a system rejects a prompt that is too long, and cuts an answer at the limit.
    #[default]
    Keep,
    /// It is left out and counted; the next one takes its place (and, in a trace's own times, its time is lost).
    Drop,
}

/// What the model admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelLimits {
    /// Token ids are below it.
    pub vocab_size: u32,
    /// The lowest ids, which often mean something special, are not used in prompts.
    pub reserved_ids: u32,
    /// Prompt and answer together are at most this long.
    pub max_model_len: u32,
}

fn one() -> f64 {
    1.0
}

fn is_zero(tokens: &u32) -> bool {
    *tokens == 0
}

fn all() -> u32 {
    1
}

fn is_all(one_in: &u32) -> bool {
    *one_in == 1
}

fn four() -> f64 {
    4.0
}

impl TraceSource {
    /// A trace read with the default settings.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: None,
            window: Window::default(),
            one_in: all(),
            spread_ticks: None,
            log: LogFilter::default(),
            turns: Turns::default(),
            chars_per_token: four(),
        }
    }

    /// Reads the trace; a relative path is taken from `base`.
    ///
    /// # Errors
    /// As [`Trace::load`], and when times are to be spread that the trace does not have.
    pub fn load(&self, base: &Path) -> Result<Trace, WorkloadError> {
        let options = ReadOptions {
            format: self.format,
            max_requests: None,
            log: self.log,
            turns: self.turns,
            tokens: TokenCounter::CharsPerToken(self.chars_per_token),
        };
        let trace = Trace::load(&base.join(&self.path), &options)?;
        if self.spread_ticks == Some(true) && !trace.meta.timed {
            let problem =
                "`spread_ticks` is for traces with times, and this one has none: leave it out".into();
            return Err(WorkloadError::Trace { file: trace.meta.file, problem });
        }
        Ok(trace)
    }

    /// Whether requests of `trace` with the same time are spread over a tick.
    pub fn spreads(&self, trace: &Trace) -> bool {
        self.spread_ticks.unwrap_or(trace.meta.format.ticks()) && trace.meta.timed
    }
}

impl WorkloadSpec {
    /// Checks all settings that can be checked without a trace.
    ///
    /// # Errors
    /// When a setting means nothing.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        if self.requests == 0 {
            return Err(WorkloadError::spec("requests", "must be at least 1"));
        }
        positive("length_scale", self.length_scale)?;
        if self.shared_prefix > MAX_TOKENS {
            let problem = format!("is {}, above {MAX_TOKENS}", self.shared_prefix);
            return Err(WorkloadError::spec("shared_prefix", problem));
        }
        self.arrivals.validate()?;
        match &self.lengths {
            LengthSource::Stats { name } => name.stats().lengths.validate()?,
            LengthSource::Independent { input, output } => {
                input.validate()?;
                output.validate()?;
            }
            LengthSource::Pairs { pairs } => {
                if pairs.is_empty()
                    || pairs.iter().flatten().any(|&tokens| !(1..=MAX_TOKENS).contains(&tokens))
                {
                    let problem = format!("must hold pairs of lengths between 1 and {MAX_TOKENS}");
                    return Err(WorkloadError::spec("lengths.pairs", problem));
                }
            }
            LengthSource::Trace(source) => {
                positive("lengths.chars_per_token", source.chars_per_token)?;
                if source.one_in == 0 {
                    return Err(WorkloadError::spec("lengths.one_in", "must be at least 1"));
                }
            }
        }
        if matches!(self.arrivals, ArrivalProcess::Trace { .. } | ArrivalProcess::TraceAt { .. })
            && !matches!(self.lengths, LengthSource::Trace(_))
        {
            let problem = "\"trace\" needs lengths from a trace; carried statistics have gamma arrivals";
            return Err(WorkloadError::spec("arrivals.kind", problem));
        }
        if let Some(conversations) = &self.conversations {
            conversations.validate()?;
            self.check_conversations()?;
        }
        self.decoding.validate().map_err(|problem| WorkloadError::spec("decoding", problem))?;
        self.check_classes()
    }

    /// Conversations go with what is drawn for them.
    fn check_conversations(&self) -> Result<(), WorkloadError> {
        let problem = match (&self.lengths, self.arrivals) {
            _ if !self.decoding.is_single() => {
                "a conversation goes on after one answer: leave `decoding` out"
            }
            (LengthSource::Trace(_), _) => {
                "a trace's requests are replayed as they came: choose other lengths"
            }
            (_, ArrivalProcess::ClosedLoop { .. }) => {
                "a closed loop's users wait for answers already: choose arrivals at which conversations begin"
            }
            _ => return Ok(()),
        };
        Err(WorkloadError::spec("conversations", problem))
    }

    fn check_classes(&self) -> Result<(), WorkloadError> {
        let wrong = |problem: String| Err(WorkloadError::spec("classes", problem));
        if self.classes.len() > MAX_CLASSES {
            return wrong(format!("{} classes, above {MAX_CLASSES}", self.classes.len()));
        }
        match self.classes.iter().find(|weight| !(1..=1_000_000).contains(*weight)) {
            Some(weight) => wrong(format!("a weight must be between 1 and 1000000, is {weight}")),
            None => Ok(()),
        }
    }

    /// The same workload at another rate: the arrival process's, or a trace's times sped up to it.
    ///
    /// # Errors
    /// When the arrivals have no rate.
    pub fn at_rate(&self, rate: f64) -> Result<Self, WorkloadError> {
        let arrivals = self.arrivals.at_rate(rate)?;
        Ok(Self { arrivals, ..self.clone() })
    }

    /// The trace this draws from, if any: load it once and give it to
    /// [`Workload::generate_from`](crate::Workload::generate_from).
    ///
    /// # Errors
    /// As [`Trace::load`].
    pub fn load_trace(&self, base: &Path) -> Result<Option<Trace>, WorkloadError> {
        match &self.lengths {
            LengthSource::Trace(source) => source.load(base).map(Some),
            _ => Ok(None),
        }
    }
}

impl ModelLimits {
    pub(crate) fn validate(&self) -> Result<(), WorkloadError> {
        if self.vocab_size <= self.reserved_ids {
            let problem =
                format!("{} leaves no ids beside {} reserved ones", self.vocab_size, self.reserved_ids);
            return Err(WorkloadError::spec("vocab_size", problem));
        }
        if self.max_model_len < 2 {
            return Err(WorkloadError::spec("max_model_len", "must hold a prompt token and an answer token"));
        }
        Ok(())
    }
}
