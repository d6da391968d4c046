//! The load generator's side: requests go to a thread that talks to the server, events come back.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_workloads::{
    Clock, EventKind, GenerationRequest, ServingSystem, SystemError, TokenEvent, WallClock,
};
use tokio::runtime::Builder;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::OpenAiOptions;
use super::address::Address;
use super::connections::Connections;
use super::exchange::Client;

const NAME: &str = "openai";

/// Commands and events that may lie between the thread and its user.
const CAPACITY: usize = 16_384;

enum Command {
    Submit(GenerationRequest),
    Cancel(u64),
}

/// An OpenAI-compatible server behind `ServingSystem`; see the [module](super). What it is at ends with this value: its
/// connections are closed.
///
/// It has no steps to tell of: what runs and waits at the server is not known here.
#[derive(Debug)]
pub struct OpenAiServer {
    clock: WallClock,
    commands: Option<mpsc::Sender<Command>>,
    events: Option<Receiver<TokenEvent>>,
    /// Events that need no server.
    own: VecDeque<TokenEvent>,
    thread: Option<JoinHandle<()>>,
}

impl OpenAiServer {
    /// Looks the server up, finds out whether it answers, and starts the thread that talks to it. Events are timed by
    /// `clock`.
    ///
    /// # Errors
    /// When the options cannot work or nothing answers at the URL.
    pub fn start(options: OpenAiOptions, clock: WallClock) -> Result<Self, SystemError> {
        options.check().map_err(start_error)?;
        let address = Address::parse(&options.url).map_err(start_error)?;
        let reached = address.reach(options.connect_timeout).map_err(start_error)?;
        let (commands, inbox) = mpsc::channel(CAPACITY);
        let (outbox, events) = sync_channel(CAPACITY);
        let client = Client {
            connections: Connections::new(reached, options.connect_timeout),
            permits: Semaphore::new(options.max_connections),
            options,
            address,
            clock,
            events: outbox,
        };
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| start_error(error.to_string()))?;
        let talk = move || runtime.block_on(talk(Arc::new(client), inbox));
        let thread = std::thread::Builder::new().name("openai".into()).spawn(talk);
        let thread = thread.map_err(|error| start_error(error.to_string()))?;
        Ok(Self {
            clock,
            commands: Some(commands),
            events: Some(events),
            own: VecDeque::new(),
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) -> Result<(), SystemError> {
        let Some(commands) = &self.commands else { return Err(stopped("it is closed")) };
        commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => stopped("the thread that talks to it takes no more requests"),
            TrySendError::Closed(_) => stopped("the thread that talks to it has ended"),
        })
    }
}

impl ServingSystem for OpenAiServer {
    fn name(&self) -> &str {
        NAME
    }

    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        let refused = if !request.decoding.is_single() {
            Some("one output of a prompt is all that is asked of a server here")
        } else if request.max_tokens == 0 || request.true_output_len == Some(0) {
            Some("no output token is wanted")
        } else {
            None
        };
        if let Some(reason) = refused {
            let kind = EventKind::Rejected { reason: reason.into() };
            self.own.push_back(TokenEvent { request: request.id, at: self.clock.now(), kind });
            return Ok(());
        }
        self.send(Command::Submit(request))
    }

    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        self.send(Command::Cancel(request))
    }

    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        if let Some(event) = self.own.pop_front() {
            return Ok(Some(event));
        }
        let Some(events) = &self.events else { return Err(stopped("it is closed")) };
        match events.recv_timeout(until.saturating_sub(self.clock.now())) {
            Ok(event) => Ok(Some(event)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(stopped("the thread that talks to it has ended")),
        }
    }
}

impl Drop for OpenAiServer {
    fn drop(&mut self) {
        // Both channels first, so that the thread neither waits for us nor goes on.
        self.events = None;
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // How it ended interests nobody any more.
            let _ = thread.join();
        }
    }
}

/// Serves requests until the other end of `commands` is dropped; then what is under way is dropped too.
async fn talk(client: Arc<Client>, mut commands: mpsc::Receiver<Command>) {
    let most = client.options.max_connections + client.options.max_waiting;
    let mut tasks = JoinSet::new();
    // By request, with a number that no other has: a request that has ended may come again, as it does after a warm-up,
    // while the old one's connection is still being read to its end.
    let mut live: HashMap<u64, (u64, oneshot::Sender<()>)> = HashMap::new();
    for number in 0.. {
        tokio::select! {
            command = commands.recv() => match command {
                None => return,
                Some(Command::Submit(request)) if live.len() >= most => {
                    let reason = format!("{most} requests are at the server or wait for a connection to it");
                    let kind = EventKind::Rejected { reason };
                    // Nobody listens any more, and the commands end next.
                    let _ = client.events.send(TokenEvent { request: request.id, at: client.clock.now(), kind });
                }
                Some(Command::Submit(request)) => {
                    let (cancel, cancelled) = oneshot::channel();
                    let (id, client) = (request.id, Arc::clone(&client));
                    live.insert(id, (number, cancel));
                    tasks.spawn(async move {
                        client.serve(request, cancelled).await;
                        (id, number)
                    });
                }
                Some(Command::Cancel(id)) => {
                    if let Some((_, cancel)) = live.remove(&id) {
                        // It has ended by itself meanwhile, if nobody hears this.
                        let _ = cancel.send(());
                    }
                }
            },
            Some(ended) = tasks.join_next() => match ended {
                Ok((id, number)) => {
                    if live.get(&id).is_some_and(|(known, _)| *known == number) {
                        live.remove(&id);
                    }
                }
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
        }
    }
}

fn start_error(reason: String) -> SystemError {
    SystemError::Start { system: NAME.into(), reason }
}

fn stopped(reason: &str) -> SystemError {
    SystemError::Stopped { system: NAME.into(), reason: reason.into() }
}
