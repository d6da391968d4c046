//! Workloads: every request with its time, its tokens and its limits, ready to be sent.

mod draw;
mod prompts;

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arrivals::ArrivalProcess;
use crate::error::WorkloadError;
use crate::random::{Stream, Use};
use crate::spec::{LengthSource, ModelLimits, WorkloadSpec};
use crate::trace::{Trace, TraceMeta, Turn};

/// Version of the JSON lines that a workload is written as.
pub const WORKLOAD_SCHEMA: u32 = 1;

/// A list of requests to send. The same specification, seed and limits give the same bytes everywhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// How it was made.
    pub header: WorkloadHeader,
    /// The requests: by intended arrival, or in the order in which a closed loop's users take them.
    pub requests: Vec<WorkloadRequest>,
}

/// How a workload was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadHeader {
    /// Version of these lines.
    pub schema: u32,
    /// What it was to be.
    pub spec: WorkloadSpec,
    /// The seed of all that is random in it.
    pub seed: u64,
    /// The model it was made for.
    pub limits: ModelLimits,
    /// Where the trace it was made from came from.
    pub trace: Option<TraceMeta>,
    /// Users of the closed loop; open loop when not given.
    pub users: Option<u32>,
    /// Requests left out because the model's limit does not admit them.
    pub dropped: u64,
    /// Requests kept whose prompt leaves no room for an answer: a system will reject them.
    pub inadmissible: u64,
    /// Requests kept whose answer will end at the model's limit before its true end.
    pub shortened: u64,
    /// The conversations that the requests are turns of; none of requests of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conversations: Option<DrawnConversations>,
}

/// Conversations of a workload.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrawnConversations {
    /// How many.
    pub count: u64,
    /// Of these, those that end before their last turn because the model's limit does not admit the next one.
    pub ended_early: u64,
    /// No turn that becomes due later than this is sent, seconds from the start: the time of as many requests as were asked
    /// for, or the last conversation's beginning if that is later, so that all systems are watched alike. None where arrivals
    /// have no rate.
    pub last_turn_s: Option<f64>,
}

/// A request to send.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadRequest {
    /// Its number in the workload, from 0.
    pub id: u64,
    /// Open loop: intended arrival, seconds from the start. Closed loop: seconds from the end of its user's previous
    /// request (from the start for a user's first) to its intended arrival. Later turn of a conversation: seconds from the
    /// end of the answer before it.
    pub arrival_s: f64,
    /// Prompt token ids; of a later turn of a conversation, those that follow the answer before it.
    pub prompt: Vec<u32>,
    /// The most tokens the client accepts: what the prompt leaves of the model's limit (1 where that is nothing).
    pub max_tokens: u32,
    /// Where the answer ends; hidden from systems, see
    /// [`GenerationRequest::true_output_len`](crate::GenerationRequest::true_output_len).
    pub true_output_len: Option<u32>,
    /// Which turn of which conversation it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turn: Option<Turn>,
    /// Its priority class, 0 is the best.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<u8>,
}

impl WorkloadRequest {
    /// Whether it goes on with a conversation, so that its time is known when the answer before it has ended.
    pub(crate) fn is_later_turn(&self) -> bool {
        self.turn.is_some_and(|turn| turn.turn > 0)
    }
}

impl Workload {
    /// Makes a workload, reading the trace it needs, if any, relative to the working directory.
    ///
    /// # Errors
    /// When a setting means nothing, the trace cannot be read or is too short, or prompts would not fit in memory.
    pub fn generate(spec: &WorkloadSpec, seed: u64, limits: &ModelLimits) -> Result<Self, WorkloadError> {
        let trace = spec.load_trace(Path::new(""))?;
        Self::generate_from(spec, trace.as_ref(), seed, limits)
    }

    /// The same with the trace already read ([`WorkloadSpec::load_trace`]).
    ///
    /// # Errors
    /// As [`Workload::generate`]; and when the specification needs a trace and none is given.
    pub fn generate_from(
        spec: &WorkloadSpec,
        trace: Option<&Trace>,
        seed: u64,
        limits: &ModelLimits,
    ) -> Result<Self, WorkloadError> {
        spec.validate()?;
        limits.validate()?;
        let drawn = draw::draw(spec, trace, seed, limits)?;
        let mut header = WorkloadHeader {
            schema: WORKLOAD_SCHEMA,
            spec: spec.clone(),
            seed,
            limits: *limits,
            trace: drawn.trace,
            users: match spec.arrivals {
                ArrivalProcess::ClosedLoop { users, .. } => Some(users),
                _ => None,
            },
            dropped: drawn.dropped,
            inadmissible: 0,
            shortened: 0,
            conversations: drawn.conversations,
        };
        let mut classes = Stream::new(seed, Use::Class, 0);
        let mut class = None;
        let mut requests = Vec::with_capacity(drawn.shapes.len());
        for (id, (shape, arrival_s)) in drawn.shapes.into_iter().zip(drawn.arrivals).enumerate() {
            let room = limits.max_model_len.saturating_sub(shape.history.saturating_add(shape.input));
            let later = shape.history > 0;
            if !later {
                class = draw_class(&spec.classes, &mut classes);
            }
            header.inadmissible += u64::from(room == 0);
            header.shortened += u64::from(room > 0 && shape.output > room);
            requests.push(WorkloadRequest {
                id: id as u64,
                arrival_s,
                prompt: prompts::tokens(
                    seed,
                    id as u64,
                    shape.input,
                    if later { 0 } else { draw::shared_len(spec) },
                    shape.prefix,
                    spec.length_scale,
                    limits,
                ),
                max_tokens: room.max(1),
                true_output_len: Some(shape.output),
                turn: shape.turn,
                class,
            });
        }
        Ok(Self { header, requests })
    }

    /// Prompt and answer lengths of what [`Workload::generate`] makes, without its tokens: of a conversation's later turn, the
    /// prompt is all that was said before, and its own tokens. A trace is not read for it.
    ///
    /// # Errors
    /// When a setting means nothing, or lengths come from a trace.
    pub fn draw_lengths(
        spec: &WorkloadSpec,
        seed: u64,
        limits: &ModelLimits,
    ) -> Result<Vec<(u32, u32)>, WorkloadError> {
        spec.validate()?;
        limits.validate()?;
        let drawn = draw::draw(spec, None, seed, limits)?;
        Ok(drawn
            .shapes
            .iter()
            .map(|shape| (shape.history.saturating_add(shape.input), shape.output))
            .collect())
    }

    /// Requests a second that an open loop offers: gaps over the time between first and last arrival. `None` for a
    /// closed loop, for conversations (their later turns wait for answers) and when all come at once.
    pub fn offered_rate(&self) -> Option<f64> {
        if self.header.conversations.is_some() {
            return None;
        }
        let (first, last) = (self.requests.first()?.arrival_s, self.requests.last()?.arrival_s);
        (self.header.users.is_none() && last > first)
            .then(|| (self.requests.len() - 1) as f64 / (last - first))
    }

    /// Checks what a load generator relies on: ids differ, times are in order and are times.
    ///
    /// # Errors
    /// When they are not: possible only for a workload that was not generated here.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        let mut ids = std::collections::HashSet::new();
        let mut last = 0.0;
        let mut before: Option<Turn> = None;
        for request in &self.requests {
            let wrong =
                |what: &str| Err(WorkloadError::spec("workload", format!("request {}: {what}", request.id)));
            if !ids.insert(request.id) {
                return wrong("its id is taken");
            }
            if !(0.0..1e9).contains(&request.arrival_s) {
                return wrong("its arrival is not between 0 and 1e9 seconds");
            }
            let goes_on = request.turn.is_none_or(|now| {
                let next = |old: Turn| {
                    old.conversation == now.conversation && old.turn.checked_add(1) == Some(now.turn)
                };
                now.turn == 0 || before.is_some_and(next)
            });
            if !goes_on || request.turn.is_some() != self.header.conversations.is_some() {
                return wrong("it does not follow the turn before it");
            }
            before = request.turn;
            if request.prompt.is_empty() || request.max_tokens == 0 {
                return wrong("its prompt or its answer is empty");
            }
            if request.is_later_turn() {
                continue;
            }
            if self.header.users.is_none() && request.arrival_s < last {
                return wrong("it arrives before the one before it");
            }
            last = request.arrival_s;
        }
        if self.header.users == Some(0) {
            return Err(WorkloadError::spec("workload", "a closed loop without users"));
        }
        Ok(())
    }

    /// Writes it as JSON lines: the header, then a request a line.
    ///
    /// # Errors
    /// When the sink fails.
    pub fn write_jsonl(&self, mut sink: impl Write) -> std::io::Result<()> {
        self.write_lines(&self.header, &mut sink)?;
        sink.flush()
    }

    fn write_lines(&self, header: &WorkloadHeader, mut sink: impl Write) -> std::io::Result<()> {
        serde_json::to_writer(&mut sink, header)?;
        sink.write_all(b"\n")?;
        for request in &self.requests {
            serde_json::to_writer(&mut sink, request)?;
            sink.write_all(b"\n")?;
        }
        Ok(())
    }

    /// Reads what [`Workload::write_jsonl`] wrote; `file` is its name in errors.
    ///
    /// # Errors
    /// When it cannot be read, is of another version, or is wrong somewhere.
    pub fn read_jsonl(source: impl BufRead, file: &str) -> Result<Self, WorkloadError> {
        let mut lines = crate::lines::Lines::new(source, file);
        let Some(line) = lines.next()? else {
            return Err(WorkloadError::spec("workload", format!("{file} is empty")));
        };
        let header: WorkloadHeader = line.json()?;
        if header.schema != WORKLOAD_SCHEMA {
            let problem =
                format!("{file} has schema {}, this version reads {WORKLOAD_SCHEMA}", header.schema);
            return Err(WorkloadError::spec("workload", problem));
        }
        let mut requests = Vec::new();
        while let Some(line) = lines.next()? {
            requests.push(line.json()?);
        }
        let workload = Self { header, requests };
        workload.validate()?;
        Ok(workload)
    }

    /// SHA-256 of its JSON lines, in hexadecimal: what a manifest names it by. Where a trace's file lies changes nothing.
    pub fn sha256(&self) -> String {
        let mut header = self.header.clone();
        if let LengthSource::Trace(source) = &mut header.spec.lengths {
            source.path = PathBuf::new();
        }
        if let Some(trace) = &mut header.trace {
            trace.file = String::new();
        }
        let mut hasher = Sha256::new();
        self.write_lines(&header, &mut hasher)
            .expect("hashing does not fail, and all fields have JSON forms");
        hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The class of the next request or conversation: by weight.
fn draw_class(weights: &[u32], stream: &mut Stream) -> Option<u8> {
    let mut left = stream.below(weights.iter().sum::<u32>().max(1));
    weights
        .iter()
        .position(|&weight| left.checked_sub(weight).map(|rest| left = rest).is_none())
        .map(|at| at as u8)
}
