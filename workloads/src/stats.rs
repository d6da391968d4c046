//! Statistics of known traces, small enough to carry: what the default runs draw from, so that they need no download.

use serde::{Deserialize, Serialize};

use crate::arrivals::ArrivalProcess;
use crate::error::WorkloadError;
use crate::lengths::{JointTable, LengthDistribution};
use crate::random::Stream;

/// Statistics that the project carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StatsName {
    /// Azure LLM inference trace 2023, conversation.
    #[serde(rename = "azure_conv_2023")]
    AzureConv2023,
    /// Azure LLM inference trace 2023, code completion.
    #[serde(rename = "azure_code_2023")]
    AzureCode2023,
    /// Lengths like ShareGPT's: a fit to two stated means, not to data.
    ShareGptLike,
}

/// Statistics of a trace, as `examples/fit_trace.rs` computes them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceStats {
    /// What it describes, and what it was computed from.
    pub source: String,
    /// Requests it was computed from; 0 when it was not computed from data.
    pub requests: u64,
    /// Arrivals; `None` when the source has none.
    pub arrivals: Option<ArrivalStats>,
    /// Of the prompts.
    pub input: LengthSummary,
    /// Of the answers.
    pub output: LengthSummary,
    /// Spearman's rank correlation between prompt and answer lengths.
    pub rank_correlation: f64,
    /// What is drawn from.
    pub lengths: LengthModel,
}

/// How a trace's requests arrive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArrivalStats {
    /// Requests a second.
    pub rate: f64,
    /// Coefficient of variation of the gaps.
    pub cv: f64,
    /// The same over the gaps shorter than `idle_s`.
    pub busy_rate: f64,
    /// The same over the gaps shorter than `idle_s`.
    pub busy_cv: f64,
    /// From how many seconds on a gap counts as idle.
    pub idle_s: f64,
}

/// Moments of the lengths that a table was fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LengthSummary {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
}

/// How lengths are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LengthModel {
    /// Prompts, and answers given the prompts.
    Joint {
        /// The tables.
        table: JointTable,
    },
    /// Each for itself.
    Independent {
        /// Prompts.
        input: LengthDistribution,
        /// Answers.
        output: LengthDistribution,
    },
}

impl StatsName {
    /// The statistics of that name.
    pub fn stats(self) -> TraceStats {
        match self {
            Self::AzureConv2023 => azure_conv_2023(),
            Self::AzureCode2023 => azure_code_2023(),
            Self::ShareGptLike => sharegpt_like(),
        }
    }
}

/// Azure LLM inference trace 2023, conversation (Patel et al., "Splitwise", ISCA 2024; CC-BY 4.0).
pub fn azure_conv_2023() -> TraceStats {
    carried(include_str!("../data/azure_conv_2023.json"))
}

/// Azure LLM inference trace 2023, code completion (Patel et al., "Splitwise", ISCA 2024; CC-BY 4.0). Its arrivals have
/// idle gaps of minutes; [`TraceStats::busy_arrivals_at`] leaves them out.
pub fn azure_code_2023() -> TraceStats {
    carried(include_str!("../data/azure_code_2023.json"))
}

fn carried(json: &str) -> TraceStats {
    serde_json::from_str(json).expect("the carried statistics are checked by this crate's tests")
}

/// Lengths with the means that Kwon et al. (SOSP 2023, §6.1) state for ShareGPT, 161 prompt and 338 answer tokens.
/// The log-normal shape and its widths are assumptions, and so is independence: this is a fit to two stated means, not
/// to data.
pub fn sharegpt_like() -> TraceStats {
    let lognormal = |mean: f64, sigma: f64| {
        let p50 = mean * libm::exp(-sigma * sigma / 2.0);
        let summary = LengthSummary { mean, p50, p95: p50 * libm::exp(1.644_853_626_951_472_2 * sigma) };
        (summary, LengthDistribution::LognormalMean { mean, sigma })
    };
    let (input, inputs) = lognormal(161.0, 1.1);
    let (output, outputs) = lognormal(338.0, 0.8);
    TraceStats {
        source: "log-normal fit to the means that SOSP'23 §6.1 states for ShareGPT; not data".into(),
        requests: 0,
        arrivals: None,
        input,
        output,
        rank_correlation: 0.0,
        lengths: LengthModel::Independent { input: inputs, output: outputs },
    }
}

impl TraceStats {
    /// Gamma arrivals of the trace's burstiness at a rate; Poisson when the source has no arrivals.
    pub fn arrivals_at(&self, rate: f64) -> ArrivalProcess {
        self.arrivals
            .map_or(ArrivalProcess::Poisson { rate }, |own| ArrivalProcess::Gamma { rate, cv: own.cv })
    }

    /// The same with idle gaps left out of the burstiness.
    pub fn busy_arrivals_at(&self, rate: f64) -> ArrivalProcess {
        self.arrivals
            .map_or(ArrivalProcess::Poisson { rate }, |own| ArrivalProcess::Gamma { rate, cv: own.busy_cv })
    }
}

impl LengthModel {
    pub(crate) fn validate(&self) -> Result<(), WorkloadError> {
        match self {
            Self::Joint { table } => table.validate(),
            Self::Independent { input, output } => input.validate().and_then(|()| output.validate()),
        }
    }

    pub(crate) fn draw(&self, stream: &mut Stream) -> (u32, u32) {
        match self {
            Self::Joint { table } => table.draw(stream),
            Self::Independent { input, output } => (input.draw(stream), output.draw(stream)),
        }
    }
}
