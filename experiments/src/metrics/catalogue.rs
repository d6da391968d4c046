//! The metrics that tables, figures and comparisons speak of, by name.

use serde::{Deserialize, Serialize};

use super::CellMetrics;

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
    /// Requests a second within every limit.
    Goodput,
    /// Output tokens a second.
    Throughput,
    /// Sequences running.
    Running,
    /// Share of KV slots that hold a token.
    KvUsed,
    /// Of the slots given to sequences, the share that holds a token.
    KvEfficiency,
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Less.
    Lower,
    /// More.
    Higher,
}

impl Metric {
    /// Name for columns and tables.
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
            Metric::Goodput => "goodput",
            Metric::Throughput => "throughput",
            Metric::Running => "running requests",
            Metric::KvUsed => "KV use",
            Metric::KvEfficiency => "KV efficiency",
        }
    }

    /// Unit for axes.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::NormalizedLatency
            | Metric::NormalizedLatencyP50
            | Metric::NormalizedLatencyP90
            | Metric::NormalizedLatencyP99 => "s/token",
            Metric::Ttft | Metric::TtftP90 => "s",
            Metric::Tpot | Metric::TpotP90 => "s/token",
            Metric::Goodput => "requests/s",
            Metric::Throughput => "tokens/s",
            Metric::Running => "requests",
            Metric::KvUsed | Metric::KvEfficiency => "share of slots",
        }
    }

    /// Which way is better.
    pub fn better(self) -> Better {
        match self {
            Metric::Goodput
            | Metric::Throughput
            | Metric::Running
            | Metric::KvUsed
            | Metric::KvEfficiency => Better::Higher,
            _ => Better::Lower,
        }
    }

    /// Its value in a cell, if it has one there.
    pub fn of(self, cell: &CellMetrics) -> Option<f64> {
        match self {
            Metric::NormalizedLatency => cell.normalized_latency.mean,
            Metric::NormalizedLatencyP50 => cell.normalized_latency.p50,
            Metric::NormalizedLatencyP90 => cell.normalized_latency.p90,
            Metric::NormalizedLatencyP99 => cell.normalized_latency.p99,
            Metric::Ttft => cell.ttft.mean,
            Metric::TtftP90 => cell.ttft.p90,
            Metric::Tpot => cell.tpot.mean,
            Metric::TpotP90 => cell.tpot.p90,
            Metric::Goodput => cell.goodput_rps,
            Metric::Throughput => Some(cell.throughput_tps),
            Metric::Running => cell.steps.map(|s| s.running),
            Metric::KvUsed => cell.steps.map(|s| s.kv_used),
            Metric::KvEfficiency => cell.steps.and_then(|s| s.kv_efficiency),
        }
    }

    /// Whether its value in `cell` rests on lower bounds of censored requests.
    pub fn is_bound(self, cell: &CellMetrics) -> bool {
        match self {
            Metric::NormalizedLatency
            | Metric::NormalizedLatencyP50
            | Metric::NormalizedLatencyP90
            | Metric::NormalizedLatencyP99 => cell.normalized_latency.lower_bounds > 0,
            Metric::Ttft | Metric::TtftP90 => cell.ttft.lower_bounds > 0,
            _ => false,
        }
    }
}
