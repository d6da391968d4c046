//! What a run keeps: a row a request, a row a cell. (A row a step is `quire_workloads::StepRecord`.)

use std::fmt;

use quire_workloads::{ConversationReport, FinishReason, LagReport, Outcome, RequestRecord};
use serde::{Deserialize, Serialize};

use crate::cpu_use::CpuUse;
use crate::gpu_use::GpuUse;
use crate::metrics::{Emission, Ending, Observed, StepMetrics};

/// Which cell: one system at one rate of one panel with one seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellKey {
    /// The panel's name.
    pub panel: String,
    /// The system's name.
    pub system: String,
    /// Requests a second.
    pub rate: f64,
    /// Number of the repeat, from 0.
    pub repeat: u32,
    /// Seed of the workload.
    pub seed: u64,
}

impl CellKey {
    /// A name that no other cell of the run has, fit for files.
    pub fn id(&self) -> String {
        format!("{}.{}.{}.{}", self.panel, self.system, self.rate, self.seed)
    }
}

impl fmt::Display for CellKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {} at {} requests/s, seed {}", self.system, self.panel, self.rate, self.seed)
    }
}

/// What became of a cell.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum CellStatus {
    /// It ran.
    Done {},
    /// It ran, but its times mean nothing.
    Void {
        /// Why.
        reason: String,
    },
    /// It was left out.
    Skipped {
        /// The lower rate at which the system was saturated.
        saturated_at: f64,
    },
}

/// Figures from steps, kept with the cell so that the packed form can do without the steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredSteps {
    /// Over the stationary window.
    pub window: Option<StepMetrics>,
    /// Over the whole cell.
    pub full: Option<StepMetrics>,
}

/// A row of cells.jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CellEntry {
    /// Which.
    pub key: CellKey,
    /// In which sitting it ran: an index into the manifest's `sittings`. Not written for the first, which all cells of
    /// older runs are of.
    #[serde(default, skip_serializing_if = "is_first")]
    pub sitting: u32,
    /// What became of it.
    pub status: CellStatus,
    /// When its workload began, seconds on its clock.
    pub start_s: f64,
    /// When it ended: the last request's end, or the limit after its last arrival.
    pub end_s: f64,
    /// How late the client was.
    pub lag: LagReport,
    /// Whether the system was saturated in the window, rejected or failed more than one request in a hundred there, or left more
    /// than one in twenty unfinished at the limit.
    pub overloaded: bool,
    /// SHA-256 of the workload.
    pub workload_sha256: String,
    /// Requests of the workload left out, too long for the model, and cut by its limit.
    pub workload_limits: WorkloadLimits,
    /// What became of conversations, where requests are turns of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversations: Option<ConversationReport>,
    /// Figures from steps.
    pub steps: StoredSteps,
    /// Who used the CPU meanwhile; none where the system does not tell, of very short cells and in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuUse>,
    /// The GPU's clocks and power in the stationary window; none on the CPU, where nothing could read them and in older runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuUse>,
}

fn is_first(sitting: &u32) -> bool {
    *sitting == 0
}

/// What the model's limit did to a workload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadLimits {
    /// Requests left out.
    pub dropped: u64,
    /// Requests kept that will be rejected.
    pub inadmissible: u64,
    /// Requests kept whose answer ends at the limit.
    pub shortened: u64,
    /// Conversations without all of their turns.
    #[serde(default, skip_serializing_if = "is_none")]
    pub ended_early: u64,
}

fn is_none(count: &u64) -> bool {
    *count == 0
}

/// A row of records.jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestRow {
    /// Its cell.
    #[serde(flatten)]
    pub key: CellKey,
    /// The request.
    #[serde(flatten)]
    pub record: RequestRecord,
}

impl RequestRow {
    /// Its number in the workload.
    pub fn request(&self) -> u64 {
        self.record.id
    }

    /// What metrics need of it; `cell_end_s` is when watching ended.
    pub fn observed(&self, cell_end_s: f64) -> Observed {
        observe(&self.record, cell_end_s)
    }

    /// Hash of the output of a finished request, where it is one: several come in an order that depends on the system.
    pub fn finished_hash(&self) -> Option<&str> {
        (matches!(self.record.outcome, Outcome::Finished { .. }) && self.record.outputs == 1)
            .then_some(&*self.record.output_hash)
    }
}

/// What metrics need of a record; `cell_end_s` is when watching ended.
pub fn observe(record: &RequestRecord, cell_end_s: f64) -> Observed {
    let mut emissions: Vec<Emission> = Vec::with_capacity(record.token_times_s.len());
    for &at_s in &record.token_times_s {
        match emissions.last_mut() {
            Some(last) if last.at_s == at_s => last.tokens += 1,
            _ => emissions.push(Emission { at_s, tokens: 1 }),
        }
    }
    let ending = match record.outcome {
        Outcome::Finished { .. } => Ending::Finished,
        Outcome::Rejected { .. } => Ending::Rejected,
        Outcome::Cancelled {} => Ending::Cancelled,
        Outcome::Censored {} => Ending::Censored,
        Outcome::Failed { .. } => Ending::Failed,
    };
    let cut = [FinishReason::KvExhausted, FinishReason::Early];
    Observed {
        intended_s: record.intended_s,
        emissions,
        ending,
        cut: matches!(record.outcome, Outcome::Finished { reason } if cut.contains(&reason)),
        end_s: record.finish_s.unwrap_or(cell_end_s),
        prompt_tokens: record.prompt_tokens,
        cached_tokens: record.cached_tokens,
        class: record.class,
        outputs: record.outputs,
        expected_tokens: record.true_output_len.unwrap_or(record.max_tokens).min(record.max_tokens),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row() -> RequestRow {
        let key = CellKey { panel: "p".into(), system: "s".into(), rate: 1.5, repeat: 0, seed: 7 };
        let record = RequestRecord {
            schema: quire_workloads::RECORD_SCHEMA,
            id: 3,
            intended_s: 1.0,
            sent_s: Some(1.001),
            first_token_s: Some(1.5),
            token_times_s: vec![1.5, 1.75, 1.75],
            finish_s: Some(1.75),
            outcome: Outcome::Finished { reason: FinishReason::Stop },
            prompt_tokens: 5,
            output_tokens: 3,
            max_tokens: 100,
            true_output_len: Some(3),
            preemptions: 0,
            cached_tokens: 0,
            output_hash: "ab".into(),
            synthetic: false,
            turn: None,
            class: None,
            outputs: 1,
        };
        RequestRow { key, record }
    }

    #[test]
    fn rows_are_flat_and_survive_a_round_trip() {
        let text = serde_json::to_string(&row()).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["panel"], "p");
        assert_eq!(value["output_tokens"], 3);
        assert_eq!(serde_json::from_str::<RequestRow>(&text).unwrap(), row());
    }

    #[test]
    fn tokens_of_one_time_are_one_emission() {
        let seen = row().observed(9.0);
        assert_eq!(seen.emissions.iter().map(|e| e.tokens).collect::<Vec<_>>(), [1, 2]);
        assert_eq!((seen.end_s, seen.expected_tokens), (1.75, 3));
    }

    #[test]
    fn what_ended_by_no_choice_of_the_models_was_cut() {
        use FinishReason::{Early, KvExhausted, Length, Stop};
        for (reason, cut) in [(Stop, false), (Length, false), (KvExhausted, true), (Early, true)] {
            let mut row = row();
            row.record.outcome = Outcome::Finished { reason };
            assert_eq!(row.observed(9.0).cut, cut, "{reason:?}");
        }
    }

    #[test]
    fn a_censored_request_was_watched_until_the_cells_end() {
        let mut row = row();
        row.record.outcome = Outcome::Censored {};
        row.record.finish_s = None;
        assert_eq!(row.observed(9.0).end_s, 9.0);
        assert_eq!(row.finished_hash(), None);
    }
}
