//! Steps in parquet: a file a cell while a run goes on, one file at its end.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use polars::prelude::DataFrame;
use quire_workloads::StepRecord;

use super::{StoreError, Stored};
use crate::frame::{Columns, Compression, column, frame, read_parquet, write_parquet};
use crate::record::CellKey;

type Time = (&'static str, fn(&mut StepRecord) -> &mut f64);
type Count = (&'static str, fn(&mut StepRecord) -> &mut u32);
type Slots = (&'static str, fn(&mut StepRecord) -> &mut u64);

const TIMES: [Time; 5] = [
    ("start_s", |s| &mut s.start_s),
    ("schedule_s", |s| &mut s.schedule_s),
    ("execute_s", |s| &mut s.execute_s),
    ("sample_s", |s| &mut s.sample_s),
    ("commit_s", |s| &mut s.commit_s),
];
const COUNTS: [Count; 6] = [
    ("running", |s| &mut s.running),
    ("waiting", |s| &mut s.waiting),
    ("prefill_tokens", |s| &mut s.prefill_tokens),
    ("decode_tokens", |s| &mut s.decode_tokens),
    ("padding_tokens", |s| &mut s.padding_tokens),
    ("preempted", |s| &mut s.preempted),
];
/// Counts that older files lack.
const NEWER_COUNTS: [Count; 5] = [
    ("drafted_tokens", |s| &mut s.drafted_tokens),
    ("accepted_tokens", |s| &mut s.accepted_tokens),
    ("refused_drafts", |s| &mut s.refused_drafts),
    ("swapped_out", |s| &mut s.swapped_out),
    ("swapped_in", |s| &mut s.swapped_in),
];
const SLOTS: [Slots; 6] = [
    ("step", |s| &mut s.step),
    ("kv_used", |s| &mut s.kv_used),
    ("kv_reserved", |s| &mut s.kv_reserved),
    ("kv_internal", |s| &mut s.kv_internal),
    ("kv_cached", |s| &mut s.kv_cached),
    ("kv_free", |s| &mut s.kv_free),
];
/// Slots that older files lack.
const NEWER_SLOTS: [Slots; 1] = [("kv_shared", |s| &mut s.kv_shared)];

fn file(folder: &Path) -> PathBuf {
    folder.join("steps.parquet")
}

fn cell_file(folder: &Path, id: &str) -> PathBuf {
    folder.join("steps").join(format!("{id}.parquet"))
}

/// Writes the steps of one cell.
pub(super) fn write_cell(folder: &Path, key: &CellKey, steps: &[StepRecord]) -> Result<(), StoreError> {
    let n = steps.len();
    let mut steps = steps.to_vec();
    let mut columns = vec![
        column("panel", vec![key.panel.clone(); n]),
        column("system", vec![key.system.clone(); n]),
        column("rate", vec![key.rate; n]),
        column("repeat", vec![key.repeat; n]),
        column("seed", vec![key.seed; n]),
    ];
    for (name, get) in SLOTS.into_iter().chain(NEWER_SLOTS) {
        columns.push(column(name, steps.iter_mut().map(|s| *get(s)).collect::<Vec<u64>>()));
    }
    for (name, get) in TIMES {
        columns.push(column(name, steps.iter_mut().map(|s| *get(s)).collect::<Vec<f64>>()));
    }
    for (name, get) in COUNTS.into_iter().chain(NEWER_COUNTS) {
        columns.push(column(name, steps.iter_mut().map(|s| *get(s)).collect::<Vec<u32>>()));
    }
    write_parquet(&cell_file(folder, &key.id()), &mut frame(n, columns), Compression::Fast)?;
    Ok(())
}

/// All files of the folder of cells' steps, what an interruption left of one included.
fn cell_files(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let steps = folder.join("steps");
    let entries = match fs::read_dir(&steps) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(&steps, e)),
    };
    let paths: Result<Vec<PathBuf>, _> = entries.map(|e| e.map(|e| e.path())).collect();
    let mut paths = paths.map_err(|e| StoreError::io(&steps, e))?;
    paths.sort();
    Ok(paths)
}

/// Joins the files of the cells `ids` into one and removes them.
pub(super) fn join<'a>(folder: &Path, ids: impl Iterator<Item = &'a String>) -> Result<(), StoreError> {
    let paths = ids.map(|id| cell_file(folder, id)).filter(|path| path.exists());
    let mut paths: Vec<PathBuf> = paths.collect();
    paths.sort();
    let mut all: Option<DataFrame> = None;
    for path in &paths {
        let table = read_parquet(path)?;
        match &mut all {
            None => all = Some(table),
            Some(all) => {
                all.vstack_mut(&table).map_err(|e| StoreError::content(path, 0, e))?;
            }
        }
    }
    if let Some(mut all) = all {
        all.align_chunks_par();
        write_parquet(&file(folder), &mut all, Compression::Fast)?;
    }
    let steps = folder.join("steps");
    if steps.exists() {
        fs::remove_dir_all(&steps).map_err(|e| StoreError::io(&steps, e))?;
    }
    Ok(())
}

/// Steps by cell, of those of the cells `ids` that have any. What an interruption left beside them is not read, and a cell
/// whose steps are both in a file of its own and in the joined one has them from its own.
pub(super) fn read(
    folder: &Path,
    ids: &HashSet<String>,
) -> Result<HashMap<String, Vec<StepRecord>>, StoreError> {
    let mut found: HashMap<String, Vec<StepRecord>> = HashMap::new();
    for id in ids {
        let path = cell_file(folder, id);
        if path.exists() {
            let rows = read_file(&path)?.into_iter().filter(|(key, _)| key.id() == *id);
            found.insert(id.clone(), rows.map(|(_, step)| step).collect());
        }
    }
    let joined = file(folder);
    if joined.exists() {
        let own: HashSet<String> = found.keys().cloned().collect();
        for (key, step) in read_file(&joined)? {
            let id = key.id();
            if ids.contains(&id) && !own.contains(&id) {
                found.entry(id).or_default().push(step);
            }
        }
    }
    Ok(found)
}

fn read_file(path: &Path) -> Result<Vec<(CellKey, StepRecord)>, StoreError> {
    let table = read_parquet(path)?;
    let columns = Columns { path, table: &table };
    let mut steps = vec![StepRecord::default(); table.height()];
    for (name, get) in SLOTS {
        steps.iter_mut().zip(columns.u64(name)?).for_each(|(s, v)| *get(s) = v);
    }
    for (name, get) in TIMES {
        steps.iter_mut().zip(columns.f64(name)?).for_each(|(s, v)| *get(s) = v);
    }
    for (name, get) in COUNTS {
        steps.iter_mut().zip(columns.u32(name)?).for_each(|(s, v)| *get(s) = v);
    }
    for (name, get) in NEWER_COUNTS {
        if table.column(name).is_ok() {
            steps.iter_mut().zip(columns.u32(name)?).for_each(|(s, v)| *get(s) = v);
        }
    }
    for (name, get) in NEWER_SLOTS {
        if table.column(name).is_ok() {
            steps.iter_mut().zip(columns.u64(name)?).for_each(|(s, v)| *get(s) = v);
        }
    }
    Ok(columns.keys()?.into_iter().zip(steps).collect())
}

/// The cells' files again from a joined one, for a run that goes on after its end. A cell without steps, as one that
/// was packed, gets no file.
pub(super) fn split(folder: &Path, stored: &Stored) -> Result<(), StoreError> {
    let steps = folder.join("steps");
    fs::create_dir_all(&steps).map_err(|e| StoreError::io(&steps, e))?;
    for cell in &stored.cells {
        let id = cell.key.id();
        if let Some(steps) = stored.steps.get(&id) {
            write_cell(folder, &cell.key, steps)?;
        }
    }
    let known: HashSet<PathBuf> = stored.cells.iter().map(|c| cell_file(folder, &c.key.id())).collect();
    for path in cell_files(folder)?.iter().filter(|path| !known.contains(*path)) {
        fs::remove_file(path).map_err(|e| StoreError::io(path, e))?;
    }
    let joined = file(folder);
    if joined.exists() {
        fs::remove_file(&joined).map_err(|e| StoreError::io(&joined, e))?;
    }
    Ok(())
}
