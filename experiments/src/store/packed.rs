//! The small form of a run, for committing: all request rows as compressed parquet, times in units of 10 microseconds,
//! steps only as the figures computed from them.
//!
//! A step gives all that run a token at one time, so a cell's distinct times are kept once (`clock`, with its first request) and a
//! request's tokens name places in them (`token_places`): half the space of times by request, which older packs have
//! (`token_gaps`). Lists are of differences.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use polars::prelude::{DataType, IntoSeries, ListBuilderTrait, ListPrimitiveChunkedBuilder, UInt32Type};
use quire_workloads::{Outcome, RequestRecord, Turn};

use super::{StoreError, read, rewrite};
use crate::frame::{Columns, Compression, column, frame, read_parquet, write_parquet};
use crate::record::{CellKey, RequestRow};

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
    check_times(&stored.requests)?;
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

/// Refuses times that the small form has no room for: a cell of more than 11 hours.
fn check_times(rows: &[RequestRow]) -> Result<(), StoreError> {
    let most = f64::from(u32::MAX) / UNITS;
    let last = |record: &RequestRecord| {
        let ends =
            [Some(record.intended_s), record.sent_s, record.finish_s, record.token_times_s.last().copied()];
        ends.into_iter().flatten().fold(0.0, f64::max)
    };
    match rows.iter().find(|row| last(&row.record) > most) {
        None => Ok(()),
        Some(row) => Err(StoreError::Refused(format!(
            "a request of {} has a time of {:.0} s, and the small form of a run has room for {most:.0} s a cell: commit shorter \
             cells",
            row.key.id(),
            last(&row.record)
        ))),
    }
}

/// Whole units since the start of the cell's clock.
fn units(seconds: f64) -> u32 {
    (seconds * UNITS).round().clamp(0.0, f64::from(u32::MAX)) as u32
}

fn seconds(units: u32) -> f64 {
    f64::from(units) / UNITS
}

/// The distinct times of the tokens of each cell, in units and in order, by the cell's name.
fn clocks(rows: &[RequestRow]) -> HashMap<String, Vec<u32>> {
    let mut clocks: HashMap<String, Vec<u32>> = HashMap::new();
    for row in rows {
        let times = row.record.token_times_s.iter().map(|&at| units(at));
        clocks.entry(row.key.id()).or_default().extend(times);
    }
    for clock in clocks.values_mut() {
        clock.sort_unstable();
        clock.dedup();
    }
    clocks
}

/// What each is above the one before it, the first above 0. Of what was rounded, so that errors do not add up.
fn differences(values: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut last = 0;
    values.map(|value| value.saturating_sub(std::mem::replace(&mut last, value))).collect()
}

/// What [`differences`] were of.
fn sums(differences: &[u32]) -> impl Iterator<Item = u32> {
    differences.iter().scan(0u32, |at, difference| {
        *at = at.saturating_add(*difference);
        Some(*at)
    })
}

fn write_records(path: &Path, rows: &[RequestRow]) -> Result<(), StoreError> {
    let n = rows.len();
    let records = || rows.iter().map(|r| &r.record);
    let times = |get: fn(&RequestRecord) -> Option<f64>| -> Vec<Option<u32>> {
        records().map(|r| get(r).map(units)).collect()
    };
    let counts = |get: fn(&RequestRecord) -> u32| -> Vec<u32> { records().map(get).collect() };
    let clocks = clocks(rows);
    let mut begun = HashSet::new();
    let list =
        |name: &str| ListPrimitiveChunkedBuilder::<UInt32Type>::new(name.into(), n, 0, DataType::UInt32);
    let (mut clock_list, mut places) = (list("clock"), list("token_places"));
    for row in rows {
        let cell = row.key.id();
        let clock = &clocks[&cell];
        let place = |&at: &f64| clock.partition_point(|&other| other < units(at)) as u32;
        places.append_slice(&differences(row.record.token_times_s.iter().map(place)));
        let first = begun.insert(cell);
        clock_list.append_slice(&differences(clock.iter().copied().filter(|_| first)));
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
        clock_list.finish().into_series().into(),
        places.finish().into_series().into(),
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

/// Seconds of each request's tokens.
fn token_times(columns: &Columns<'_>, keys: &[CellKey]) -> Result<Vec<Vec<f64>>, StoreError> {
    if columns.has("token_gaps") {
        let gaps = columns.u32_lists("token_gaps")?;
        return Ok(gaps.iter().map(|gaps| sums(gaps).map(seconds).collect()).collect());
    }
    let (lists, places) = (columns.u32_lists("clock")?, columns.u32_lists("token_places")?);
    let mut clocks: HashMap<String, Vec<u32>> = HashMap::new();
    for (key, list) in keys.iter().zip(&lists).filter(|(_, list)| !list.is_empty()) {
        clocks.insert(key.id(), sums(list).collect());
    }
    let times = keys.iter().zip(&places).enumerate().map(|(i, (key, places))| {
        let clock = clocks.get(&key.id()).map_or(&[][..], Vec::as_slice);
        let at = |place: u32| clock.get(place as usize).copied().map(seconds);
        let missing =
            || StoreError::content(columns.path, i + 1, "a token at a time that its cell does not have");
        sums(places).map(at).collect::<Option<Vec<f64>>>().ok_or_else(missing)
    });
    times.collect()
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
    let hash = columns.text("output_hash")?;
    let keys = columns.keys()?;
    let token_times = token_times(&columns, &keys)?;
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
    for (i, (key, token_times_s)) in keys.into_iter().zip(token_times).enumerate() {
        let outcome: Outcome =
            serde_json::from_str(&outcome[i]).map_err(|e| StoreError::content(path, i + 1, e))?;
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

#[cfg(test)]
mod tests {
    use super::{check_times, clocks, differences, read_records, seconds, sums, write_records};
    use crate::record::RequestRow;

    fn row(system: &str, id: u64, times: &[u32]) -> RequestRow {
        let mut row = crate::record::tests::row();
        row.key.system = system.into();
        row.record.id = id;
        row.record.token_times_s = times.iter().map(|&at| seconds(at)).collect();
        row
    }

    #[test]
    fn differences_are_of_what_they_sum_up_to() {
        let values = [3, 3, 7, 100];
        assert_eq!(differences(values.into_iter()), [3, 0, 4, 93]);
        assert_eq!(sums(&[3, 0, 4, 93]).collect::<Vec<_>>(), values);
        assert_eq!(sums(&[u32::MAX, 1]).last(), Some(u32::MAX), "a file may say anything");
    }

    #[test]
    fn times_come_back_from_the_clock_of_their_cell() {
        // Steps shared by two requests, several tokens at once, one without any; another cell in between and its times alone.
        let rows = [
            row("a", 0, &[500, 900, 900, 1300]),
            row("b", 0, &[7]),
            row("a", 1, &[]),
            row("a", 2, &[900, 1300, 2_000_000]),
        ];
        assert_eq!(clocks(&rows)[&rows[0].key.id()], [500, 900, 1300, 2_000_000]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.parquet");
        write_records(&path, &rows).unwrap();
        let read = read_records(&path).unwrap();
        let times = |rows: &[RequestRow]| -> Vec<Vec<f64>> {
            rows.iter().map(|row| row.record.token_times_s.clone()).collect()
        };
        assert_eq!(times(&read), times(&rows));
    }

    #[test]
    fn times_that_there_is_no_room_for_are_refused() {
        let fits = [row("a", 0, &[u32::MAX])];
        check_times(&fits).unwrap();
        let mut late = row("b", 0, &[]);
        late.record.finish_s = Some(43_000.0);
        let error = check_times(&[fits[0].clone(), late]).unwrap_err().to_string();
        assert!(error.contains("43000 s") && error.contains("p.b."), "{error}");
    }
}
