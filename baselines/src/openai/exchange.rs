//! One request, from waiting for a connection to its end.

use std::sync::mpsc::SyncSender;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, LOCATION};
use hyper::{Method, Request, Response};
use quire_workloads::{Clock, EventKind, GenerationRequest, TokenEvent, WallClock};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};
use tokio::time::timeout;

use super::OpenAiOptions;
use super::address::Address;
use super::answer::{Answer, Ending};
use super::connections::{Connection, Connections, SILENT, why};
use super::protocol::{Body, DONE, message, parse, shown};
use super::sse::Events;

/// Bytes of an answer that is no stream which are read: enough for a message.
const MESSAGE: usize = 64 << 10;

/// How long each piece of such an answer may take to come.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long what follows the end of a stream may take; requests may be waiting for the connection.
const FAREWELL: Duration = Duration::from_millis(100);

/// What all requests share.
pub(super) struct Client {
    pub(super) options: OpenAiOptions,
    pub(super) address: Address,
    pub(super) connections: Connections,
    pub(super) permits: Semaphore,
    pub(super) clock: WallClock,
    pub(super) events: SyncSender<TokenEvent>,
}

/// Why there is no whole answer.
enum Broken {
    Rejected(String),
    Failed(String),
}

impl From<String> for Broken {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// What is left of an exchange whose stream has said that it is over.
struct Left<'a> {
    connection: Connection,
    body: Incoming,
    _permit: SemaphorePermit<'a>,
}

impl Client {
    /// Serves one request, and tells its end, once. Dropping the exchange, as a cancellation does, closes its connection.
    pub(super) async fn serve(&self, request: GenerationRequest, cancelled: oneshot::Receiver<()>) {
        let id = request.id;
        let mut left = None;
        let (at, kind) = tokio::select! {
            outcome = self.exchange(&request, &mut left) => match outcome {
                Ok(Ending { rest, kind, at }) => {
                    if let Some((tokens, at)) = rest {
                        self.tell(id, at, EventKind::Tokens(tokens));
                    }
                    (at, kind)
                }
                Err(Broken::Rejected(reason)) => (self.clock.now(), EventKind::Rejected { reason }),
                Err(Broken::Failed(reason)) => (self.clock.now(), EventKind::Failed { reason }),
            },
            // Its other end is dropped only when nobody listens any more.
            _ = cancelled => (self.clock.now(), EventKind::Cancelled),
        };
        self.tell(id, at, kind);
        if let Some(left) = left {
            self.part(left).await;
        }
    }

    /// Waits, if need be, until the load generator has taken older events: their times are already theirs.
    fn tell(&self, request: u64, at: Duration, kind: EventKind) {
        // Nobody listens any more: the thread is about to end.
        let _ = self.events.send(TokenEvent { request, at, kind });
    }

    async fn exchange<'a>(
        &'a self,
        request: &GenerationRequest,
        left: &mut Option<Left<'a>>,
    ) -> Result<Ending, Broken> {
        let permit = self.permits.acquire().await.expect("it is never closed");
        let answer = Answer::new(request, self.options.counting);
        let post = self.post(request, answer.wanted())?;
        let silence = self.options.silence_timeout;
        let sent = timeout(silence, self.connections.send(post)).await.map_err(|_| self.silent())?;
        let (connection, response) = sent?;
        let body = check(response).await?;
        let mut left_here = Left { connection, body, _permit: permit };
        let ending = self.listen(request.id, answer, &mut left_here.body).await?;
        *left = Some(left_here);
        Ok(ending)
    }

    fn post(&self, request: &GenerationRequest, wanted: u32) -> Result<Request<Full<Bytes>>, String> {
        let OpenAiOptions { model, counting, ignore_eos, api_key, .. } = &self.options;
        let body = Body::new(model, &request.prompt, wanted, *counting, *ignore_eos);
        let body = serde_json::to_vec(&body).expect("a request is plain data");
        let mut post = Request::builder()
            .method(Method::POST)
            .uri(&self.address.path)
            .header(HOST, &self.address.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, "text/event-stream");
        if let Some(key) = api_key {
            post = post.header(AUTHORIZATION, format!("Bearer {}", key.0));
        }
        post.body(Full::new(body.into())).map_err(|error| error.to_string())
    }

    /// Reads a stream to its end, and tells tokens as they come.
    async fn listen(&self, id: u64, mut answer: Answer, body: &mut Incoming) -> Result<Ending, String> {
        let (mut parser, mut events) = (Events::default(), Vec::new());
        loop {
            let frame = timeout(self.options.silence_timeout, body.frame()).await;
            let at = self.clock.now();
            let data = match frame {
                Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
                Ok(None) => return answer.end(None),
                Ok(Some(Err(error))) => {
                    return answer.end(Some(format!("its stream broke off ({})", why(&error))));
                }
                Err(_) => return answer.end(Some(self.silent())),
            };
            parser.push(&data, &mut events)?;
            for event in events.drain(..) {
                if event.trim_ascii() == DONE {
                    return answer.end(None);
                }
                let tokens = answer.take(parse(&event)?, at)?;
                if !tokens.is_empty() {
                    self.tell(id, at, EventKind::Tokens(tokens));
                }
            }
        }
    }

    fn silent(&self) -> String {
        format!("{SILENT} for {} s", self.options.silence_timeout.as_secs_f64())
    }

    /// Keeps a connection whose answer really is over; others are closed.
    async fn part(&self, Left { connection, mut body, _permit }: Left<'_>) {
        let rest = async {
            loop {
                match body.frame().await {
                    Some(Ok(_)) => {}
                    end => return end.is_none(),
                }
            }
        };
        if timeout(FAREWELL, rest).await == Ok(true) {
            self.connections.put_back(connection);
        }
    }
}

/// Takes the stream of an answer that is one.
async fn check(response: Response<Incoming>) -> Result<Incoming, Broken> {
    let status = response.status();
    let header = |name| response.headers().get(name).map(|value| shown(value.as_bytes()));
    if status.is_success() {
        match header(CONTENT_TYPE) {
            Some(kind) if !kind.starts_with("text/event-stream") => {
                let said = shown(&beginning(response.into_body()).await);
                return Err(Broken::Failed(format!(
                    "it answered with {kind}, not with a stream of events: {said}"
                )));
            }
            _ => return Ok(response.into_body()),
        }
    }
    if status.is_redirection() {
        let to = header(LOCATION).unwrap_or_else(|| "nowhere".into());
        return Err(Broken::Failed(format!(
            "HTTP {status} to {to}: correct `url`, redirections are not followed"
        )));
    }
    let reason = format!("HTTP {status}: {}", message(&beginning(response.into_body()).await));
    Err(if status.is_client_error() { Broken::Rejected(reason) } else { Broken::Failed(reason) })
}

/// The first bytes of a body, as far as they come soon.
async fn beginning(mut body: Incoming) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < MESSAGE {
        let Ok(Some(Ok(frame))) = timeout(PATIENCE, body.frame()).await else { break };
        let data = frame.into_data().unwrap_or_default();
        bytes.extend_from_slice(&data[..data.len().min(MESSAGE - bytes.len())]);
    }
    bytes
}
