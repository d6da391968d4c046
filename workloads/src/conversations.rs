//! Conversations: how many turns they have, how long their users think, and what later turns add.

use serde::{Deserialize, Serialize};

use crate::arrivals::ThinkTime;
use crate::error::{WorkloadError, positive};
use crate::lengths::LengthDistribution;
use crate::random::Stream;

/// The most turns of a conversation; more is taken for a mistake.
pub const MAX_TURNS: u32 = 1000;

/// Requests that come as turns of conversations. A turn's prompt is the whole conversation so far, the answers that the
/// system really gave among it, and new tokens; it is sent when the answer before it has ended and the user has thought.
///
/// Conversations begin by the arrival process, whatever the system does; their later turns wait for it (a partly open
/// system: Schroeder et al., "Open Versus Closed", NSDI 2006). The arrival process's rate is of *requests*: conversations
/// begin at that rate over the mean number of their turns, so that in the long run as many requests come as in an open
/// loop of that rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConversationSpec {
    /// How many turns they have.
    pub turns: TurnCount,
    /// What a user does between an answer's end and the next turn; nothing when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub think: Option<ThinkTime>,
    /// Lengths of later turns; as those of first ones when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub later: Option<LaterTurns>,
}

/// Lengths of the turns after the first, scaled as all are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaterTurns {
    /// Prompt tokens that the conversation so far does not have.
    pub input: LengthDistribution,
    /// Answers.
    pub output: LengthDistribution,
}

/// How many turns conversations have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TurnCount {
    /// Always as many.
    Fixed {
        /// How many.
        turns: u32,
    },
    /// After each turn a conversation goes on with the same probability.
    Geometric {
        /// Mean number of turns, 1 or more.
        mean: f64,
    },
    /// By weights of one turn, two turns, and so on.
    Weights {
        /// The weights; they need not add up to 1.
        weights: Vec<f64>,
    },
}

impl ConversationSpec {
    pub(crate) fn validate(&self) -> Result<(), WorkloadError> {
        self.turns.validate()?;
        if let Some(think) = self.think {
            think.validate("conversations.think")?;
        }
        if let Some(later) = &self.later {
            later.input.validate()?;
            later.output.validate()?;
        }
        Ok(())
    }
}

impl TurnCount {
    fn validate(&self) -> Result<(), WorkloadError> {
        let wrong = |problem: String| Err(WorkloadError::spec("conversations.turns", problem));
        match self {
            Self::Fixed { turns } if !(1..=MAX_TURNS).contains(turns) => {
                wrong(format!("must be between 1 and {MAX_TURNS}, is {turns}"))
            }
            Self::Geometric { mean } if !(1.0..=f64::from(MAX_TURNS)).contains(mean) => {
                wrong(format!("mean must be between 1 and {MAX_TURNS}, is {mean}"))
            }
            Self::Weights { weights } => {
                if weights.len() > MAX_TURNS as usize {
                    return wrong(format!("{} weights, above {MAX_TURNS}", weights.len()));
                }
                if let Some(weight) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
                    return wrong(format!("a weight must be a finite number of 0 or more, is {weight}"));
                }
                positive("conversations.turns: the sum of the weights", weights.iter().sum())
            }
            Self::Fixed { .. } | Self::Geometric { .. } => Ok(()),
        }
    }

    pub(crate) fn draw(&self, stream: &mut Stream) -> u32 {
        match self {
            Self::Fixed { turns } => *turns,
            Self::Geometric { mean } if *mean <= 1.0 => 1,
            Self::Geometric { mean } => {
                // The inverse of the distribution function, 1 - (1 - 1/mean)^n.
                let turns = libm::log(stream.unit()) / libm::log(1.0 - 1.0 / mean);
                turns.ceil().clamp(1.0, f64::from(MAX_TURNS)) as u32
            }
            Self::Weights { weights } => {
                let mut left = stream.unit() * weights.iter().sum::<f64>();
                let drawn = weights.iter().position(|weight| {
                    left -= weight;
                    left < 0.0
                });
                // Rounding may leave a rest: it belongs to the last weight that is one.
                let last = || weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0);
                drawn.unwrap_or_else(last) as u32 + 1
            }
        }
    }
}
