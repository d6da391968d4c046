//! An engine on a thread of its own.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::{Engine, EngineError, Event, Executor, Progress, Request, StepOutput, StepStats};

/// Commands under way to the engine, at most.
const COMMANDS: usize = 1024;
/// Steps whose events are under way from the engine, at most; the engine waits for a client that is slower.
const STEPS: usize = 1024;
/// Step statistics kept for [`EngineService::take_steps`], at most; the oldest go first.
const KEPT_STEPS: usize = 1 << 18;
/// How long a submission to a full queue waits before it looks for events again.
const FULL_WAIT: Duration = Duration::from_millis(1);

/// An event and when it was emitted.
#[derive(Debug, Clone, PartialEq)]
pub struct TimedEvent {
    /// When the engine emitted it: at the end of its step.
    pub at: Instant,
    /// What.
    pub event: Event,
}

enum Command {
    Submit(Request, Instant),
    Cancel(u64),
}

/// What the thread sends after a step.
struct Message {
    at: Instant,
    events: Vec<Event>,
    stats: Option<StepStats>,
}

/// A handle on an engine that runs on its own thread. The thread steps while there is work and blocks while there is
/// none. Dropping the handle ends it after the step under way.
///
/// Both channels are bounded. A submission that finds its channel full takes events in while it waits, so a client
/// on one thread cannot come to stand against the engine.
#[derive(Debug)]
pub struct EngineService {
    channels: Option<(SyncSender<Command>, Receiver<Message>)>,
    thread: Option<JoinHandle<Result<(), EngineError>>>,
    events: VecDeque<TimedEvent>,
    steps: VecDeque<StepStats>,
    dropped_steps: u64,
    stopped: Option<String>,
}

impl EngineService {
    /// Moves `engine` to a thread.
    ///
    /// # Errors
    /// [`EngineError::Stopped`] when the system gives no thread.
    pub fn spawn<E: Executor + 'static>(engine: Engine<E>) -> Result<Self, EngineError> {
        let (command_sender, commands) = sync_channel(COMMANDS);
        let (messages, message_receiver) = sync_channel(STEPS);
        let thread = std::thread::Builder::new()
            .name("quire-engine".into())
            .spawn(move || run(engine, &commands, &messages))
            .map_err(|error| EngineError::Stopped(format!("its thread cannot be started: {error}")))?;
        Ok(Self {
            channels: Some((command_sender, message_receiver)),
            thread: Some(thread),
            events: VecDeque::new(),
            steps: VecDeque::new(),
            dropped_steps: 0,
            stopped: None,
        })
    }

    /// Hands over a request; its arrival is now. A refusal comes as [`Event::Rejected`].
    ///
    /// # Errors
    /// [`EngineError::Stopped`] when the engine is gone.
    pub fn submit(&mut self, request: Request) -> Result<(), EngineError> {
        self.send(Command::Submit(request, Instant::now()))
    }

    /// Asks to end a request. An unknown or ended id is ignored.
    ///
    /// # Errors
    /// [`EngineError::Stopped`] when the engine is gone.
    pub fn cancel(&mut self, id: u64) -> Result<(), EngineError> {
        self.send(Command::Cancel(id))
    }

    /// The next event, waiting for it until `until`; `None` when that time came first.
    ///
    /// # Errors
    /// [`EngineError::Stopped`] when the engine is gone and all its events were taken.
    pub fn next_event(&mut self, until: Instant) -> Result<Option<TimedEvent>, EngineError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let Some((_, messages)) = &self.channels else { return Err(self.stop()) };
            match messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(self.stop()),
            }
        }
    }

    /// Statistics of the steps since the last call. Those of many steps are kept, not of all: see
    /// [`EngineService::dropped_steps`].
    pub fn take_steps(&mut self) -> Vec<StepStats> {
        self.receive_all();
        self.steps.drain(..).collect()
    }

    /// Steps whose statistics were dropped because nobody took them.
    pub fn dropped_steps(&self) -> u64 {
        self.dropped_steps
    }

    fn send(&mut self, mut command: Command) -> Result<(), EngineError> {
        loop {
            let Some((commands, messages)) = &self.channels else { return Err(self.stop()) };
            match commands.try_send(command) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => {
                    self.receive_all();
                    return Err(self.stop());
                }
                Err(TrySendError::Full(unsent)) => command = unsent,
            }
            if let Ok(message) = messages.recv_timeout(FULL_WAIT) {
                self.take(message);
            }
        }
    }

    /// Takes in what has arrived.
    fn receive_all(&mut self) {
        while let Some(message) = self.channels.as_ref().and_then(|(_, messages)| messages.try_recv().ok()) {
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        let at = message.at;
        self.events.extend(message.events.into_iter().map(|event| TimedEvent { at, event }));
        if let Some(stats) = message.stats {
            if self.steps.len() == KEPT_STEPS {
                self.steps.pop_front();
                self.dropped_steps += 1;
            }
            self.steps.push_back(stats);
        }
    }

    /// Waits for the thread, whose channels are closed, and says why it ended.
    fn stop(&mut self) -> EngineError {
        self.channels = None;
        if let Some(thread) = self.thread.take() {
            self.stopped = Some(match thread.join() {
                Ok(Ok(())) => "it was shut down".into(),
                Ok(Err(error)) => error.to_string(),
                Err(panic) => panic_text(&*panic),
            });
        }
        EngineError::Stopped(self.stopped.clone().unwrap_or_else(|| "it was shut down".into()))
    }
}

impl Drop for EngineService {
    fn drop(&mut self) {
        // Closing the channels ends the thread, whether it waits for commands, steps or waits to send.
        self.stop();
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.as_deref().unwrap_or("without a message"))
}

/// The thread: until the handle is gone, or the engine fails.
fn run<E: Executor>(
    mut engine: Engine<E>,
    commands: &Receiver<Command>,
    messages: &SyncSender<Message>,
) -> Result<(), EngineError> {
    loop {
        // What runs goes on however fast commands come.
        for _ in 0..COMMANDS {
            match commands.try_recv() {
                Ok(command) => apply(&mut engine, command),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        // Refusals need not wait for a step to end.
        let events = engine.take_events();
        if !events.is_empty() && messages.send(Message { at: Instant::now(), events, stats: None }).is_err() {
            return Ok(());
        }
        let step = engine.step(Instant::now());
        let Ok(StepOutput { events, progress }) = step else {
            // What was known before it failed is told; nobody may be there to hear it.
            let _ = messages.send(Message { at: Instant::now(), events: engine.take_events(), stats: None });
            return step.map(drop);
        };
        let (stats, idle) = match progress {
            Progress::Ran(stats) => (Some(stats), None),
            Progress::Began => (None, None),
            Progress::Idle { until } => (None, Some(until)),
        };
        if (stats.is_some() || !events.is_empty())
            && messages.send(Message { at: Instant::now(), events, stats }).is_err()
        {
            return Ok(());
        }
        let Some(until) = idle else { continue };
        let command = match until {
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => commands.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        match command {
            Ok(command) => apply(&mut engine, command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

fn apply<E: Executor>(engine: &mut Engine<E>, command: Command) {
    match command {
        Command::Submit(request, arrival) => engine.submit(request, arrival),
        Command::Cancel(id) => engine.cancel(id),
    }
}
