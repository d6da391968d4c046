//! Connections to the server: opened when needed, kept for the next request.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// The most bytes of a head, or of a body's unread part, that are held.
const BUFFER: usize = 256 << 10;

/// A connection that was idle for longer is not used again: servers close idle ones, after 5 s and more, and a request
/// that is written just then is lost.
const KEPT: Duration = Duration::from_secs(2);

/// How the reasons begin of requests that found no server, or lost it before an answer.
const NO_CONNECTION: &str = "it does not take a connection";
const BROKE_OFF: &str = "its connection broke off";

/// How the reason begins of a request whose answer did not go on.
pub(super) const SILENT: &str = "it was silent";

/// Whether a request failed, for this reason, since its answer did not go on.
pub fn is_silent(reason: &str) -> bool {
    reason.starts_with(SILENT)
}

/// Whether a request failed, for this reason, since there was no connection to the server: as all do once it has ended.
pub fn is_gone(reason: &str) -> bool {
    [NO_CONNECTION, BROKE_OFF].iter().any(|begin| reason.starts_with(begin))
}

/// One connection. Dropping it closes it, whatever it is doing.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: AbortHandle,
    idle_since: Instant,
    reused: bool,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The connections to one server.
pub(super) struct Connections {
    address: SocketAddr,
    patience: Duration,
    idle: Mutex<Vec<Connection>>,
}

impl Connections {
    pub(super) fn new(address: SocketAddr, patience: Duration) -> Self {
        Self { address, patience, idle: Mutex::new(Vec::new()) }
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Connection, Response<Incoming>), String> {
        loop {
            let mut connection = self.get().await?;
            match connection.sender.try_send_request(request).await {
                Ok(response) => return Ok((connection, response)),
                // The server had closed it meanwhile, and has seen nothing of the request.
                Err(mut error) => match error.take_message().filter(|_| connection.reused) {
                    Some(unsent) => request = unsent,
                    None if error.error().is_parse() => return Err(why(error.error())),
                    None => return Err(format!("{BROKE_OFF}: {}", why(error.error()))),
                },
            }
        }
    }

    /// Keeps a connection whose last answer was read to its end.
    pub(super) fn put_back(&self, mut connection: Connection) {
        connection.idle_since = Instant::now();
        connection.reused = true;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    fn kept(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| connection.idle_since.elapsed() < KEPT && !connection.sender.is_closed());
        idle.pop()
    }

    async fn get(&self) -> Result<Connection, String> {
        while let Some(mut connection) = self.kept() {
            if let Ok(Ok(())) = timeout(self.patience, connection.sender.ready()).await {
                return Ok(connection);
            }
        }
        match timeout(self.patience, self.connect()).await {
            Ok(connected) => connected,
            Err(_) => Err(format!("{NO_CONNECTION} within {} s", self.patience.as_secs_f64())),
        }
    }

    async fn connect(&self) -> Result<Connection, String> {
        let refused = |error: std::io::Error| format!("{NO_CONNECTION}: {error}");
        let stream = TcpStream::connect(self.address).await.map_err(refused)?;
        // A request is small: it must not wait for more to be sent with it.
        stream.set_nodelay(true).map_err(refused)?;
        let (sender, driver) = Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| why(&error))?;
        let driver = tokio::spawn(async {
            // What goes wrong is told to the request that it happens to.
            let _ = driver.await;
        });
        Ok(Connection { sender, driver: driver.abort_handle(), idle_since: Instant::now(), reused: false })
    }
}

/// An error with what caused it: the library's own words are short.
pub(super) fn why(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
