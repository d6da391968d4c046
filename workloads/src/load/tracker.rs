//! Requests in flight: turns events into records and holds the system to the protocol.

use std::collections::HashMap;
use std::time::Duration;

use super::seconds;
use crate::hash::TokenHasher;
use crate::record::{Outcome, RECORD_SCHEMA, RequestRecord};
use crate::system::{EventKind, FinishReason, TokenEvent};
use crate::workload::WorkloadRequest;

/// Errors kept in words; the rest is only counted.
const KEPT_ERRORS: usize = 100;

/// How far an event's time may lie after the time at which the client sees it, for clocks read on two cores.
const CLOCK_SLACK: Duration = Duration::from_millis(1);

/// What a system did against the protocol.
#[derive(Default)]
pub(super) struct ProtocolErrors {
    pub(super) count: u64,
    pub(super) first: Vec<String>,
}

impl ProtocolErrors {
    fn add(&mut self, what: String) {
        self.count += 1;
        if self.first.len() < KEPT_ERRORS {
            self.first.push(what);
        }
    }
}

struct Tracked {
    record: RequestRecord,
    hasher: TokenHasher,
    /// The tokens of a conversation's turn, for the prompt of the next; never more than it is to have.
    answer: Vec<u32>,
    last: Duration,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Due,
    Sent,
    Ended,
}

pub(super) struct Tracker {
    tracked: Vec<Tracked>,
    index: HashMap<u64, usize>,
    sent: usize,
    ended: usize,
    errors: ProtocolErrors,
    /// Outputs that each prompt is to have.
    outputs: u32,
}

impl Tracker {
    pub(super) fn new(total: usize, outputs: u32) -> Self {
        let (tracked, index) = (Vec::with_capacity(total), HashMap::with_capacity(total));
        Self { tracked, index, sent: 0, ended: 0, errors: ProtocolErrors::default(), outputs }
    }

    /// A request with a prompt of `prompt_len` tokens has become due. Its record says that it was censored until more is
    /// known.
    pub(super) fn expect(&mut self, request: &WorkloadRequest, intended: Duration, prompt_len: usize) {
        let record = RequestRecord {
            schema: RECORD_SCHEMA,
            id: request.id,
            intended_s: seconds(intended),
            sent_s: None,
            first_token_s: None,
            token_times_s: Vec::new(),
            finish_s: None,
            outcome: Outcome::Censored {},
            prompt_tokens: u32::try_from(prompt_len).unwrap_or(u32::MAX),
            output_tokens: 0,
            max_tokens: request.max_tokens,
            true_output_len: request.true_output_len,
            preemptions: 0,
            cached_tokens: 0,
            output_hash: String::new(),
            synthetic: false,
            turn: request.turn,
            class: request.class,
            outputs: self.outputs,
        };
        self.index.insert(request.id, self.tracked.len());
        self.tracked.push(Tracked {
            record,
            hasher: TokenHasher::new(),
            answer: Vec::new(),
            last: Duration::ZERO,
            state: State::Due,
        });
    }

    /// Requests that have become due.
    pub(super) fn expected(&self) -> usize {
        self.tracked.len()
    }

    /// The answer of a turn that has ended, where it is whole; it is not kept.
    pub(super) fn take_answer(&mut self, id: u64) -> Option<Vec<u32>> {
        let tracked = &mut self.tracked[*self.index.get(&id)?];
        let answer = std::mem::take(&mut tracked.answer);
        let finished = matches!(tracked.record.outcome, Outcome::Finished { .. });
        (finished && answer.len() == answer_len(&tracked.record)).then_some(answer)
    }

    pub(super) fn sent(&mut self, id: u64, at: Duration) {
        let tracked = &mut self.tracked[self.index[&id]];
        tracked.record.sent_s = Some(seconds(at));
        tracked.last = at;
        tracked.state = State::Sent;
        self.sent += 1;
    }

    pub(super) fn sent_count(&self) -> usize {
        self.sent
    }

    pub(super) fn ended_count(&self) -> usize {
        self.ended
    }

    /// Requests sent and not ended.
    pub(super) fn open(&self) -> usize {
        self.sent - self.ended
    }

    pub(super) fn open_ids(&self) -> Vec<u64> {
        let open = self.tracked.iter().filter(|tracked| tracked.state == State::Sent);
        open.map(|tracked| tracked.record.id).collect()
    }

    /// Takes in an event seen at `now`; gives the time at which its request ended, if that is what it says. After a
    /// `cut`, what was emitted later only closes the request and leaves its record.
    pub(super) fn take(
        &mut self,
        event: TokenEvent,
        now: Duration,
        cut: Option<Duration>,
    ) -> Option<Duration> {
        let id = event.request;
        let what = kind_name(&event.kind);
        let Some(tracked) = self.index.get(&id).map(|&index| &mut self.tracked[index]) else {
            self.errors.add(format!("request {id}: {what} for a request that was never sent"));
            return None;
        };
        match tracked.state {
            State::Due => {
                self.errors.add(format!("request {id}: {what} before it was sent"));
                return None;
            }
            State::Ended => {
                self.errors.add(format!("request {id}: {what} after its end"));
                return None;
            }
            State::Sent => {}
        }
        if event.at < tracked.last {
            self.errors.add(format!("request {id}: {what} at {:?}, before {:?}", event.at, tracked.last));
        } else if event.at > now + CLOCK_SLACK {
            self.errors.add(format!("request {id}: {what} at {:?}, which is seen at {now:?}", event.at));
        }
        tracked.last = tracked.last.max(event.at);
        // After the cut a cancellation is the client's own doing, whatever its time.
        let counts = cut.is_none_or(|cut| event.at <= cut && event.kind != EventKind::Cancelled);
        let EventKind::Tokens(tokens) = event.kind else {
            if counts {
                end(tracked, event.kind, event.at, &mut self.errors);
            }
            tracked.state = State::Ended;
            self.ended += 1;
            return Some(event.at);
        };
        if counts {
            add_tokens(tracked, &tokens, event.at, &mut self.errors);
        }
        None
    }

    /// The system did not confirm a cancellation in time.
    pub(super) fn unconfirmed(&mut self, id: u64) {
        self.errors.add(format!("request {id}: its cancellation was not confirmed"));
    }

    /// The records. Where the system failed, what had not ended failed with it.
    pub(super) fn into_records(self, failure: Option<&str>) -> (Vec<RequestRecord>, ProtocolErrors) {
        let finish = |tracked: Tracked| {
            let mut record = tracked.record;
            record.output_hash = tracked.hasher.hex();
            record.first_token_s = record.token_times_s.first().copied();
            if let (Some(reason), true) = (failure, tracked.state != State::Ended) {
                record.outcome = Outcome::Failed { reason: reason.to_owned() };
            }
            record
        };
        (self.tracked.into_iter().map(finish).collect(), self.errors)
    }
}

/// Tokens of an answer that ends as it is to, all outputs together.
fn answer_len(record: &RequestRecord) -> usize {
    let one = record.true_output_len.unwrap_or(u32::MAX).min(record.max_tokens);
    one.saturating_mul(record.outputs) as usize
}

fn add_tokens(tracked: &mut Tracked, tokens: &[u32], at: Duration, errors: &mut ProtocolErrors) {
    let record = &mut tracked.record;
    if tokens.is_empty() {
        errors.add(format!("request {}: an event with no tokens", record.id));
    }
    let before = record.output_tokens;
    record.output_tokens = before.saturating_add(tokens.len() as u32);
    let end = answer_len(record) as u32;
    if before <= end && record.output_tokens > end {
        errors.add(format!("request {}: {} tokens, its end is at {end}", record.id, record.output_tokens));
    }
    record.token_times_s.extend(std::iter::repeat_n(seconds(at), tokens.len()));
    if record.turn.is_some() {
        let room = answer_len(record).saturating_sub(tracked.answer.len());
        tracked.answer.extend(tokens.iter().take(room));
    }
    tracked.hasher.update(tokens);
}

fn end(tracked: &mut Tracked, kind: EventKind, at: Duration, errors: &mut ProtocolErrors) {
    let record = &mut tracked.record;
    record.finish_s = Some(seconds(at));
    record.outcome = match kind {
        EventKind::Finished { reason, preemptions, cached_tokens } => {
            (record.preemptions, record.cached_tokens) = (preemptions, cached_tokens);
            check_end(record, reason, errors);
            Outcome::Finished { reason }
        }
        EventKind::Rejected { reason } => {
            if record.output_tokens > 0 {
                errors.add(format!("request {}: rejected after {} tokens", record.id, record.output_tokens));
            }
            Outcome::Rejected { reason }
        }
        EventKind::Cancelled => Outcome::Cancelled {},
        EventKind::Failed { reason } => Outcome::Failed { reason },
        EventKind::Tokens(_) => unreachable!("tokens do not end a request"),
    };
}

/// A finished request has the tokens that its reason says.
fn check_end(record: &RequestRecord, reason: FinishReason, errors: &mut ProtocolErrors) {
    let got = record.output_tokens;
    let due = match reason {
        FinishReason::Stop => record.true_output_len.map(|len| len.saturating_mul(record.outputs)),
        FinishReason::Length => Some(answer_len(record) as u32),
        FinishReason::KvExhausted | FinishReason::Early => None,
    };
    if let Some(due) = due.filter(|due| got < *due) {
        errors.add(format!("request {}: finished ({reason:?}) with {got} of {due} tokens", record.id));
    }
}

fn kind_name(kind: &EventKind) -> &'static str {
    match kind {
        EventKind::Tokens(_) => "tokens",
        EventKind::Finished { .. } => "an end",
        EventKind::Rejected { .. } => "a rejection",
        EventKind::Cancelled => "a cancellation",
        EventKind::Failed { .. } => "a failure",
    }
}
