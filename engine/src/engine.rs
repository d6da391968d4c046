//! The loop.

use std::time::Instant;

use crate::policy::SchedulerPolicy;
use crate::scheduler::{Scheduled, Scheduler};
use crate::{EngineConfig, EngineError, Event, Executor, Request, ScheduledBatch, StepStats};

/// What a step did.
#[derive(Debug)]
pub struct StepOutput {
    /// What happened to requests since the last step's output, in order.
    pub events: Vec<Event>,
    /// Whether a batch ran.
    pub progress: Progress,
}

/// Whether a batch ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A batch ran.
    Ran(StepStats),
    /// There is nothing to run until a request comes or goes, or until the time given.
    Idle {
        /// When to step again at the latest: a batch stops waiting for more requests.
        until: Option<Instant>,
    },
}

/// A serving engine: requests in, events out, one [`step`](Engine::step) at a time.
///
/// It spawns nothing and sleeps never; `EngineService` runs one on a thread of its own.
pub struct Engine<E: Executor> {
    executor: E,
    scheduler: Scheduler,
    policy: Box<dyn SchedulerPolicy>,
    batch: ScheduledBatch,
    steps: u64,
    failed: Option<String>,
}

impl<E: Executor> Engine<E> {
    /// An engine over `executor` with the policy that `config` names.
    ///
    /// # Errors
    /// [`EngineError::Config`] when the settings do not work with each other or with the executor.
    pub fn new(executor: E, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::with_policy(executor, config, config.scheduler.policy.build())
    }

    /// An engine with a policy from anywhere; `config.scheduler.policy` is not used.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_policy(
        mut executor: E,
        config: &EngineConfig,
        policy: Box<dyn SchedulerPolicy>,
    ) -> Result<Self, EngineError> {
        let limits = config.limits(&executor)?;
        let scheduler = Scheduler::new(limits, config.kv, executor.kv_slots(), &*policy)?;
        executor.prepare(config.kv, &mut |_, _| {})?;
        let batch = scheduler.empty_batch();
        Ok(Self { executor, scheduler, policy, batch, steps: 0, failed: None })
    }

    /// Queues a request that arrived at `arrival`. A refusal comes as [`Event::Rejected`].
    pub fn submit(&mut self, request: Request, arrival: Instant) {
        self.scheduler.submit(request, arrival);
    }

    /// Ends a request in any state; [`Event::Cancelled`] says so. An unknown or ended id is ignored.
    pub fn cancel(&mut self, id: u64) {
        self.scheduler.cancel(id);
    }

    /// Whether a request is alive or an event waits to be taken.
    pub fn has_work(&self) -> bool {
        self.scheduler.alive() > 0 || self.scheduler.has_events()
    }

    /// Requests alive: waiting or running.
    pub fn alive(&self) -> usize {
        self.scheduler.alive()
    }

    /// The events since the last output, without a step.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.scheduler.take_events()
    }

    /// The executor.
    pub fn executor(&self) -> &E {
        &self.executor
    }

    /// One turn of the loop: schedule, execute, sample, commit. `now` is the time that policies see.
    ///
    /// # Errors
    /// When the device fails or the policy's plan is invalid. The engine is then of no further use: every later step
    /// returns [`EngineError::Stopped`].
    pub fn step(&mut self, now: Instant) -> Result<StepOutput, EngineError> {
        if let Some(reason) = &self.failed {
            return Err(EngineError::Stopped(reason.clone()));
        }
        let progress = self.turn(now).inspect_err(|error| self.failed = Some(error.to_string()))?;
        Ok(StepOutput { events: self.scheduler.take_events(), progress })
    }

    fn turn(&mut self, now: Instant) -> Result<Progress, EngineError> {
        let started = Instant::now();
        let batch = match self.scheduler.schedule(&mut *self.policy, now, &mut self.batch)? {
            Scheduled::Batch(stats) => stats,
            Scheduled::Idle(until) => return Ok(Progress::Idle { until }),
        };
        let scheduled = Instant::now();
        self.executor.forward(&self.batch)?;
        let executed = Instant::now();
        let rows = &self.batch.sampling;
        let tokens = if rows.is_empty() { Vec::new() } else { self.executor.sample(rows)? };
        let sampled = Instant::now();
        self.scheduler.commit(tokens);
        let step = self.steps;
        self.steps += 1;
        Ok(Progress::Ran(StepStats {
            step,
            started,
            schedule: scheduled - started,
            execute: executed - scheduled,
            sample: sampled - executed,
            commit: sampled.elapsed(),
            batch,
        }))
    }

    /// Counts all KV slots and sequences anew, for tests: it takes time in the size of the KV memory. Steps check
    /// the sums on their own.
    ///
    /// # Panics
    /// When an invariant does not hold, with what broke.
    pub fn check_integrity(&self) {
        self.scheduler.check_integrity();
    }
}

impl<E: Executor> std::fmt::Debug for Engine<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("alive", &self.alive())
            .field("steps", &self.steps)
            .finish_non_exhaustive()
    }
}
