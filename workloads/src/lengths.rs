//! How long prompts and answers are.

use serde::{Deserialize, Serialize};

use crate::error::{WorkloadError, positive};
use crate::random::Stream;
use crate::trace::MAX_TOKENS;

/// A distribution of lengths in tokens. A draw is rounded to the nearest whole number and is at least 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LengthDistribution {
    /// Always the same.
    Fixed {
        /// The length.
        tokens: u32,
    },
    /// Each whole number of a range alike.
    Uniform {
        /// The smallest.
        min: u32,
        /// The largest.
        max: u32,
    },
    /// Log-normal by its median.
    Lognormal {
        /// Half of the draws are below it.
        median: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
    },
    /// Log-normal by its mean.
    LognormalMean {
        /// The mean.
        mean: f64,
        /// Standard deviation of the logarithm.
        sigma: f64,
    },
    /// Log-normal by two percentiles.
    LognormalPercentiles {
        /// The median.
        p50: f64,
        /// 95 % of the draws are below it.
        p95: f64,
    },
    /// A table of quantiles.
    Empirical {
        /// The table.
        quantiles: QuantileTable,
    },
}

/// The standard normal's 95th percentile.
pub(crate) const Z95: f64 = 1.644_853_626_951_472_2;

impl LengthDistribution {
    /// Checks the settings.
    ///
    /// # Errors
    /// When a length is zero or beyond [`MAX_TOKENS`], or a parameter is not a finite number above zero.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        let tokens = |field, tokens: u32| match tokens {
            1..=MAX_TOKENS => Ok(()),
            _ => Err(WorkloadError::spec(field, format!("must be between 1 and {MAX_TOKENS}, is {tokens}"))),
        };
        match *self {
            Self::Fixed { tokens: length } => tokens("lengths.tokens", length),
            Self::Uniform { min, max } => {
                tokens("lengths.min", min)?;
                tokens("lengths.max", max)?;
                if min > max {
                    return Err(WorkloadError::spec(
                        "lengths.min",
                        format!("{min} is above the maximum {max}"),
                    ));
                }
                Ok(())
            }
            Self::Lognormal { median: center, sigma } | Self::LognormalMean { mean: center, sigma } => {
                positive("lengths.median or mean", center)?;
                positive("lengths.sigma", sigma)
            }
            Self::LognormalPercentiles { p50, p95 } => {
                positive("lengths.p50", p50)?;
                positive("lengths.p95", p95)?;
                if p95 <= p50 {
                    return Err(WorkloadError::spec(
                        "lengths.p95",
                        format!("{p95} is not above the median {p50}"),
                    ));
                }
                Ok(())
            }
            // Checked when it was made.
            Self::Empirical { .. } => Ok(()),
        }
    }

    pub(crate) fn draw(&self, stream: &mut Stream) -> u32 {
        match self {
            Self::Fixed { tokens } => *tokens,
            Self::Uniform { min, max } => min + stream.below(max - min + 1),
            Self::Lognormal { median, sigma } => whole(median * libm::exp(sigma * stream.normal())),
            Self::LognormalMean { mean, sigma } => {
                whole(mean * libm::exp(sigma * stream.normal() - sigma * sigma / 2.0))
            }
            Self::LognormalPercentiles { p50, p95 } => {
                let sigma = libm::log(p95 / p50) / Z95;
                whole(p50 * libm::exp(sigma * stream.normal()))
            }
            Self::Empirical { quantiles } => whole(quantiles.at(stream.unit())),
        }
    }
}

/// The nearest length to a number. Draws beyond [`MAX_TOKENS`] are that: no model takes either.
fn whole(value: f64) -> u32 {
    value.round().clamp(1.0, f64::from(MAX_TOKENS)) as u32
}

/// A distribution as points `[probability, value]` of its quantile function, straight between them. Probabilities go
/// from 0 to 1; neither probabilities nor values fall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<[f64; 2]>", into = "Vec<[f64; 2]>")]
pub struct QuantileTable(Vec<[f64; 2]>);

impl TryFrom<Vec<[f64; 2]>> for QuantileTable {
    type Error = WorkloadError;

    fn try_from(points: Vec<[f64; 2]>) -> Result<Self, WorkloadError> {
        let wrong = |problem: String| Err(WorkloadError::spec("quantiles", problem));
        if points.len() < 2 || points[0][0] != 0.0 || points[points.len() - 1][0] != 1.0 {
            return wrong("need at least two points [probability, value], from probability 0 to 1".into());
        }
        for point in &points {
            if !(0.0..=f64::from(MAX_TOKENS)).contains(&point[1]) {
                return wrong(format!("{point:?}: the value is not between 0 and {MAX_TOKENS}"));
            }
        }
        // Written so that a probability that is not a number fails too.
        if let Some(pair) = points.windows(2).find(|p| !(p[0][0] <= p[1][0] && p[0][1] <= p[1][1])) {
            return wrong(format!("{:?} comes after {:?}", pair[1], pair[0]));
        }
        Ok(Self(points))
    }
}

impl From<QuantileTable> for Vec<[f64; 2]> {
    fn from(table: QuantileTable) -> Self {
        table.0
    }
}

impl QuantileTable {
    pub(crate) fn points(&self) -> &[[f64; 2]] {
        &self.0
    }

    /// The value below which a share `probability` (0 to 1) of the distribution lies.
    pub fn at(&self, probability: f64) -> f64 {
        let after = self.0.partition_point(|point| point[0] < probability).clamp(1, self.0.len() - 1);
        let ([p0, v0], [p1, v1]) = (self.0[after - 1], self.0[after]);
        if p1 > p0 { v0 + (v1 - v0) * (probability - p0) / (p1 - p0) } else { v1 }
    }
}

/// Prompt and answer lengths together: a quantile table of prompts, and for each of several equally likely ranges of
/// prompts (short to long) a quantile table of the answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JointTable {
    /// Prompts.
    pub input: QuantileTable,
    /// Answers to the shortest prompts, to the next longer ones, and so on. Not empty.
    pub output_given_input: Vec<QuantileTable>,
}

impl JointTable {
    pub(crate) fn validate(&self) -> Result<(), WorkloadError> {
        if self.output_given_input.is_empty() {
            return Err(WorkloadError::spec("output_given_input", "must hold at least one table"));
        }
        Ok(())
    }

    pub(crate) fn draw(&self, stream: &mut Stream) -> (u32, u32) {
        let rank = stream.unit();
        let tables = &self.output_given_input;
        let table = &tables[((rank * tables.len() as f64) as usize).min(tables.len() - 1)];
        (whole(self.input.at(rank)), whole(table.at(stream.unit())))
    }
}

/// A factor on all lengths, so that a small machine can run a large machine's workload: rounded to the nearest whole
/// number, at least 1.
pub(crate) fn scaled(length: u32, factor: f64) -> u32 {
    whole(f64::from(length) * factor)
}
