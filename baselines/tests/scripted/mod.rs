//! An HTTP server that does what a script says, in this process.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as it came.
pub(crate) struct Heard {
    /// Its request line and headers.
    pub(crate) head: String,
    /// Its body.
    pub(crate) body: serde_json::Value,
    /// How many came before it.
    pub(crate) number: usize,
}

/// One connection, on which a script answers.
pub(crate) struct Answering {
    reader: BufReader<TcpStream>,
    pub(crate) stream: TcpStream,
}

impl Answering {
    /// Bytes as they are; a client that is gone ends the script's connection later.
    pub(crate) fn raw(&mut self, text: &str) {
        let _ = self.stream.write_all(text.as_bytes());
    }

    /// The head of a stream of events.
    pub(crate) fn begin(&mut self) {
        self.raw("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    }

    /// An event, as one piece of a chunked body.
    pub(crate) fn event(&mut self, data: &str) {
        let text = format!("data: {data}\n\n");
        self.raw(&format!("{:x}\r\n{text}\r\n", text.len()));
    }

    /// A token of text.
    pub(crate) fn token(&mut self) {
        self.event(r#"{"choices":[{"index":0,"text":" a","finish_reason":null}]}"#);
    }

    /// The last token, `[DONE]` and the end of the body.
    pub(crate) fn finish(&mut self) {
        self.event(r#"{"choices":[{"index":0,"text":" z","finish_reason":"length"}]}"#);
        self.event("[DONE]");
        self.raw("0\r\n\r\n");
    }

    /// A whole answer that is no stream.
    pub(crate) fn whole(&mut self, status: &str, kind: &str, body: &str) {
        let length = body.len();
        self.raw(&format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
    }

    /// Waits until the client has closed the connection; false when it has not within `patience`.
    pub(crate) fn closed_within(&mut self, patience: Duration) -> bool {
        self.stream.set_read_timeout(Some(patience)).unwrap();
        match self.reader.read(&mut [0; 1]) {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    fn hear(&mut self, number: usize) -> Option<Heard> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let length = head.to_lowercase().split("content-length: ").nth(1)?.lines().next()?.parse().ok()?;
        let mut body = vec![0; length];
        self.reader.read_exact(&mut body).ok()?;
        Some(Heard { head, body: serde_json::from_slice(&body).ok()?, number })
    }
}

/// What the server saw.
#[derive(Default)]
pub(crate) struct Seen {
    /// Connections on which something was asked.
    pub(crate) connections: AtomicUsize,
    /// Requests.
    pub(crate) requests: AtomicUsize,
    /// Requests being answered, and the most at once.
    pub(crate) at_once: Mutex<(usize, usize)>,
}

/// Starts a server, and gives its base URL. Its threads end with the process.
pub(crate) fn serve(script: impl Fn(&mut Answering, Heard) + Send + Sync + 'static) -> (String, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let (script, seen) = (Arc::new(script), Arc::new(Seen::default()));
    let shared = Arc::clone(&seen);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (script, seen) = (Arc::clone(&script), Arc::clone(&shared));
            std::thread::spawn(move || {
                // As servers do: a token must not wait for the next.
                stream.set_nodelay(true).unwrap();
                let reader = BufReader::new(stream.try_clone().unwrap());
                let mut connection = Answering { reader, stream };
                let mut first = true;
                while let Some(heard) = connection.hear(seen.requests.load(Ordering::Relaxed)) {
                    seen.requests.fetch_add(1, Ordering::Relaxed);
                    seen.connections.fetch_add(usize::from(std::mem::take(&mut first)), Ordering::Relaxed);
                    {
                        let mut at_once = seen.at_once.lock().unwrap();
                        at_once.0 += 1;
                        at_once.1 = at_once.1.max(at_once.0);
                    }
                    script(&mut connection, heard);
                    seen.at_once.lock().unwrap().0 -= 1;
                }
            });
        }
    });
    (url, seen)
}
