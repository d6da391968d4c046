//! The child process: started, listened to, ended.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{INSTALL, SCRIPT};

/// Bytes of standard error that are kept: its end.
const KEPT: usize = 8 << 10;

/// How long a child may take to end once its input is closed.
const FAREWELL: Duration = Duration::from_secs(2);

/// A running child; killed on drop if it does not end by itself.
pub(super) struct Process {
    child: Child,
    tail: Arc<Mutex<VecDeque<u8>>>,
    listener: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts the interpreter on the script, and gives its output and input.
    pub(super) fn python(python: &Path) -> Result<(Self, ChildStdout, ChildStdin), String> {
        let mut command = Command::new(python);
        command.args(["-u", "-c", SCRIPT]);
        Self::start(command).map_err(|error| match error.kind() {
            ErrorKind::NotFound => format!("{} is not there: {INSTALL}", python.display()),
            _ => format!("{} cannot be run: {error}", python.display()),
        })
    }

    pub(super) fn start(mut command: Command) -> std::io::Result<(Self, ChildStdout, ChildStdin)> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let missing = || std::io::Error::other("a pipe of the child is missing");
        let input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let errors = child.stderr.take().ok_or_else(missing)?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let mut process = Self { child, tail: Arc::clone(&tail), listener: None };
        let listen = move || keep_tail(errors, &tail);
        process.listener = Some(std::thread::Builder::new().name("transformers-err".into()).spawn(listen)?);
        Ok((process, output, input))
    }

    /// How it ended, waiting for that a little, and the end of what it said on standard error.
    pub(super) fn last_words(&mut self) -> String {
        let ended = match self.wait(FAREWELL) {
            Some(status) => {
                // It is gone, so its standard error ends and with it the listener.
                if let Some(listener) = self.listener.take() {
                    let _ = listener.join();
                }
                format!("the process ended ({status})")
            }
            None => "the process still runs".to_owned(),
        };
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(tail.make_contiguous()).trim().to_owned();
        if text.is_empty() { ended } else { format!("{ended}; its standard error ends with:\n{text}") }
    }

    fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }
}

impl Drop for Process {
    /// Its input was closed before; that makes a healthy child end.
    fn drop(&mut self) {
        if self.wait(FAREWELL).is_none() {
            // Already gone, or not ours to end any more: nothing is left to do in either case.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn keep_tail(mut errors: ChildStderr, tail: &Mutex<VecDeque<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = errors.read(&mut buffer) {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..count]);
        let excess = tail.len().saturating_sub(KEPT);
        tail.drain(..excess);
    }
}
