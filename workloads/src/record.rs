//! What is kept of each request: one row, whatever became of it.

use serde::{Deserialize, Serialize};

use crate::error::WorkloadError;
use crate::lines::Lines;
use crate::system::FinishReason;
use crate::trace::Turn;

/// Version of [`RequestRecord`].
pub const RECORD_SCHEMA: u32 = 1;

/// One request of a run. Times are seconds on the run's clock, the same as in [`StepRecord`](crate::StepRecord).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestRecord {
    /// Version of this row.
    pub schema: u32,
    /// The request.
    pub id: u64,
    /// When it was to be sent: all latencies count from here. Of a later turn of a conversation, the end of the answer before it
    /// and the time that its user thought.
    pub intended_s: f64,
    /// When the client began to send it; `None` when the run ended before.
    pub sent_s: Option<f64>,
    /// When its first token was emitted.
    pub first_token_s: Option<f64>,
    /// When each of its tokens was emitted; tokens emitted together share their time.
    pub token_times_s: Vec<f64>,
    /// When it ended: finished, rejected, cancelled or failed. `None` when it was censored.
    pub finish_s: Option<f64>,
    /// What became of it.
    pub outcome: Outcome,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Tokens received, of all outputs.
    pub output_tokens: u32,
    /// The most tokens that it was allowed.
    pub max_tokens: u32,
    /// Where its answer ends in the trace.
    pub true_output_len: Option<u32>,
    /// Times it was preempted, as the system says when it finishes.
    pub preemptions: u32,
    /// Prompt tokens found in a cache, as the system says when it finishes.
    pub cached_tokens: u32,
    /// Hash of the tokens received; see [`TokenHasher`](crate::TokenHasher).
    pub output_hash: String,
    /// Whether chance decided which proposed tokens were accepted (speculation with synthetic acceptance): its tokens mean
    /// nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub synthetic: bool,
    /// Which turn of which conversation it is; none of a request of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<Turn>,
    /// Its priority class, 0 is the best; none where the workload has no classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<u8>,
    /// Outputs wanted of its prompt; its tokens are all of theirs.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub outputs: u32,
}

fn one() -> u32 {
    1
}

fn is_one(outputs: &u32) -> bool {
    *outputs == 1
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// All tokens were delivered.
    Finished {
        /// Why it ended.
        reason: FinishReason,
    },
    /// The system refused it.
    Rejected {
        /// Why.
        reason: String,
    },
    /// The client or the system gave it up before the end of the run.
    Cancelled {},
    /// The run ended before it did: it would have taken longer than it was watched.
    Censored {},
    /// The system broke.
    Failed {
        /// Why.
        reason: String,
    },
}

impl RequestRecord {
    /// How late the client was.
    pub fn lag_s(&self) -> Option<f64> {
        self.sent_s.map(|sent| sent - self.intended_s)
    }

    /// Time to first token, from the intended arrival.
    pub fn ttft_s(&self) -> Option<f64> {
        self.first_token_s.map(|first| first - self.intended_s)
    }

    /// Time to the end of a finished request, from the intended arrival.
    pub fn e2e_s(&self) -> Option<f64> {
        let finished = matches!(self.outcome, Outcome::Finished { .. });
        self.finish_s.filter(|_| finished).map(|finish| finish - self.intended_s)
    }
}

/// Reads records from JSON lines, checking their version; `file` is its name in errors.
///
/// # Errors
/// When a line is not a record of this version.
pub fn read_records(source: impl std::io::BufRead, file: &str) -> Result<Vec<RequestRecord>, WorkloadError> {
    #[derive(Deserialize)]
    struct Version {
        schema: u32,
    }
    let mut lines = Lines::new(source, file);
    let mut records = Vec::new();
    while let Some(line) = lines.next()? {
        // The version first: another version's fields would be reported as wrong.
        let Version { schema } = line.json()?;
        if schema != RECORD_SCHEMA {
            return Err(line.place.error(0, format!("schema {schema}, this version reads {RECORD_SCHEMA}")));
        }
        records.push(line.json()?);
    }
    Ok(records)
}
