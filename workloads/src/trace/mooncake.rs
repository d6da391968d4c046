//! Mooncake (Qin et al., FAST 2025): JSON lines with `timestamp` (milliseconds, in ticks), `input_length`,
//! `output_length` and `hash_ids`, one for each block of 512 prompt tokens.

use std::io::BufRead;

use serde::Deserialize;

use super::{MAX_TOKENS, PrefixBlocks, ReadOptions, Trace, TraceRequest};
use crate::error::WorkloadError;
use crate::lines::Lines;

const BLOCK_LEN: u32 = 512;

#[derive(Deserialize)]
struct Row {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

pub(super) fn read(
    reader: impl BufRead,
    options: &ReadOptions,
    trace: &mut Trace,
) -> Result<(), WorkloadError> {
    let file = trace.meta.file.clone();
    let mut lines = Lines::new(reader, &file);
    while !trace.is_full(options) {
        let Some(line) = lines.next()? else { break };
        let row: Row = line.json()?;
        if !(0.0..1e15).contains(&row.timestamp) {
            return Err(line
                .place
                .error(0, format!("timestamp {} is not a time in milliseconds", row.timestamp)));
        }
        if row.input_length > MAX_TOKENS || row.output_length > MAX_TOKENS {
            return Err(line.place.error(0, format!("a length of more than {MAX_TOKENS} tokens")));
        }
        let blocks = row.input_length.div_ceil(BLOCK_LEN) as usize;
        if row.hash_ids.len() > blocks {
            let ids = row.hash_ids.len();
            let problem =
                format!("{ids} hash_ids for input_length {}, which has {blocks} blocks", row.input_length);
            return Err(line.place.error(0, problem));
        }
        trace.meta.rows += 1;
        trace.push(TraceRequest {
            arrival_s: row.timestamp / 1e3,
            input_len: row.input_length,
            output_len: row.output_length,
            prefix: Some(PrefixBlocks { block_len: BLOCK_LEN, ids: row.hash_ids }),
            turn: None,
        });
    }
    Ok(())
}
