//! The client's side of the child process.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_workloads::{
    Clock, EventKind, GenerationRequest, ServingSystem, StepRecord, SystemError, TokenEvent, WallClock,
};

use super::child::Process;
use super::link::{Heard, Link};
use super::protocol::{Command, Hello, PROTOCOL, Reply};
use super::{INSTALL, TransformersOptions};

const NAME: &str = "transformers";

/// Transformers behind `ServingSystem`; see the [module](super). The child ends when this value is dropped.
///
/// Tokens come as they are computed. In static batches, as with the naive server, `Finished` and a running request's
/// cancellation come when the batch is over; in continuous ones at once.
pub struct TransformersServer {
    clock: WallClock,
    commands: Option<SyncSender<Command>>,
    replies: Option<Receiver<Heard>>,
    threads: Vec<JoinHandle<()>>,
    process: Option<Process>,
    versions: BTreeMap<String, String>,
    /// Requests that have not ended, and how many tokens each may still get.
    live: HashMap<u64, u32>,
    events: VecDeque<TokenEvent>,
    steps: Vec<StepRecord>,
    /// Why it stopped, once it did.
    stopped: Option<String>,
}

impl TransformersServer {
    /// Starts the child and waits until its model is loaded. Events are timed by `clock`.
    ///
    /// # Errors
    /// When Python or its packages are missing (the error says what to install), the options cannot work, or the
    /// model cannot be loaded.
    pub fn start(options: &TransformersOptions, clock: WallClock) -> Result<Self, SystemError> {
        let (process, output, input) = Process::python(&options.python).map_err(start_error)?;
        Self::connect(output, input, Some(process), options, clock)
    }

    /// Speaks the protocol over a pair of streams; `process` is behind them, if it is one.
    pub(super) fn connect(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        process: Option<Process>,
        options: &TransformersOptions,
        clock: WallClock,
    ) -> Result<Self, SystemError> {
        let hello = Hello::new(options).map_err(|e| start_error(e.to_string()))?;
        let link = Link::open(reader, writer, clock).map_err(|e| start_error(e.to_string()))?;
        let mut server = Self {
            clock,
            commands: Some(link.commands),
            replies: Some(link.replies),
            threads: link.threads,
            process,
            versions: BTreeMap::new(),
            live: HashMap::new(),
            events: VecDeque::new(),
            steps: Vec::new(),
            stopped: None,
        };
        server.greet(hello, options.start_timeout).map_err(start_error)?;
        Ok(server)
    }

    /// Versions of Python and of its packages, for the record of a run.
    pub fn versions(&self) -> &BTreeMap<String, String> {
        &self.versions
    }

    fn greet(&mut self, hello: Hello, patience: Duration) -> Result<(), String> {
        self.send(Command::Hello(hello))?;
        match self.hear(patience)? {
            Some((_, Reply::Ready { protocol: PROTOCOL, versions, .. })) => {
                self.versions = versions;
                self.send(Command::Clock { now_s: self.clock.now().as_secs_f64() })
            }
            Some((_, Reply::Ready { protocol, .. })) => {
                Err(format!("it speaks protocol {protocol}, expected {PROTOCOL}"))
            }
            Some((_, Reply::Missing { packages })) => {
                let words = self.last_words();
                Err(format!("Python cannot import {}: {INSTALL}\n{words}", packages.join(" and ")))
            }
            Some((_, Reply::StartFailed { reason })) => Err(format!("{reason}\n{}", self.last_words())),
            Some((_, other)) => Err(format!("it answered hello with {other:?}")),
            None => Err(format!("it was not ready after {} s; {}", patience.as_secs(), self.last_words())),
        }
    }

    fn last_words(&mut self) -> String {
        self.process.as_mut().map(Process::last_words).unwrap_or_default()
    }

    fn send(&self, command: Command) -> Result<(), String> {
        let Some(commands) = &self.commands else { return Err("it is closed".into()) };
        commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => "it does not read its input".into(),
            TrySendError::Disconnected(_) => "its input is closed".into(),
        })
    }

    /// The next line, or `None` when the time is over.
    fn hear(&mut self, patience: Duration) -> Result<Option<(Duration, Reply)>, String> {
        let Some(replies) = &self.replies else { return Err("it is closed".into()) };
        let reason = match replies.recv_timeout(patience) {
            Ok(Ok(reply)) => return Ok(Some(reply)),
            Err(RecvTimeoutError::Timeout) => return Ok(None),
            Ok(Err(reason)) => reason,
            Err(RecvTimeoutError::Disconnected) => "its output ended".into(),
        };
        Err(format!("{reason}; {}", self.last_words()))
    }

    /// Remembers why it stopped: later calls say the same.
    fn stop(&mut self, reason: String) -> SystemError {
        let reason = self.stopped.get_or_insert(reason).clone();
        SystemError::Stopped { system: NAME.into(), reason }
    }

    /// Turns a line into events; what does not fit the requests that live is an error.
    fn accept(&mut self, at: Duration, reply: Reply) -> Result<(), String> {
        match reply {
            Reply::Tokens { tokens } => {
                for (id, token) in tokens {
                    match self.live.get_mut(&id) {
                        Some(left @ 1..) => *left -= 1,
                        Some(_) => return Err(format!("it sent request {id} more tokens than it wants")),
                        None => return Err(format!("it sent a token to request {id}, which does not run")),
                    }
                    self.events.push_back(TokenEvent {
                        request: id,
                        at,
                        kind: EventKind::Tokens(vec![token]),
                    });
                }
                Ok(())
            }
            Reply::Finished { id, reason, preemptions } => {
                self.end(at, id, EventKind::Finished { reason, preemptions, cached_tokens: 0 })
            }
            Reply::Rejected { id, reason } => self.end(at, id, EventKind::Rejected { reason }),
            Reply::Cancelled { id } => self.end(at, id, EventKind::Cancelled),
            Reply::Step(step) => {
                self.steps.push(step.into());
                Ok(())
            }
            other => Err(format!("it sent {other:?} after it was ready")),
        }
    }

    fn end(&mut self, at: Duration, id: u64, kind: EventKind) -> Result<(), String> {
        if self.live.remove(&id).is_none() {
            return Err(format!("it ended request {id}, which does not run"));
        }
        self.events.push_back(TokenEvent { request: id, at, kind });
        Ok(())
    }
}

impl ServingSystem for TransformersServer {
    fn name(&self) -> &str {
        NAME
    }

    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        // It has no classes.
        let GenerationRequest { id, prompt, max_tokens, true_output_len: end, class: _, decoding } = request;
        if !decoding.is_single() {
            let reason = "one output of a prompt is all that is asked of Transformers here".into();
            let kind = EventKind::Rejected { reason };
            self.events.push_back(TokenEvent { request: id, at: self.clock.now(), kind });
            return Ok(());
        }
        self.live.insert(id, max_tokens);
        self.send(Command::Submit { id, prompt, max_tokens, end }).map_err(|reason| self.stop(reason))
    }

    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        if !self.live.contains_key(&request) {
            return Ok(());
        }
        self.send(Command::Cancel { id: request }).map_err(|reason| self.stop(reason))
    }

    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if let Some(reason) = self.stopped.clone() {
                return Err(self.stop(reason));
            }
            let patience = until.saturating_sub(self.clock.now());
            let heard = self.hear(patience);
            match heard.and_then(|heard| heard.map(|(at, reply)| self.accept(at, reply)).transpose()) {
                Ok(Some(())) => {}
                Ok(None) => return Ok(None),
                Err(reason) => {
                    self.stop(reason);
                }
            }
        }
    }

    fn take_steps(&mut self) -> Vec<StepRecord> {
        std::mem::take(&mut self.steps)
    }
}

impl Drop for TransformersServer {
    fn drop(&mut self) {
        // Both channels first, so that no thread waits on us; the writer then closes the child's input.
        self.commands = None;
        self.replies = None;
        self.process = None;
        for thread in self.threads.drain(..) {
            // How it ended interests nobody any more.
            let _ = thread.join();
        }
    }
}

fn start_error(reason: String) -> SystemError {
    SystemError::Start { system: NAME.into(), reason }
}
