//! The client's side of the naive server.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_workloads::{
    Clock, EventKind, GenerationRequest, ServingSystem, StepRecord, SystemError, TokenEvent, WallClock,
};

use super::NaiveModel;
use super::queue::{Limits, Queue};
use super::worker::{Command, Steps, Worker};
use crate::BaselineError;

const NAME: &str = "naive";

/// Events that may lie between the server and a client that does not fetch them; then the server waits.
const EVENT_CAPACITY: usize = 16_384;

/// How the naive server runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NaiveOptions {
    /// Threads that compute; the [module](super#threads) says what candle does besides.
    pub threads: usize,
    /// Requests in a batch.
    pub batch_size: usize,
    /// How long the oldest request waits for a batch to fill.
    pub batch_timeout: Duration,
    /// The longest sequence, prompt and output; `None` for what the model was made for.
    pub max_model_len: Option<usize>,
    /// Memory for KV in bytes (f32: [`NaiveConfig::kv_bytes_per_token`](super::NaiveConfig::kv_bytes_per_token)
    /// each); `None` for no limit.
    ///
    /// A batch cannot be made smaller once it runs, so the server takes only as many requests as fit in the worst
    /// case: rows x (longest prompt + longest output limit among them), every row as wide as the widest because
    /// they are one tensor. A request that alone does not fit is rejected. Not counted is what concatenation
    /// needs for the moment (the old and the new tensor of one layer) and the copies of `repeat_kv`.
    pub kv_bytes: Option<u64>,
    /// Requests and cancellations that may lie unread between client and server; one more is rejected.
    pub queue_capacity: usize,
    /// Whether to keep a [`StepRecord`] a pass; they pile up until taken.
    pub record_steps: bool,
}

impl Default for NaiveOptions {
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            batch_size: 8,
            batch_timeout: Duration::from_millis(100),
            max_model_len: None,
            kv_bytes: None,
            queue_capacity: 16_384,
            record_steps: true,
        }
    }
}

/// A [`NaiveModel`] behind `ServingSystem`: first come first served, static batches.
///
/// Tokens are sent in the pass that computes them; a request is `Finished` when its batch is. A cancelled request
/// that waits is `Cancelled` at once; one that runs gets no further token, stays in the batch as padding, and is
/// `Cancelled` when the batch ends. The model's thread ends when this value is dropped, after the pass it is in.
pub struct NaiveServer {
    clock: WallClock,
    commands: Option<SyncSender<Command>>,
    events: Option<Receiver<TokenEvent>>,
    /// Refusals made on this side, and cancellations that found the channel full.
    refused: VecDeque<TokenEvent>,
    postponed: VecDeque<u64>,
    steps: Option<Steps>,
    thread: Option<JoinHandle<Result<(), BaselineError>>>,
    stopped: String,
}

impl NaiveServer {
    /// Starts the model's thread. Events are timed by `clock`. An `Arc` lets several servers, one after the other,
    /// use one model.
    ///
    /// # Errors
    /// When the options cannot work or threads cannot be had.
    pub fn start(
        model: impl Into<Arc<NaiveModel>>,
        options: &NaiveOptions,
        clock: WallClock,
    ) -> Result<Self, SystemError> {
        Self::launch(model.into(), options, clock)
            .map_err(|e| SystemError::Start { system: NAME.into(), reason: e.to_string() })
    }

    fn launch(
        model: Arc<NaiveModel>,
        options: &NaiveOptions,
        clock: WallClock,
    ) -> Result<Self, BaselineError> {
        let limits = limits(&model, options)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("naive-{i}"))
            .build()
            .map_err(|e| BaselineError::Threads(e.to_string()))?;
        let (commands, inbox) = sync_channel(options.queue_capacity);
        let (outbox, events) = sync_channel(EVENT_CAPACITY);
        let steps: Option<Steps> = options.record_steps.then(|| Arc::new(Mutex::new(Vec::new())));
        let worker = Worker {
            model,
            queue: Queue::new(limits),
            clock,
            commands: inbox,
            events: outbox,
            steps: steps.clone(),
            kv_slots: limits.kv_slots,
        };
        let thread = std::thread::Builder::new()
            .name(NAME.into())
            .spawn(move || pool.install(|| worker.run()))
            .map_err(|e| BaselineError::Threads(e.to_string()))?;
        Ok(Self {
            clock,
            commands: Some(commands),
            events: Some(events),
            refused: VecDeque::new(),
            postponed: VecDeque::new(),
            steps,
            thread: Some(thread),
            stopped: String::new(),
        })
    }

    /// Why the thread is gone; asks it the first time.
    fn stopped(&mut self) -> SystemError {
        if let Some(thread) = self.thread.take() {
            self.stopped = match thread.join() {
                Ok(Ok(())) => "its thread ended".into(),
                Ok(Err(error)) => error.to_string(),
                Err(panic) => panic_message(panic.as_ref()),
            };
        }
        SystemError::Stopped { system: NAME.into(), reason: self.stopped.clone() }
    }

    fn try_send(&self, command: Command) -> Result<(), TrySendError<Command>> {
        match &self.commands {
            Some(commands) => commands.try_send(command),
            None => Err(TrySendError::Disconnected(command)),
        }
    }

    /// Sends cancellations that found no room before.
    fn send_postponed(&mut self) -> Result<(), SystemError> {
        while let Some(id) = self.postponed.front() {
            match self.try_send(Command::Cancel(*id)) {
                Ok(()) => self.postponed.pop_front(),
                Err(TrySendError::Full(_)) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(self.stopped()),
            };
        }
        Ok(())
    }
}

impl ServingSystem for NaiveServer {
    fn name(&self) -> &str {
        NAME
    }

    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        self.send_postponed()?;
        match self.try_send(Command::Submit(request)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(Command::Submit(GenerationRequest { id, .. }))) => {
                let kind = EventKind::Rejected { reason: "the server's queue is full".into() };
                self.refused.push_back(TokenEvent { request: id, at: self.clock.now(), kind });
                Ok(())
            }
            Err(_) => Err(self.stopped()),
        }
    }

    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        self.postponed.push_back(request);
        self.send_postponed()
    }

    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        if let Some(event) = self.refused.pop_front() {
            return Ok(Some(event));
        }
        // A stopped thread is reported once its last events are fetched, so not from here.
        let _ = self.send_postponed();
        let Some(events) = &self.events else { return Err(self.stopped()) };
        let patience = until.saturating_sub(self.clock.now());
        let received = if patience.is_zero() {
            events.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        } else {
            events.recv_timeout(patience)
        };
        match received {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.stopped()),
        }
    }

    fn take_steps(&mut self) -> Vec<StepRecord> {
        let Some(steps) = &self.steps else { return Vec::new() };
        std::mem::take(&mut *steps.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for NaiveServer {
    fn drop(&mut self) {
        // Both ends first: the thread may wait on either.
        self.commands = None;
        self.events = None;
        if let Some(thread) = self.thread.take() {
            // How it ended interests nobody any more.
            let _ = thread.join();
        }
    }
}

fn limits(model: &NaiveModel, options: &NaiveOptions) -> Result<Limits, BaselineError> {
    let positive = [
        ("threads", options.threads),
        ("batch_size", options.batch_size),
        ("queue_capacity", options.queue_capacity),
    ];
    if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
        return Err(BaselineError::Options(format!("{name} is 0")));
    }
    let config = model.config();
    let made_for = config.max_position_embeddings;
    let max_model_len = options.max_model_len.unwrap_or(made_for);
    if max_model_len < 2 || max_model_len > made_for {
        return Err(BaselineError::Options(format!(
            "max_model_len {max_model_len} is not within 2 and the model's {made_for}"
        )));
    }
    let kv_slots = options.kv_bytes.map(|bytes| bytes / config.kv_bytes_per_token());
    if kv_slots == Some(0) {
        return Err(BaselineError::Options("kv_bytes does not hold one token".into()));
    }
    Ok(Limits {
        vocab_size: config.vocab_size,
        max_model_len,
        batch_size: options.batch_size,
        batch_timeout: options.batch_timeout,
        kv_slots,
    })
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("its thread panicked: {}", text.unwrap_or("without a message"))
}
