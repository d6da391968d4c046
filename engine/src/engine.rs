//! The loop.

use std::time::{Duration, Instant};

use crate::policy::SchedulerPolicy;
use crate::scheduler::{Scheduled, Scheduler, Verified};
use crate::speculation::{Acceptance, DraftTarget, Drafter, Speculator};
use crate::stats::BatchStats;
use crate::{
    EngineConfig, EngineError, Event, Executor, PreemptionConfig, Request, ScheduledBatch, StepStats,
};

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
    /// A batch was begun and its tokens come with a later step.
    Began,
    /// There is nothing to run until a request comes or goes, or until the time given.
    Idle {
        /// When to step again at the latest: a batch stops waiting for more requests.
        until: Option<Instant>,
    },
}

/// Parts of an engine from outside this crate, in the place of those that its configuration names.
#[derive(Default)]
pub struct EngineParts {
    /// The rule that decides what runs.
    pub policy: Option<Box<dyn SchedulerPolicy>>,
    /// What proposes tokens, where `speculation.drafter` says `model` or `external`.
    pub drafter: Option<Box<dyn Drafter>>,
}

/// A serving engine: requests in, events out, one [`step`](Engine::step) at a time.
///
/// It spawns nothing and sleeps never; `EngineService` runs one on a thread of its own.
pub struct Engine<E: Executor> {
    executor: E,
    scheduler: Scheduler,
    policy: Box<dyn SchedulerPolicy>,
    batch: ScheduledBatch,
    /// Proposes tokens, where there is speculation.
    speculator: Option<Speculator>,
    /// Whether a step begins while the one before it runs.
    overlap: bool,
    /// The step that was begun and not collected.
    flight: Option<Flight>,
    /// Times since the last step that landed; only while one is under way.
    unreported: Option<Times>,
    steps: u64,
    failed: Option<String>,
}

/// A step under way.
#[derive(Debug, Clone, Copy)]
struct Flight {
    step: u64,
    batch: BatchStats,
}

/// Times that the next step to land reports, and since when they count.
#[derive(Debug, Clone, Copy)]
struct Times {
    started: Instant,
    schedule: Duration,
    execute: Duration,
    sample: Duration,
    commit: Duration,
}

impl Times {
    fn now() -> Self {
        let none = Duration::ZERO;
        Self { started: Instant::now(), schedule: none, execute: none, sample: none, commit: none }
    }
}

/// Adds the time since `lap` to `to`, and starts the next lap.
fn lap(lap: &mut Instant, to: &mut Duration) {
    let now = Instant::now();
    *to += now - *lap;
    *lap = now;
}

impl<E: Executor> Engine<E> {
    /// An engine over `executor` with the policy that `config` names.
    ///
    /// # Errors
    /// [`EngineError::Config`] when the settings do not work with each other or with the executor.
    pub fn new(executor: E, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::with_parts(executor, config, EngineParts::default())
    }

    /// An engine with a policy from anywhere; `config.scheduler.policy` is not used.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_policy(
        executor: E,
        config: &EngineConfig,
        policy: Box<dyn SchedulerPolicy>,
    ) -> Result<Self, EngineError> {
        Self::with_parts(executor, config, EngineParts { policy: Some(policy), drafter: None })
    }

    /// An engine with parts from outside this crate.
    ///
    /// # Errors
    /// As [`Engine::new`], and when a part does not go with the rest.
    pub fn with_parts(
        mut executor: E,
        config: &EngineConfig,
        parts: EngineParts,
    ) -> Result<Self, EngineError> {
        let limits = config.limits(&executor)?;
        let policy = parts.policy.map_or_else(|| config.scheduler.policy.build(), Ok)?;
        let target = DraftTarget {
            executor: &executor,
            layout: config.kv,
            sequences: limits.max_running.min(limits.token_budget),
            max_model_len: limits.max_model_len,
            token_budget: limits.token_budget,
        };
        let (speculator, acceptance) = match (&config.speculation, parts.drafter) {
            (Some(speculation), given) => {
                let mut drafter = speculation.build(given)?;
                drafter.prepare(target)?;
                (Some(Speculator::new(drafter, speculation.length)), speculation.acceptance())
            }
            (None, Some(_)) => {
                let what = "a drafter was given, and the configuration has no speculation";
                return Err(EngineError::Config(what.into()));
            }
            (None, None) => (None, Acceptance::Sampled),
        };
        let host_slots = match config.preemption {
            PreemptionConfig::Recompute {} => 0,
            PreemptionConfig::Swap { bytes } => executor.reserve_host(bytes)?,
        };
        let slots = [executor.kv_slots(), host_slots];
        let scheduler = Scheduler::new(limits, config, acceptance, slots, &*policy)?;
        executor.prepare(config.kv, &mut |_, _| {})?;
        let batch = scheduler.empty_batch();
        // What is proposed depends on what is known.
        let overlap =
            speculator.is_none() && config.scheduler.overlap.unwrap_or_else(|| executor.runs_beside_host());
        Ok(Self {
            executor,
            scheduler,
            policy,
            batch,
            speculator,
            overlap,
            flight: None,
            unreported: None,
            steps: 0,
            failed: None,
        })
    }

    /// Queues a request that arrived at `arrival`. A refusal comes as [`Event::Rejected`].
    pub fn submit(&mut self, request: Request, arrival: Instant) {
        self.scheduler.submit(request, arrival);
    }

    /// Ends a request in any state; [`Event::Cancelled`] says so. An unknown or ended id is ignored.
    pub fn cancel(&mut self, id: u64) {
        self.scheduler.cancel(id);
    }

    /// Whether a request is alive, a step is under way or an event waits to be taken.
    pub fn has_work(&self) -> bool {
        self.scheduler.alive() > 0 || self.flight.is_some() || self.scheduler.has_events()
    }

    /// Requests alive: waiting, running, or with only their last token to come.
    pub fn alive(&self) -> usize {
        self.scheduler.alive()
    }

    /// The events since the last output, without a step.
    pub fn take_events(&mut self) -> Vec<Event> {
        let events = self.scheduler.take_events();
        if let Some(speculator) = &mut self.speculator {
            for event in &events {
                if let Event::Finished { id, .. } | Event::Cancelled { id } = event {
                    speculator.forget(*id);
                }
            }
        }
        events
    }

    /// The executor.
    pub fn executor(&self) -> &E {
        &self.executor
    }

    /// The executor, for another engine. What is alive here ends.
    pub fn into_executor(self) -> E {
        self.executor
    }

    /// One turn of the loop: schedule, execute, sample, commit. `now` is the time that policies see. Where steps overlap,
    /// what is sampled and committed is the step before the one that is scheduled and executed.
    ///
    /// # Errors
    /// When the device fails or the policy's plan is invalid. The engine is then of no further use: every later step
    /// returns [`EngineError::Stopped`].
    pub fn step(&mut self, now: Instant) -> Result<StepOutput, EngineError> {
        if let Some(reason) = &self.failed {
            return Err(EngineError::Stopped(reason.clone()));
        }
        let progress = self.turn(now).inspect_err(|error| self.failed = Some(error.to_string()))?;
        Ok(StepOutput { events: self.take_events(), progress })
    }

    fn turn(&mut self, now: Instant) -> Result<Progress, EngineError> {
        let mut times = self.unreported.take().unwrap_or_else(Times::now);
        let mut clock = Instant::now();
        if self.scheduler.must_settle()
            && let Some(flight) = self.flight.take()
        {
            return Ok(Progress::Ran(self.land(flight, times)?));
        }
        if let Some(speculator) = &mut self.speculator {
            self.scheduler.propose(speculator);
        }
        let scheduled = self.scheduler.schedule(&mut *self.policy, now, &mut self.batch)?;
        let copies = self.scheduler.take_copies();
        if !copies.is_empty() {
            self.executor.copy_kv(&copies)?;
        }
        lap(&mut clock, &mut times.schedule);
        let (idle_until, next) = match scheduled {
            Scheduled::Idle(until) => (until, None),
            Scheduled::Batch(batch) => {
                self.complete_drafts()?;
                self.executor.forward(&self.batch)?;
                lap(&mut clock, &mut times.execute);
                self.executor.sample(&self.batch.sampling)?;
                lap(&mut clock, &mut times.sample);
                let step = self.steps;
                self.steps += 1;
                (None, Some(Flight { step, batch }))
            }
        };
        let landed = match self.flight.take() {
            Some(flight) => Some(self.land(flight, std::mem::replace(&mut times, Times::now()))?),
            None => None,
        };
        if let Some(flight) = next {
            clock = Instant::now();
            self.scheduler.advance();
            lap(&mut clock, &mut times.commit);
            if !self.overlap {
                return Ok(Progress::Ran(self.land(flight, times)?));
            }
            self.flight = Some(flight);
            self.unreported = Some(times);
        }
        Ok(match (landed, next) {
            (Some(stats), _) => Progress::Ran(stats),
            (None, Some(_)) => Progress::Began,
            (None, None) => Progress::Idle { until: idle_until },
        })
    }

    /// Puts the proposals of drafters that need a device into the batch.
    fn complete_drafts(&mut self) -> Result<(), EngineError> {
        let Some(speculator) = &mut self.speculator else { return Ok(()) };
        speculator.complete(&mut self.executor, &mut self.batch)?;
        self.scheduler.take_drafts(&self.batch)
    }

    /// Waits for a step's tokens and hands them to the sequences.
    fn land(&mut self, flight: Flight, mut times: Times) -> Result<StepStats, EngineError> {
        let mut clock = Instant::now();
        let tokens = self.executor.collect()?;
        lap(&mut clock, &mut times.sample);
        let Verified { accepted, refused } = self.scheduler.settle(tokens);
        lap(&mut clock, &mut times.commit);
        let Flight { step, mut batch } = flight;
        (batch.accepted_tokens, batch.refused_drafts) = (accepted, refused);
        let Times { started, schedule, execute, sample, commit } = times;
        let stats = StepStats { step, started, schedule, execute, sample, commit, batch };
        if let Some(speculator) = &mut self.speculator {
            speculator.observe(&stats);
        }
        Ok(stats)
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
