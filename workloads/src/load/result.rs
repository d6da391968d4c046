//! What a run of the load generator gives.

use serde::{Deserialize, Serialize};

use super::{ConversationReport, LoadOptions};
use crate::record::RequestRecord;
use crate::system::StepRecord;

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Requests sent.
    pub sent: usize,
    /// Requests that have ended.
    pub ended: usize,
    /// Requests of the workload.
    pub total: usize,
    /// Time on the run's clock.
    pub now_s: f64,
    /// When the run started on that clock.
    pub started_s: f64,
}

/// A run of a workload against a system.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadResult {
    /// A row for each request that was due, in the order in which that was known: the workload's, but for later turns of
    /// conversations.
    pub records: Vec<RequestRecord>,
    /// The system's steps, where it says.
    pub steps: Vec<StepRecord>,
    /// When time zero of the workload was, seconds on the run's clock.
    pub started_s: f64,
    /// When the last request ended or the run was cut.
    pub ended_s: f64,
    /// Requests of a closed loop that no user came to take, or turns that no conversation came to.
    pub not_reached: u64,
    /// What became of conversations, where the workload has them.
    pub conversations: Option<ConversationReport>,
    /// How late the client was.
    pub lag: LagReport,
    /// What the system did against the protocol: the first hundred.
    pub protocol_errors: Vec<String>,
    /// Why the run's times mean nothing; empty when they do.
    pub void: Vec<VoidReason>,
}

impl LoadResult {
    /// Whether the run's times mean what they say.
    pub fn is_valid(&self) -> bool {
        self.void.is_empty()
    }
}

/// Why a run's times mean nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum VoidReason {
    /// Too many requests were sent late.
    ClientFellBehind {
        /// Share of the sent requests that were late.
        late_share: f64,
        /// From when on a request is late, seconds.
        bound_s: f64,
        /// The latest, seconds.
        max_s: f64,
    },
    /// The system broke the protocol.
    Protocol {
        /// How often.
        errors: u64,
    },
    /// The system stopped.
    SystemStopped {
        /// Why.
        reason: String,
    },
    /// Somebody stopped the run.
    Aborted {},
}

/// How late a client sent its requests, in seconds after their intended arrivals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LagReport {
    /// Mean.
    pub mean_s: f64,
    /// 99th percentile (the nearest rank).
    pub p99_s: f64,
    /// The latest.
    pub max_s: f64,
    /// Share of requests later than the bound.
    pub late_share: f64,
}

impl LagReport {
    pub(super) fn of(records: &[RequestRecord], options: &LoadOptions) -> Self {
        let mut lags: Vec<f64> = records.iter().filter_map(RequestRecord::lag_s).collect();
        lags.sort_by(f64::total_cmp);
        let Some(&max_s) = lags.last() else { return Self::default() };
        let count = lags.len() as f64;
        let late = lags.iter().filter(|lag| **lag > options.lag_bound_s).count();
        Self {
            mean_s: lags.iter().sum::<f64>() / count,
            p99_s: lags[(count * 0.99).ceil() as usize - 1],
            max_s,
            late_share: late as f64 / count,
        }
    }
}
