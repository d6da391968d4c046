//! The thread that owns the model: forms batches, runs each to its end, tells what happened.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};

use quire_workloads::{Clock, EventKind, FinishReason, GenerationRequest, StepRecord, TokenEvent, WallClock};

use super::queue::{Queue, Ready, Waiting};
use super::{NaiveModel, StaticBatch};
use crate::BaselineError;

/// What the client says.
pub(super) enum Command {
    Submit(GenerationRequest),
    Cancel(u64),
}

/// The steps not yet taken, shared with the client.
pub(super) type Steps = Arc<Mutex<Vec<StepRecord>>>;

/// Why the worker stops.
enum Stop {
    /// The client's side is gone: nothing is left to do. Not an error.
    ClientGone,
    Failed(candle_core::Error),
}

impl From<candle_core::Error> for Stop {
    fn from(error: candle_core::Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) struct Worker {
    pub(super) model: Arc<NaiveModel>,
    pub(super) queue: Queue,
    pub(super) clock: WallClock,
    pub(super) commands: Receiver<Command>,
    pub(super) events: SyncSender<TokenEvent>,
    pub(super) steps: Option<Steps>,
    /// KV columns of the budget.
    pub(super) kv_slots: Option<u64>,
}

/// One row of the running batch.
struct Row {
    id: u64,
    prompt: usize,
    emitted: usize,
    end: usize,
    reason: FinishReason,
    cancelled: bool,
}

impl Row {
    fn live(&self) -> bool {
        !self.cancelled && self.emitted < self.end
    }

    /// Tokens whose K and V are held, and those still to come. The last token's are never computed.
    fn kv(&self, passes: usize) -> (usize, usize) {
        let wanted = if self.cancelled { self.emitted } else { self.end - 1 };
        let fed = (passes - 1).min(wanted);
        (self.prompt + fed, wanted - fed)
    }
}

impl Worker {
    /// Serves until the client is gone.
    pub(super) fn run(mut self) -> Result<(), BaselineError> {
        let mut step = 0;
        loop {
            match self.serve_once(&mut step) {
                Ok(()) => {}
                Err(Stop::ClientGone) => return Ok(()),
                Err(Stop::Failed(error)) => return Err(error.into()),
            }
        }
    }

    /// Runs the next batch, or waits for a command or for the oldest request's time.
    fn serve_once(&mut self, step: &mut u64) -> Result<(), Stop> {
        self.drain(&mut [])?;
        let now = self.clock.now();
        let command = match self.queue.ready(now) {
            Ready::Now => return self.run_batch(step),
            Ready::At(due) => self.commands.recv_timeout(due.saturating_sub(now)),
            Ready::Empty => self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match command {
            Ok(command) => self.obey(command, &mut []),
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Err(RecvTimeoutError::Disconnected) => Err(Stop::ClientGone),
        }
    }

    fn emit(&self, request: u64, kind: EventKind) -> Result<(), Stop> {
        self.events.send(TokenEvent { request, at: self.clock.now(), kind }).map_err(|_| Stop::ClientGone)
    }

    fn obey(&mut self, command: Command, running: &mut [Row]) -> Result<(), Stop> {
        match command {
            Command::Submit(request) => {
                let id = request.id;
                match self.queue.push(request, self.clock.now()) {
                    Ok(()) => Ok(()),
                    Err(reason) => self.emit(id, EventKind::Rejected { reason }),
                }
            }
            Command::Cancel(id) if self.queue.remove(id) => self.emit(id, EventKind::Cancelled),
            Command::Cancel(id) => {
                // A tensor has no way to lose one row, so the row stays as padding until the batch ends.
                if let Some(row) = running.iter_mut().find(|row| row.id == id && row.live()) {
                    row.cancelled = true;
                }
                Ok(())
            }
        }
    }

    /// Obeys all commands that have come.
    fn drain(&mut self, running: &mut [Row]) -> Result<(), Stop> {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.obey(command, running)?,
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(Stop::ClientGone),
            }
        }
    }

    /// Forms a batch and runs it until its longest row ends.
    fn run_batch(&mut self, step: &mut u64) -> Result<(), Stop> {
        let mut start = self.clock.now();
        let (batch, reserved) = self.queue.take_batch();
        let mut rows: Vec<Row> = batch.iter().map(Row::from).collect();
        let prompts: Vec<Vec<u32>> = batch.into_iter().map(|w| w.prompt).collect();
        let model = Arc::clone(&self.model);
        let mut running = StaticBatch::new(&model, &prompts);
        for pass in 1.. {
            self.drain(&mut rows)?;
            let alive = rows.iter().filter(|row| row.live()).count();
            if alive == 0 {
                break;
            }
            let scheduled = self.clock.now();
            let output = running.step()?;
            let computed = self.clock.now();
            self.deliver(&mut rows, &output.tokens)?;
            let committed = self.clock.now();
            self.record(StepRecord {
                step: *step,
                start_s: start.as_secs_f64(),
                schedule_s: (scheduled - start).as_secs_f64(),
                execute_s: output.times.execute_s,
                sample_s: output.times.sample_s,
                commit_s: (committed - computed).as_secs_f64(),
                running: alive as u32,
                waiting: self.queue.len() as u32,
                ..self.counts(&rows, alive, pass, reserved, running.kv_columns())
            });
            *step += 1;
            start = committed;
        }
        self.finish(&rows)
    }

    /// Sends every live row its token.
    fn deliver(&self, rows: &mut [Row], tokens: &[u32]) -> Result<(), Stop> {
        for (row, token) in rows.iter_mut().zip(tokens).filter(|(row, _)| row.live()) {
            row.emitted += 1;
            self.emit(row.id, EventKind::Tokens(vec![*token]))?;
        }
        Ok(())
    }

    /// The batch is over: its rows end, all at once.
    fn finish(&self, rows: &[Row]) -> Result<(), Stop> {
        for row in rows {
            let kind = if row.cancelled {
                EventKind::Cancelled
            } else {
                EventKind::Finished { reason: row.reason, preemptions: 0, cached_tokens: 0 }
            };
            self.emit(row.id, kind)?;
        }
        Ok(())
    }

    /// Tokens computed in a batch's `pass` (counted from 1), of which `alive` rows were wanted, and KV held after it.
    ///
    /// With a budget, what was set aside is the batch's worst case; without, what its tensors hold. Columns that no
    /// wanted token fills, now or later, are internal fragmentation: padding on the left, rows that go on past
    /// their end, and the worst case that does not come.
    fn counts(&self, rows: &[Row], alive: usize, pass: usize, reserved: u64, columns: usize) -> StepRecord {
        let (held, to_come) = rows
            .iter()
            .map(|row| row.kv(pass))
            .fold((0, 0), |sum, (held, to_come)| (sum.0 + held as u64, sum.1 + to_come as u64));
        let (set_aside, kv_reserved) = match self.kv_slots {
            Some(_) => (reserved, to_come),
            None => ((rows.len() * columns) as u64, 0),
        };
        let prompts: usize = rows.iter().map(|row| row.prompt).sum();
        let (prefill, decode, computed) =
            if pass == 1 { (prompts, 0, rows.len() * columns) } else { (0, alive, rows.len()) };
        StepRecord {
            prefill_tokens: prefill as u32,
            decode_tokens: decode as u32,
            padding_tokens: (computed - prefill - decode) as u32,
            kv_used: held,
            kv_reserved,
            kv_internal: set_aside.saturating_sub(held + kv_reserved),
            kv_free: self.kv_slots.unwrap_or(0).saturating_sub(set_aside),
            ..StepRecord::default()
        }
    }

    fn record(&self, record: StepRecord) {
        if let Some(steps) = &self.steps {
            steps.lock().unwrap_or_else(PoisonError::into_inner).push(record);
        }
    }
}

impl From<&Waiting> for Row {
    fn from(waiting: &Waiting) -> Self {
        Self {
            id: waiting.id,
            prompt: waiting.prompt.len(),
            emitted: 0,
            end: waiting.end,
            reason: waiting.reason,
            cancelled: false,
        }
    }
}
