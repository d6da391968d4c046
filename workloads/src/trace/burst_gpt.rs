//! BurstGPT (Wang et al., 2024): CSV with the columns `Timestamp` (seconds), `Model`, `Request tokens`,
//! `Response tokens`, `Total tokens`, `Log Type`, and in later files `Session ID` and `Elapsed time`, which are not
//! used. A row with no response tokens is a request that failed.

use std::io::BufRead;

use serde::{Deserialize, Serialize};

use super::{ReadOptions, Trace, TraceRequest};
use crate::error::WorkloadError;
use crate::lines::{Header, Lines};

pub(super) const COLUMNS: [&str; 4] = ["Timestamp", "Request tokens", "Response tokens", "Log Type"];

/// Which of BurstGPT's two services to keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFilter {
    /// Both.
    #[default]
    All,
    /// People in the chat service (`Conversation log`).
    Conversation,
    /// Programs (`API log`).
    Api,
}

pub(super) fn read(
    reader: impl BufRead,
    options: &ReadOptions,
    trace: &mut Trace,
) -> Result<(), WorkloadError> {
    let file = trace.meta.file.clone();
    let mut lines = Lines::new(reader, &file);
    let Some(header) = lines.next()? else { return Ok(()) };
    let header = Header::parse(&header, COLUMNS)?;
    while !trace.is_full(options) {
        let Some(line) = lines.next()? else { break };
        let [time, input, output, log] = header.fields(&line)?;
        let arrival_s = time.seconds()?;
        let (input_len, output_len) = (input.tokens()?, output.tokens()?);
        let kind = match log.bytes {
            b"Conversation log" => LogFilter::Conversation,
            b"API log" => LogFilter::Api,
            _ => return Err(log.error("neither \"Conversation log\" nor \"API log\"")),
        };
        trace.meta.rows += 1;
        if options.log != LogFilter::All && options.log != kind {
            trace.meta.left_out.filtered += 1;
        } else if output_len == 0 {
            trace.meta.left_out.failed += 1;
        } else {
            trace.push(TraceRequest { arrival_s, input_len, output_len, prefix: None, turn: None });
        }
    }
    Ok(())
}
