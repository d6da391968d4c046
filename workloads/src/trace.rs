//! Traces: who asked when, with how long a prompt, and how long the answer was.
//!
//! All loaders keep to the same rules:
//! - Arrivals are seconds since the first request. Rows out of order are sorted (stably), and counted in
//!   [`TraceMeta::out_of_order`].
//! - A row without a prompt or without an answer is no request that could be replayed: it is left out and counted in
//!   [`LeftOut`].
//! - Anything else that is wrong is an error with file, line and column. Nothing is guessed or repaired.

mod azure;
mod burst_gpt;
mod format;
mod mooncake;
mod share_gpt;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};

pub use burst_gpt::LogFilter;
pub use format::TraceFormat;
pub use share_gpt::{TokenCounter, Turns};

use crate::error::WorkloadError;
use crate::random::{Stream, Use};

/// The most tokens a row may state; more is taken for a damaged file.
pub const MAX_TOKENS: u32 = 1 << 24;

/// A trace in memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The requests by arrival.
    pub requests: Vec<TraceRequest>,
    /// Where they came from.
    pub meta: TraceMeta,
}

/// One request of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Arrival, seconds since the trace's first request.
    pub arrival_s: f64,
    /// Prompt tokens, at least 1.
    pub input_len: u32,
    /// Answer tokens, at least 1.
    pub output_len: u32,
    /// Which blocks of the prompt are equal to blocks of other prompts, where the trace says.
    pub prefix: Option<PrefixBlocks>,
    /// Place in a conversation, where the trace says.
    pub turn: Option<Turn>,
}

/// A prompt as a list of blocks: blocks with equal ids have equal tokens, and so have all blocks before them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixBlocks {
    /// Tokens in a block; the last may be partly filled.
    pub block_len: u32,
    /// One id for each block.
    pub ids: Vec<u64>,
}

/// Place of a request in a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// Number of the conversation in its file, from 0.
    pub conversation: u64,
    /// Number of the exchange in the conversation, from 0.
    pub turn: u32,
}

/// Where a trace came from and what was done to it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TraceMeta {
    /// The file, as the caller named it.
    pub file: String,
    /// Its format.
    pub format: TraceFormat,
    /// Whether arrivals are real; when not, all are zero.
    pub timed: bool,
    /// How token counts were made when the file has text instead: an estimate says so.
    pub tokens_by: Option<String>,
    /// Rows or conversations read.
    pub rows: u64,
    /// Rows that came earlier than the row before them.
    pub out_of_order: u64,
    /// Rows that are not among the requests.
    pub left_out: LeftOut,
}

/// Rows that are not among a trace's requests, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// Requests that failed when the trace was taken (BurstGPT: no response tokens).
    pub failed: u64,
    /// Rows whose prompt has no tokens.
    pub empty_prompt: u64,
    /// Rows whose answer has no tokens, though not marked as failed.
    pub empty_output: u64,
    /// Rows of a kind that was not asked for.
    pub filtered: u64,
    /// Conversations in which nobody answers a person.
    pub no_exchange: u64,
}

/// How to read a trace.
#[derive(Debug, Clone, Default)]
pub struct ReadOptions<'a> {
    /// The format; told from the first line when not given.
    pub format: Option<TraceFormat>,
    /// Stop after this many usable requests: the rest is neither read nor checked.
    pub max_requests: Option<usize>,
    /// Which of BurstGPT's services to keep; refused with other formats, but for the default.
    pub log: LogFilter,
    /// Which of ShareGPT's exchanges to keep; refused with other formats, but for the default.
    pub turns: Turns,
    /// How ShareGPT's texts become token counts; an estimate other than the default is refused with other formats.
    pub tokens: TokenCounter<'a>,
}

impl Trace {
    /// Reads a trace file.
    ///
    /// # Errors
    /// When the file cannot be read, is of no known format, or is wrong somewhere; when an option is for another format.
    pub fn load(path: &Path, options: &ReadOptions) -> Result<Self, WorkloadError> {
        let io = |error| WorkloadError::Io { path: path.to_owned(), error };
        let mut reader = BufReader::with_capacity(1 << 16, File::open(path).map_err(io)?);
        let file = path.display().to_string();
        let format = match options.format {
            Some(format) => format,
            None => TraceFormat::sniff(reader.fill_buf().map_err(io)?, &file)?,
        };
        Self::read(format, reader, &file, options)
    }

    /// Reads a trace from memory; `file` is its name in errors.
    ///
    /// # Errors
    /// When the bytes are of no known format or wrong somewhere; when an option is for another format.
    pub fn parse(bytes: &[u8], file: &str, options: &ReadOptions) -> Result<Self, WorkloadError> {
        let format = match options.format {
            Some(format) => format,
            None => TraceFormat::sniff(bytes, file)?,
        };
        Self::read(format, bytes, file, options)
    }

    fn read(
        format: TraceFormat,
        reader: impl BufRead,
        file: &str,
        options: &ReadOptions,
    ) -> Result<Self, WorkloadError> {
        let mut trace = Self::empty(format, file);
        format.read(reader, options, &mut trace)?;
        if trace.requests.is_empty() {
            let problem = format!("no usable request in {} rows: {:?}", trace.meta.rows, trace.meta.left_out);
            return Err(WorkloadError::Trace { file: file.to_owned(), problem });
        }
        trace.order();
        Ok(trace)
    }

    fn empty(format: TraceFormat, file: &str) -> Self {
        let meta = TraceMeta {
            file: file.to_owned(),
            format,
            timed: true,
            tokens_by: None,
            rows: 0,
            out_of_order: 0,
            left_out: LeftOut::default(),
        };
        Self { requests: Vec::new(), meta }
    }

    /// Takes in a row, unless it is empty.
    fn push(&mut self, request: TraceRequest) {
        if request.input_len == 0 {
            self.meta.left_out.empty_prompt += 1;
        } else if request.output_len == 0 {
            self.meta.left_out.empty_output += 1;
        } else {
            self.requests.push(request);
        }
    }

    fn is_full(&self, options: &ReadOptions) -> bool {
        options.max_requests.is_some_and(|max| self.requests.len() >= max)
    }

    /// Sorts by arrival and makes the first arrival zero.
    fn order(&mut self) {
        let late = self.requests.windows(2).filter(|pair| pair[1].arrival_s < pair[0].arrival_s).count();
        self.meta.out_of_order = late as u64;
        if late > 0 {
            self.requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
        }
        let first = self.requests.first().map_or(0.0, |request| request.arrival_s);
        for request in &mut self.requests {
            request.arrival_s -= first;
        }
    }

    /// The seconds of one tick of the trace's clock: the smallest gap between different arrivals.
    pub fn tick_s(&self) -> Option<f64> {
        let gaps = self.requests.windows(2).map(|pair| pair[1].arrival_s - pair[0].arrival_s);
        gaps.filter(|&gap| gap > 0.0).min_by(f64::total_cmp)
    }

    /// Spreads requests that carry the same time uniformly over the tick that follows it, keeping their order.
    ///
    /// A trace written in ticks (Mooncake: 3 s) would otherwise come in bursts that nobody sent. No request moves by
    /// a tick or more, so ticks do not mix.
    pub fn spread_ticks(&mut self, seed: u64) {
        let times = self.spread_times(seed);
        for (request, arrival_s) in self.requests.iter_mut().zip(times) {
            request.arrival_s = arrival_s;
        }
    }

    /// The times that [`Trace::spread_ticks`] gives.
    pub(crate) fn spread_times(&self, seed: u64) -> Vec<f64> {
        let mut times: Vec<f64> = self.requests.iter().map(|request| request.arrival_s).collect();
        let Some(tick) = self.tick_s() else { return times };
        let mut stream = Stream::new(seed, Use::Ticks, 0);
        for group in times.chunk_by_mut(|a, b| a == b) {
            let mut offsets: Vec<f64> = group.iter().map(|_| tick * stream.unit()).collect();
            offsets.sort_by(f64::total_cmp);
            group.iter_mut().zip(offsets).for_each(|(time, offset)| *time += offset);
        }
        times
    }
}
