//! The metrics that tables, figures, claims and comparisons speak of, by name.

use serde::{Deserialize, Serialize};

use super::{CellMetrics, ClassMetrics, StepMetrics};
use crate::stats::Distribution;

/// A figure of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean normalized latency.
    NormalizedLatency,
    /// Median normalized latency.
    NormalizedLatencyP50,
    /// 90th percentile of normalized latency.
    NormalizedLatencyP90,
    /// 99th percentile of normalized latency.
    NormalizedLatencyP99,
    /// Mean time to first token.
    Ttft,
    /// 90th percentile of time to first token.
    TtftP90,
    /// Mean time per output token.
    Tpot,
    /// 90th percentile of time per output token.
    TpotP90,
    /// Mean time between tokens.
    Itl,
    /// Median time between tokens.
    ItlP50,
    /// 90th percentile of the time between tokens.
    ItlP90,
    /// 99th percentile of the time between tokens.
    ItlP99,
    /// The longest time between two tokens.
    ItlMax,
    /// Requests a second within every limit.
    Goodput,
    /// Output tokens a second.
    Throughput,
    /// Sequences running.
    Running,
    /// Requests waiting.
    Waiting,
    /// Share of KV slots that hold a token.
    KvUsed,
    /// Share of KV slots kept for tokens to come.
    KvReserved,
    /// Share of KV slots given to sequences that will never fill them.
    KvInternal,
    /// Share of KV slots that are free while requests wait.
    KvUnusable,
    /// Share of KV slots kept for reuse.
    KvCached,
    /// Of the slots given to sequences, the share that holds a token.
    KvEfficiency,
    /// Of the KV slots that would be in use if every sequence had its own, the share that sharing saves.
    KvSaved,
    /// Of the proposals of tokens that were looked at, the share that was accepted.
    Acceptance,
    /// Of the prompt tokens of finished requests, the share that was found in a cache.
    CachedShare,
    /// Mean normalized latency of the best priority class.
    NormalizedLatencyBestClass,
    /// Mean normalized latency of the worst priority class.
    NormalizedLatencyWorstClass,
    /// Mean time to first token of the best priority class.
    TtftBestClass,
    /// Mean time to first token of the worst priority class.
    TtftWorstClass,
    /// Requests of the best priority class a second within every limit.
    GoodputBestClass,
    /// Requests of the worst priority class a second within every limit.
    GoodputWorstClass,
    /// Preemptions for each request that arrived.
    Preemptions,
    /// Tokens swapped out for each request that arrived.
    SwappedTokens,
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Less.
    Lower,
    /// More.
    Higher,
}

/// What of a distribution.
#[derive(Clone, Copy)]
enum Statistic {
    Mean,
    P50,
    P90,
    P99,
    Max,
}

impl Statistic {
    fn of(self, spread: &Distribution) -> Option<f64> {
        match self {
            Self::Mean => spread.mean,
            Self::P50 => spread.p50,
            Self::P90 => spread.p90,
            Self::P99 => spread.p99,
            Self::Max => spread.max,
        }
    }

    /// What it is at most, however large the values are of which only lower bounds are known.
    fn most(self, spread: &Distribution) -> Option<f64> {
        match self {
            _ if spread.lower_bounds == 0 => self.of(spread),
            Self::Mean | Self::Max => None,
            Self::P50 => spread.p50_most,
            Self::P90 => spread.p90_most,
            Self::P99 => spread.p99_most,
        }
    }
}

/// Where a metric's value is found.
enum Found {
    /// In a distribution over requests or gaps.
    Spread(fn(&CellMetrics) -> &Distribution, Statistic),
    /// In a distribution over the requests of a class.
    Class(fn(&[ClassMetrics]) -> Option<&ClassMetrics>, fn(&ClassMetrics) -> &Distribution),
    /// In the cell itself.
    Cell(fn(&CellMetrics) -> Option<f64>),
    /// In the figures from steps.
    Steps(fn(&StepMetrics) -> Option<f64>),
}

impl Metric {
    /// Name for tables, claims and comparisons.
    pub fn name(self) -> &'static str {
        match self {
            Metric::NormalizedLatency => "normalized latency",
            Metric::NormalizedLatencyP50 => "normalized latency P50",
            Metric::NormalizedLatencyP90 => "normalized latency P90",
            Metric::NormalizedLatencyP99 => "normalized latency P99",
            Metric::Ttft => "TTFT",
            Metric::TtftP90 => "TTFT P90",
            Metric::Tpot => "TPOT",
            Metric::TpotP90 => "TPOT P90",
            Metric::Itl => "ITL",
            Metric::ItlP50 => "ITL P50",
            Metric::ItlP90 => "ITL P90",
            Metric::ItlP99 => "ITL P99",
            Metric::ItlMax => "ITL max",
            Metric::Goodput => "goodput",
            Metric::Throughput => "throughput",
            Metric::Running => "running sequences",
            Metric::Waiting => "waiting requests",
            Metric::KvUsed => "KV use",
            Metric::KvReserved => "KV reserved",
            Metric::KvInternal => "KV internal",
            Metric::KvUnusable => "KV free, waiting",
            Metric::KvCached => "KV cached",
            Metric::KvEfficiency => "KV efficiency",
            Metric::KvSaved => "KV saved by sharing",
            Metric::Acceptance => "acceptance",
            Metric::CachedShare => "cached prompt tokens",
            Metric::NormalizedLatencyBestClass => "normalized latency, best class",
            Metric::NormalizedLatencyWorstClass => "normalized latency, worst class",
            Metric::TtftBestClass => "TTFT, best class",
            Metric::TtftWorstClass => "TTFT, worst class",
            Metric::GoodputBestClass => "goodput, best class",
            Metric::GoodputWorstClass => "goodput, worst class",
            Metric::Preemptions => "preemptions",
            Metric::SwappedTokens => "swapped tokens",
        }
    }

    /// Unit for axes.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::NormalizedLatency
            | Metric::NormalizedLatencyP50
            | Metric::NormalizedLatencyP90
            | Metric::NormalizedLatencyP99
            | Metric::NormalizedLatencyBestClass
            | Metric::NormalizedLatencyWorstClass
            | Metric::Tpot
            | Metric::TpotP90 => "s/token",
            Metric::Ttft
            | Metric::TtftP90
            | Metric::TtftBestClass
            | Metric::TtftWorstClass
            | Metric::Itl
            | Metric::ItlP50
            | Metric::ItlP90
            | Metric::ItlP99
            | Metric::ItlMax => "s",
            Metric::Goodput | Metric::GoodputBestClass | Metric::GoodputWorstClass => "requests/s",
            Metric::Throughput => "tokens/s",
            Metric::Running | Metric::Waiting => "requests",
            Metric::KvUsed
            | Metric::KvReserved
            | Metric::KvInternal
            | Metric::KvUnusable
            | Metric::KvCached
            | Metric::KvSaved
            | Metric::KvEfficiency => "share of slots",
            Metric::Acceptance => "share of proposals",
            Metric::CachedShare => "share of prompt tokens",
            Metric::Preemptions => "a request",
            Metric::SwappedTokens => "tokens a request",
        }
    }

    /// Which way is better.
    pub fn better(self) -> Better {
        match self {
            Metric::Goodput
            | Metric::GoodputBestClass
            | Metric::GoodputWorstClass
            | Metric::Throughput
            | Metric::Running
            | Metric::KvUsed
            | Metric::KvSaved
            | Metric::KvEfficiency
            | Metric::Acceptance
            | Metric::CachedShare => Better::Higher,
            _ => Better::Lower,
        }
    }

    /// Its value in a cell, if it has one there.
    pub fn of(self, cell: &CellMetrics) -> Option<f64> {
        match self.found() {
            Found::Spread(spread, statistic) => statistic.of(spread(cell)),
            Found::Class(class, spread) => spread(class(&cell.classes)?).mean,
            Found::Cell(value) => value(cell),
            Found::Steps(value) => cell.steps.as_ref().and_then(value),
        }
    }

    /// Whether its value in `cell` is no more than a lower bound, because of censored requests.
    pub fn is_bound(self, cell: &CellMetrics) -> bool {
        self.of(cell).is_some_and(|value| self.most(cell) != Some(value))
    }

    /// What its value in `cell` is at most, however large what is not known of censored requests may be; none where that is
    /// open, as it is for means. A percentile of many values moves little with a few of them, wherever these lie.
    pub fn most(self, cell: &CellMetrics) -> Option<f64> {
        match self.found() {
            Found::Spread(spread, statistic) => statistic.most(spread(cell)),
            Found::Class(class, spread) => Statistic::Mean.most(spread(class(&cell.classes)?)),
            Found::Cell(_) | Found::Steps(_) => self.of(cell),
        }
    }

    fn found(self) -> Found {
        use Found::{Cell, Class, Spread, Steps};
        match self {
            Metric::NormalizedLatency => Spread(|c| &c.normalized_latency, Statistic::Mean),
            Metric::NormalizedLatencyP50 => Spread(|c| &c.normalized_latency, Statistic::P50),
            Metric::NormalizedLatencyP90 => Spread(|c| &c.normalized_latency, Statistic::P90),
            Metric::NormalizedLatencyP99 => Spread(|c| &c.normalized_latency, Statistic::P99),
            Metric::Ttft => Spread(|c| &c.ttft, Statistic::Mean),
            Metric::TtftP90 => Spread(|c| &c.ttft, Statistic::P90),
            Metric::Tpot => Spread(|c| &c.tpot, Statistic::Mean),
            Metric::TpotP90 => Spread(|c| &c.tpot, Statistic::P90),
            Metric::Itl => Spread(|c| &c.itl, Statistic::Mean),
            Metric::ItlP50 => Spread(|c| &c.itl, Statistic::P50),
            Metric::ItlP90 => Spread(|c| &c.itl, Statistic::P90),
            Metric::ItlP99 => Spread(|c| &c.itl, Statistic::P99),
            Metric::ItlMax => Spread(|c| &c.itl, Statistic::Max),
            Metric::Goodput => Cell(|c| c.goodput_rps),
            Metric::Throughput => Cell(|c| Some(c.throughput_tps)),
            Metric::Running => Steps(|s| Some(s.running)),
            Metric::Waiting => Steps(|s| Some(s.waiting)),
            Metric::KvUsed => Steps(|s| Some(s.kv_used)),
            Metric::KvReserved => Steps(|s| Some(s.kv_reserved)),
            Metric::KvInternal => Steps(|s| Some(s.kv_internal)),
            Metric::KvUnusable => Steps(|s| s.kv_unusable),
            Metric::KvCached => Steps(|s| Some(s.kv_cached)),
            Metric::KvEfficiency => Steps(|s| s.kv_efficiency),
            Metric::KvSaved => Steps(|s| s.kv_saved),
            Metric::Acceptance => Steps(|s| s.acceptance),
            Metric::CachedShare => Cell(|c| c.cached_share),
            Metric::NormalizedLatencyBestClass => Class(best, |c| &c.normalized_latency),
            Metric::NormalizedLatencyWorstClass => Class(worst, |c| &c.normalized_latency),
            Metric::TtftBestClass => Class(best, |c| &c.ttft),
            Metric::TtftWorstClass => Class(worst, |c| &c.ttft),
            Metric::GoodputBestClass => Cell(|c| best(&c.classes)?.goodput_rps),
            Metric::GoodputWorstClass => Cell(|c| worst(&c.classes)?.goodput_rps),
            Metric::Preemptions => Cell(|c| a_request(c, |s| s.preempted)),
            Metric::SwappedTokens => Cell(|c| a_request(c, |s| s.swapped_out)),
        }
    }
}

/// The best class of several.
fn best(classes: &[ClassMetrics]) -> Option<&ClassMetrics> {
    classes.first().filter(|_| classes.len() > 1)
}

/// The worst class of several.
fn worst(classes: &[ClassMetrics]) -> Option<&ClassMetrics> {
    classes.last().filter(|_| classes.len() > 1)
}

/// A count of the window's steps, divided by the window's requests.
fn a_request(cell: &CellMetrics, count: fn(&StepMetrics) -> u64) -> Option<f64> {
    let steps = cell.steps.as_ref().filter(|_| cell.requests > 0)?;
    Some(count(steps) as f64 / cell.requests as f64)
}
