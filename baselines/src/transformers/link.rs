//! Lines over a pair of streams, each end with a thread of its own so that neither side ever waits for the other.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use quire_workloads::{Clock, WallClock};

use super::protocol::{Command, MAX_LINE, Reply};
use crate::BaselineError;

/// Lines that may lie between a thread and its user.
const CAPACITY: usize = 16_384;

/// What the reader found: a reply and when, or why there will be no more.
pub(super) type Heard = Result<(Duration, Reply), String>;

/// Both directions. The threads end when the streams do.
pub(super) struct Link {
    pub(super) commands: SyncSender<Command>,
    pub(super) replies: Receiver<Heard>,
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Link {
    pub(super) fn open(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        clock: WallClock,
    ) -> Result<Self, BaselineError> {
        let (commands, outbox) = sync_channel(CAPACITY);
        let (inbox, replies) = sync_channel(CAPACITY);
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(format!("transformers-{name}"))
                .spawn(work)
                .map_err(|e| BaselineError::Threads(e.to_string()))
        };
        let threads = vec![
            spawn("in", Box::new(move || read_lines(reader, &inbox, clock)))?,
            spawn("out", Box::new(move || write_lines(writer, &outbox)))?,
        ];
        Ok(Self { commands, replies, threads })
    }
}

fn read_lines(reader: impl Read, inbox: &SyncSender<Heard>, clock: WallClock) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let heard = match reader.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) => Err("its output ended".into()),
            Ok(_) => parse(&line).map(|reply| (clock.now(), reply)),
            Err(error) => Err(format!("its output cannot be read: {error}")),
        };
        let over = heard.is_err();
        if inbox.send(heard).is_err() || over {
            return;
        }
    }
}

fn parse(line: &[u8]) -> Result<Reply, String> {
    serde_json::from_slice(line).map_err(|error| {
        let shown = String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned();
        format!("it sent no line of the protocol ({error}): {shown:?}")
    })
}

/// Ends when the other end of the channel is dropped; the stream is then closed, which tells the peer to end.
fn write_lines(mut writer: impl Write, outbox: &Receiver<Command>) {
    for command in outbox {
        let mut line = serde_json::to_vec(&command).expect("commands are plain data");
        line.push(b'\n');
        // The peer is gone; the reader says so.
        if writer.write_all(&line).and_then(|()| writer.flush()).is_err() {
            return;
        }
    }
}
