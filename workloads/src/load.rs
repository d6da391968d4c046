//! The load generator: sends a workload to a system and keeps what comes back.

mod result;
mod talks;
mod tracker;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use result::{LagReport, LoadResult, Progress, VoidReason};
pub use talks::ConversationReport;
use talks::Talks;
use tracker::Tracker;

use crate::clock::Clock;
use crate::error::{WorkloadError, positive};
use crate::system::{GenerationRequest, ServingSystem, StepRecord, SystemError};
use crate::workload::Workload;

/// The longest wait for an event, after which progress is shown and the abort flag read.
const TICK: Duration = Duration::from_millis(50);

/// Seconds to the nearest float (`as_secs_f64` rounds twice), so that a time prints as it was.
fn seconds(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e9
}

/// Settings of a load generator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoadOptions {
    /// How long unfinished requests are waited for after the last one became due; then they are censored.
    pub drain_limit_s: f64,
    /// The longest run; what is unfinished or unsent then is censored.
    pub time_limit_s: Option<f64>,
    /// How long the system may take to confirm the cancellation of censored requests.
    pub cancel_grace_s: f64,
    /// A request sent later than this after its intended arrival was sent late.
    pub lag_bound_s: f64,
    /// The share of requests sent late above which the run is void.
    pub lag_share: f64,
}

impl Default for LoadOptions {
    /// Ten minutes of drain, no limit, 30 s of grace (a batch may have to end first); void when more than 1 % were sent more than 20 ms late.
    fn default() -> Self {
        Self {
            drain_limit_s: 600.0,
            time_limit_s: None,
            cancel_grace_s: 30.0,
            lag_bound_s: 0.02,
            lag_share: 0.01,
        }
    }
}

impl LoadOptions {
    /// Checks the settings.
    ///
    /// # Errors
    /// When a time is not a finite number above zero, or the share is not between 0 and 1.
    pub fn validate(&self) -> Result<(), WorkloadError> {
        positive("drain_limit_s", self.drain_limit_s)?;
        positive("time_limit_s", self.time_limit_s.unwrap_or(1.0))?;
        positive("cancel_grace_s", self.cancel_grace_s)?;
        positive("lag_bound_s", self.lag_bound_s)?;
        if !(0.0..=1.0).contains(&self.lag_share) {
            let problem = format!("must be between 0 and 1, is {}", self.lag_share);
            return Err(WorkloadError::spec("lag_share", problem));
        }
        Ok(())
    }
}

/// Sends a workload to a system from one thread, and times every request from its intended arrival.
///
/// An open loop sends at the workload's times whatever the system does. A closed loop's users each take the next
/// request when their previous one has ended. Conversations begin at the workload's times, and each of their later turns is
/// sent when the answer before it has ended and the user has thought; a turn without a whole answer is the last.
#[derive(Debug)]
pub struct LoadGenerator<'a> {
    workload: &'a Workload,
    options: LoadOptions,
}

impl<'a> LoadGenerator<'a> {
    /// A load generator of a workload.
    ///
    /// # Errors
    /// When the options mean nothing or the workload is not in order.
    pub fn new(workload: &'a Workload, options: LoadOptions) -> Result<Self, WorkloadError> {
        options.validate()?;
        workload.validate()?;
        Ok(Self { workload, options })
    }

    /// Runs the workload from now on until all requests have ended, a limit is reached, `abort` is set or the system
    /// stops. Whatever happens, every request that was due has a record, and what makes the run void is in the result.
    ///
    /// `progress` is called about 20 times a second and once at the end.
    pub fn run(
        &self,
        system: &mut dyn ServingSystem,
        clock: &dyn Clock,
        abort: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> LoadResult {
        let mut run = Run::new(self, clock);
        let mut stop = run.serve(system, abort, progress);
        let cut = clock.now();
        if matches!(stop, Stop::Limit | Stop::Aborted)
            && let Err(error) = run.wind_up(system, cut)
        {
            stop = Stop::System(error);
        }
        run.steps.extend(system.take_steps());
        progress(run.progress());
        run.into_result(stop, cut)
    }
}

/// Why sending and waiting ended.
enum Stop {
    AllEnded,
    Limit,
    Aborted,
    System(SystemError),
}

struct Run<'a> {
    workload: &'a Workload,
    options: LoadOptions,
    clock: &'a dyn Clock,
    start: Duration,
    /// Requests whose intended arrival is known and which are not yet sent.
    due: BinaryHeap<Reverse<(Duration, usize)>>,
    /// Requests that no user of a closed loop has taken yet, or first turns, begin here.
    untaken: usize,
    talks: Option<Talks>,
    last_due: Duration,
    next_progress: Duration,
    tracker: Tracker,
    steps: Vec<StepRecord>,
}

impl<'a> Run<'a> {
    fn new(generator: &LoadGenerator<'a>, clock: &'a dyn Clock) -> Self {
        let start = clock.now();
        let total = generator.workload.requests.len();
        let first = generator.workload.header.users.map_or(total, |users| total.min(users as usize));
        let mut run = Self {
            workload: generator.workload,
            options: generator.options,
            clock,
            start,
            due: BinaryHeap::new(),
            untaken: 0,
            talks: Talks::new(generator.workload, start),
            last_due: start,
            next_progress: start,
            tracker: Tracker::new(total, generator.workload.header.spec.decoding.outputs()),
            steps: Vec::new(),
        };
        for _ in 0..first {
            run.take_next(start);
        }
        // Turns may become due until then: waiting for the last requests begins there.
        if let Some(last_turn) = run.talks.as_ref().and_then(Talks::last_turn) {
            run.last_due = run.last_due.max(last_turn);
        }
        run
    }

    /// Makes the next request due at its time after `from`.
    fn take_next(&mut self, from: Duration) {
        let Some(request) = self.workload.requests.get(self.untaken) else { return };
        if !request.is_later_turn() {
            let intended = from + Duration::from_secs_f64(request.arrival_s);
            self.expect(self.untaken, intended, request.prompt.len());
        }
        self.untaken += 1;
    }

    fn expect(&mut self, place: usize, intended: Duration, prompt_len: usize) {
        self.tracker.expect(&self.workload.requests[place], intended, prompt_len);
        self.due.push(Reverse((intended, place)));
        self.last_due = self.last_due.max(intended);
    }

    /// A request has ended: what its user does next.
    fn ended(&mut self, id: u64, at: Duration) {
        if let Some(talks) = &mut self.talks {
            let answer = self.tracker.take_answer(id);
            if let Some(next) = talks.ended(self.workload, id, at, answer) {
                self.expect(next.place, next.intended, next.prompt_len);
            }
        } else if self.workload.header.users.is_some() {
            self.take_next(at);
        }
    }

    fn serve(
        &mut self,
        system: &mut dyn ServingSystem,
        abort: &AtomicBool,
        progress: &mut dyn FnMut(Progress),
    ) -> Stop {
        loop {
            if abort.load(Ordering::Relaxed) {
                return Stop::Aborted;
            }
            if let Err(error) = self.send_due(system) {
                return Stop::System(error);
            }
            let now = self.clock.now();
            if now >= self.next_progress {
                self.next_progress = now + TICK;
                self.steps.extend(system.take_steps());
                progress(self.progress());
            }
            if self.due.is_empty() && self.tracker.open() == 0 {
                return Stop::AllEnded;
            }
            let limit = self.limit();
            if now >= limit {
                return Stop::Limit;
            }
            let next = self.due.peek().map_or(Duration::MAX, |Reverse((intended, _))| *intended);
            match system.next_event(next.min(limit).min(now + TICK)) {
                Ok(Some(event)) => {
                    let id = event.request;
                    if let Some(at) = self.tracker.take(event, self.clock.now(), None) {
                        self.ended(id, at);
                    }
                }
                Ok(None) => {}
                Err(error) => return Stop::System(error),
            }
        }
    }

    fn send_due(&mut self, system: &mut dyn ServingSystem) -> Result<(), SystemError> {
        while let Some(&Reverse((intended, index))) = self.due.peek() {
            let now = self.clock.now();
            if intended > now {
                break;
            }
            self.due.pop();
            let request = &self.workload.requests[index];
            // Before the call: a system that is slow to take a request shows in the lag of the next.
            self.tracker.sent(request.id, now);
            system.submit(GenerationRequest {
                id: request.id,
                prompt: match &mut self.talks {
                    Some(talks) => talks.prompt(request),
                    None => request.prompt.clone(),
                },
                max_tokens: request.max_tokens,
                true_output_len: request.true_output_len,
                class: request.class.unwrap_or(0),
                decoding: self.workload.header.spec.decoding,
            })?;
        }
        Ok(())
    }

    /// When waiting ends.
    fn limit(&self) -> Duration {
        let end = |from: Duration, limit_s: f64| {
            Duration::try_from_secs_f64(limit_s)
                .ok()
                .and_then(|limit| from.checked_add(limit))
                .unwrap_or(Duration::MAX)
        };
        let whole = self.options.time_limit_s.map_or(Duration::MAX, |limit_s| end(self.start, limit_s));
        if self.due.is_empty() { whole.min(end(self.last_due, self.options.drain_limit_s)) } else { whole }
    }

    /// Cancels what is open and waits for the system to confirm, so that the next run finds it idle. What was emitted
    /// up to `cut` still counts.
    fn wind_up(&mut self, system: &mut dyn ServingSystem, cut: Duration) -> Result<(), SystemError> {
        for id in self.tracker.open_ids() {
            system.cancel(id)?;
        }
        let patience = self.clock.now() + Duration::from_secs_f64(self.options.cancel_grace_s.min(1e6));
        while self.tracker.open() > 0 && self.clock.now() < patience {
            if let Some(event) = system.next_event(patience)? {
                self.tracker.take(event, self.clock.now(), Some(cut));
            }
        }
        for id in self.tracker.open_ids() {
            self.tracker.unconfirmed(id);
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        Progress {
            sent: self.tracker.sent_count(),
            ended: self.tracker.ended_count(),
            total: self.workload.requests.len(),
            now_s: seconds(self.clock.now()),
            started_s: seconds(self.start),
        }
    }

    fn into_result(self, stop: Stop, cut: Duration) -> LoadResult {
        let mut void = Vec::new();
        let failure = match stop {
            Stop::AllEnded | Stop::Limit => None,
            Stop::Aborted => {
                void.push(VoidReason::Aborted {});
                None
            }
            Stop::System(error) => {
                void.push(VoidReason::SystemStopped { reason: error.to_string() });
                Some(error.to_string())
            }
        };
        let not_reached = (self.workload.requests.len() - self.tracker.expected()) as u64;
        let (records, protocol) = self.tracker.into_records(failure.as_deref());
        if protocol.count > 0 {
            void.push(VoidReason::Protocol { errors: protocol.count });
        }
        let lag = LagReport::of(&records, &self.options);
        if lag.late_share > self.options.lag_share {
            void.push(VoidReason::ClientFellBehind {
                late_share: lag.late_share,
                bound_s: self.options.lag_bound_s,
                max_s: lag.max_s,
            });
        }
        LoadResult {
            records,
            steps: self.steps,
            started_s: seconds(self.start),
            ended_s: seconds(cut),
            not_reached,
            conversations: self.talks.as_ref().map(Talks::report),
            lag,
            protocol_errors: protocol.first,
            void,
        }
    }
}
