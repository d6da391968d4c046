//! When requests come.

use serde::{Deserialize, Serialize};

use crate::error::{WorkloadError, positive};
use crate::random::{Stream, Use};

/// When requests come. Gaps are drawn as they are: never clipped, stretched or rescaled to fit.
///
/// Under one seed, the arrivals at two rates are the same arrivals on a scaled axis, so that rates are compared on
/// equal ground.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ArrivalProcess {
    /// Independent users: exponential gaps.
    Poisson {
        /// Requests a second.
        rate: f64,
    },
    /// Gaps from a gamma distribution: burstier than Poisson above a CV of 1, more regular below.
    Gamma {
        /// Requests a second.
        rate: f64,
        /// Coefficient of variation of the gaps (standard deviation over mean).
        cv: f64,
    },
    /// One request each `1 / rate` seconds, from time zero.
    Uniform {
        /// Requests a second.
        rate: f64,
    },
    /// Every request at time zero.
    AllAtOnce {},
    /// Users who wait for an answer, think, and ask again. A request's intended arrival is then known only when its
    /// user's previous one has ended.
    ClosedLoop {
        /// Users.
        users: u32,
        /// What they do between an answer and the next question; nothing when not given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        think: Option<ThinkTime>,
    },
    /// The trace's own times, its clock sped up by a factor.
    Trace {
        /// 2 plays the trace at twice its rate: every time is divided by it.
        #[serde(default = "one")]
        rate_scale: f64,
    },
    /// The trace's own times, its clock sped up so far that the requests taken from it come at a given rate. A part of
    /// a trace is slower or faster than the whole.
    TraceAt {
        /// Requests a second: gaps over the time between the first and the last request taken.
        rate: f64,
    },
}

/// A user's pause between an answer and the next question.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ThinkTime {
    /// Always the same.
    Fixed {
        /// Seconds.
        seconds: f64,
    },
    /// Exponential.
    Exponential {
        /// Mean, seconds.
        mean_s: f64,
    },
}

fn one() -> f64 {
    1.0
}

/// The most bursty process that is taken; the burstiest trace known here has 13.
const MAX_CV: f64 = 100.0;

/// The most regular one: gaps are all but equal, and ever smaller values would leave none to draw.
const MIN_CV: f64 = 0.001;

impl ArrivalProcess {
    /// Checks the settings.
    ///
    /// # Errors
    /// When a rate, factor or time is not a finite number above zero, or there are no users.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        match *self {
            Self::Poisson { rate } | Self::Uniform { rate } | Self::TraceAt { rate } => {
                positive("arrivals.rate", rate)
            }
            Self::Gamma { rate, cv } => {
                positive("arrivals.rate", rate)?;
                positive("arrivals.cv", cv)?;
                if !(MIN_CV..=MAX_CV).contains(&cv) {
                    let problem = format!("is {cv}: choose {MIN_CV} to {MAX_CV}");
                    return Err(WorkloadError::spec("arrivals.cv", problem));
                }
                Ok(())
            }
            Self::AllAtOnce {} => Ok(()),
            Self::ClosedLoop { users: 0, .. } => {
                Err(WorkloadError::spec("arrivals.users", "must be at least 1"))
            }
            Self::ClosedLoop { think, .. } => think.map_or(Ok(()), |think| think.validate("arrivals.think")),
            Self::Trace { rate_scale } => positive("arrivals.rate_scale", rate_scale),
        }
    }

    /// The same process at another rate.
    ///
    /// # Errors
    /// When the process has no rate (all at once, closed loop).
    pub fn at_rate(&self, rate: f64) -> Result<Self, WorkloadError> {
        positive("rate", rate)?;
        match *self {
            Self::Poisson { .. } => Ok(Self::Poisson { rate }),
            Self::Gamma { cv, .. } => Ok(Self::Gamma { rate, cv }),
            Self::Uniform { .. } => Ok(Self::Uniform { rate }),
            Self::Trace { .. } | Self::TraceAt { .. } => Ok(Self::TraceAt { rate }),
            Self::AllAtOnce {} | Self::ClosedLoop { .. } => Err(WorkloadError::spec(
                "rate",
                "requests that come all at once or from a closed loop have no rate",
            )),
        }
    }

    /// Requests a second, of processes that are drawn with one.
    pub(crate) fn rate(&self) -> Option<f64> {
        match *self {
            Self::Poisson { rate } | Self::Gamma { rate, .. } | Self::Uniform { rate } => Some(rate),
            Self::AllAtOnce {} | Self::ClosedLoop { .. } | Self::Trace { .. } | Self::TraceAt { .. } => None,
        }
    }

    /// Arrival times in seconds, or think times for a closed loop. `None` where the trace has them.
    pub(crate) fn draw(&self, requests: usize, seed: u64) -> Option<Vec<f64>> {
        let mut stream = Stream::new(seed, Use::Arrivals, 0);
        // Sums of unit-mean gaps, scaled at the end: rates then share their arrivals exactly.
        let mut sums = |mut gap: Box<dyn FnMut(&mut Stream) -> f64>, rate: f64| {
            let mut at = 0.0;
            let mut next = || {
                at += gap(&mut stream);
                at / rate
            };
            (0..requests).map(|_| next()).collect()
        };
        Some(match *self {
            Self::Poisson { rate } => sums(Box::new(Stream::exponential), rate),
            Self::Gamma { rate, cv } => sums(Box::new(move |stream| stream.gamma(1.0 / (cv * cv))), rate),
            Self::Uniform { rate } => (0..requests).map(|i| i as f64 / rate).collect(),
            Self::AllAtOnce {} => vec![0.0; requests],
            Self::ClosedLoop { think, .. } => {
                (0..requests).map(|_| think.map_or(0.0, |think| think.draw(&mut stream))).collect()
            }
            Self::Trace { .. } | Self::TraceAt { .. } => return None,
        })
    }
}

impl ThinkTime {
    pub(crate) fn validate(self, field: &'static str) -> Result<(), WorkloadError> {
        match self {
            Self::Fixed { seconds: time } | Self::Exponential { mean_s: time } => positive(field, time),
        }
    }

    pub(crate) fn draw(self, stream: &mut Stream) -> f64 {
        match self {
            Self::Fixed { seconds } => seconds,
            Self::Exponential { mean_s } => mean_s * stream.exponential(),
        }
    }
}
