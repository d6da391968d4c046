//! The small form of a run, for committing: all request rows as compressed parquet, times in units of 10 microseconds,
//! steps only as the figures computed from them.

use std::fs;
use std::path::{Path, PathBuf};

use polars::prelude::{DataType, IntoSeries, ListBuilderTrait, ListPrimitiveChunkedBuilder, UInt32Type};
use quire_workloads::{Outcome, RequestRecord, Turn};

use super::{StoreError, read, rewrite};
use crate::frame::{Columns, Compression, column, frame, read_parquet, write_parquet};
use crate::record::RequestRow;

/// Units in a second.
const UNITS: f64 = 1e5;

/// How large the small form of a figure may be.
pub const PACKED_LIMIT_BYTES: u64 = 2_000_000;

/// The file that only packed runs have.
pub(super) fn file(folder: &Path) -> PathBuf {
    folder.join("records.parquet")
}

/// Writes the small form of the run in `folder` to `dest`, and returns its size in bytes.
///
/// # Errors
/// When the run cannot be read, or `dest` exists or cannot be written.
pub fn pack(folder: &Path, dest: &Path) -> Result<u64, StoreError> {
    if dest.exists() {
        return Err(StoreError::Refused(format!(
            "{} exists: committed results are not overwritten",
            dest.display()
        )));
    }
    let stored = read(folder)?;
    fs::create_dir_all(dest).map_err(|e| StoreError::io(dest, e))?;
    write_records(&file(dest), &stored.requests)?;
    rewrite(&dest.join("cells.jsonl"), &stored.cells)?;
    let figure = &stored.manifest.settings.name;
    let others = ["manifest.json", "summary.parquet", "claims.csv"].map(str::to_string);
    for name in others.into_iter().chain([format!("{figure}.svg"), format!("{figure}.png")]) {
        let from = folder.join(&name);
        if from.exists() {
            fs::copy(&from, dest.join(&name)).map_err(|e| StoreError::io(&from, e))?;
        }
    }
    size(dest)
}

/// Bytes of the files in `folder`.
///
/// # Errors
/// When it cannot be read.
pub fn size(folder: &Path) -> Result<u64, StoreError> {
    let io = |e| StoreError::io(folder, e);
    let sizes = fs::read_dir(folder).map_err(io)?.map(|entry| Ok(entry?.metadata()?.len()));
    sizes.sum::<Result<u64, std::io::Error>>().map_err(io)
}

/// Whole units since the start of the cell's clock.
fn units(seconds: f64) -> u32 {
    (seconds * UNITS).round().clamp(0.0, f64::from(u32::MAX)) as u32
}

fn seconds(units: u32) -> f64 {
    f64::from(units) / UNITS
}

fn write_records(path: &Path, rows: &[RequestRow]) -> Result<(), StoreError> {
    let n = rows.len();
    let records = || rows.iter().map(|r| &r.record);
    let times = |get: fn(&RequestRecord) -> Option<f64>| -> Vec<Option<u32>> {
        records().map(|r| get(r).map(units)).collect()
    };
    let counts = |get: fn(&RequestRecord) -> u32| -> Vec<u32> { records().map(get).collect() };
    let mut gaps =
        ListPrimitiveChunkedBuilder::<UInt32Type>::new("token_gaps".into(), n, 0, DataType::UInt32);
    for record in records() {
        let mut last = 0;
        // Differences of rounded times: errors do not add up.
        let list: Vec<u32> = record
            .token_times_s
            .iter()
            .map(|&at| {
                let at = units(at);
                let gap = at.saturating_sub(last);
                last = at;
                gap
            })
            .collect();
        gaps.append_slice(&list);
    }
    let outcome = |r: &RequestRecord| serde_json::to_string(&r.outcome).expect("an outcome is plain data");
    let mut columns = vec![
        column("panel", rows.iter().map(|r| r.key.panel.clone()).collect::<Vec<_>>()),
        column("system", rows.iter().map(|r| r.key.system.clone()).collect::<Vec<_>>()),
        column("rate", rows.iter().map(|r| r.key.rate).collect::<Vec<_>>()),
        column("repeat", rows.iter().map(|r| r.key.repeat).collect::<Vec<_>>()),
        column("seed", rows.iter().map(|r| r.key.seed).collect::<Vec<_>>()),
        column("schema", counts(|r| r.schema)),
        column("id", records().map(|r| r.id).collect::<Vec<_>>()),
        column("intended", times(|r| Some(r.intended_s))),
        column("sent", times(|r| r.sent_s)),
        column("finish", times(|r| r.finish_s)),
        gaps.finish().into_series().into(),
        column("outcome", records().map(outcome).collect::<Vec<_>>()),
        column("prompt_tokens", counts(|r| r.prompt_tokens)),
        column("output_tokens", counts(|r| r.output_tokens)),
        column("max_tokens", counts(|r| r.max_tokens)),
        column("true_output_len", records().map(|r| r.true_output_len).collect::<Vec<_>>()),
        column("preemptions", counts(|r| r.preemptions)),
        column("cached_tokens", counts(|r| r.cached_tokens)),
        column("output_hash", records().map(|r| r.output_hash.clone()).collect::<Vec<_>>()),
    ];
    // Columns that only some workloads have.
    let place = |get: fn(&RequestRecord) -> Option<u32>| -> Vec<Option<u32>> { records().map(get).collect() };
    if records().any(|r| r.turn.is_some()) {
        let conversation: Vec<Option<u64>> = records().map(|r| Some(r.turn?.conversation)).collect();
        columns.extend([column("conversation", conversation), column("turn", place(|r| Some(r.turn?.turn)))]);
    }
    if records().any(|r| r.class.is_some()) {
        columns.push(column("class", place(|r| r.class.map(u32::from))));
    }
    if records().any(|r| r.outputs != 1) {
        columns.push(column("outputs", counts(|r| r.outputs)));
    }
    if records().any(|r| r.synthetic) {
        columns.push(column("synthetic", records().map(|r| r.synthetic).collect::<Vec<_>>()));
    }
    write_parquet(path, &mut frame(n, columns), Compression::Small)?;
    Ok(())
}

pub(super) fn read_records(path: &Path) -> Result<Vec<RequestRow>, StoreError> {
    let table = read_parquet(path)?;
    let columns = Columns { path, table: &table };
    let (intended, sent, finish) =
        (columns.u32("intended")?, columns.optional_u32("sent")?, columns.optional_u32("finish")?);
    let (schema, id, outcome) = (columns.u32("schema")?, columns.u64("id")?, columns.text("outcome")?);
    let (prompt, output) = (columns.u32("prompt_tokens")?, columns.u32("output_tokens")?);
    let (max, len) = (columns.u32("max_tokens")?, columns.optional_u32("true_output_len")?);
    let (preemptions, cached) = (columns.u32("preemptions")?, columns.u32("cached_tokens")?);
    let (hash, gaps) = (columns.text("output_hash")?, columns.u32_lists("token_gaps")?);
    let turn = match columns.has("conversation") {
        true => Some((columns.u64("conversation")?, columns.optional_u32("turn")?)),
        false => None,
    };
    let turn_of = |i: usize| {
        let (conversation, turn) = turn.as_ref()?;
        Some(Turn { conversation: conversation[i], turn: turn[i]? })
    };
    let class = if columns.has("class") { columns.optional_u32("class")? } else { vec![None; id.len()] };
    let outputs = if columns.has("outputs") { columns.u32("outputs")? } else { vec![1; id.len()] };
    // Older packs lack it where some are: their manifests tell.
    let synthetic = if columns.has("synthetic") { columns.bool("synthetic")? } else { vec![false; id.len()] };
    let mut rows = Vec::with_capacity(id.len());
    for (i, key) in columns.keys()?.into_iter().enumerate() {
        let outcome: Outcome =
            serde_json::from_str(&outcome[i]).map_err(|e| StoreError::content(path, i + 1, e))?;
        let mut at = 0u32;
        let token_times_s: Vec<f64> = gaps[i]
            .iter()
            .map(|gap| {
                at = at.saturating_add(*gap);
                seconds(at)
            })
            .collect();
        let record = RequestRecord {
            schema: schema[i],
            id: id[i],
            intended_s: seconds(intended[i]),
            sent_s: sent[i].map(seconds),
            first_token_s: token_times_s.first().copied(),
            token_times_s,
            finish_s: finish[i].map(seconds),
            outcome,
            prompt_tokens: prompt[i],
            output_tokens: output[i],
            max_tokens: max[i],
            true_output_len: len[i],
            preemptions: preemptions[i],
            cached_tokens: cached[i],
            output_hash: hash[i].clone(),
            synthetic: synthetic[i],
            turn: turn_of(i),
            class: class[i].and_then(|class| u8::try_from(class).ok()),
            outputs: outputs[i],
        };
        rows.push(RequestRow { key, record });
    }
    Ok(rows)
}
