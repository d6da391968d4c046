//! A run's folder: written cell by cell, so that an interruption loses at most the cell under way.
//!
//! | file | rows |
//! |---|---|
//! | manifest.json | what ran, where, from which source |
//! | cells.jsonl | a row a cell, written after all else of that cell |
//! | records.jsonl | a row a request; records.parquet in the packed form |
//! | steps/ | a file a cell while the run goes on; joined into steps.parquet at its end |

mod packed;
mod steps;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use quire_workloads::StepRecord;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use packed::{PACKED_LIMIT_BYTES, pack};

use crate::frame::FrameError;
use crate::manifest::{Manifest, SCHEMA_VERSION};
use crate::record::{CellEntry, RequestRow};

/// An error of reading or writing a run.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}{line}: {what}", line = if *.line > 0 { format!(":{}", .line) } else { String::new() })]
    Content {
        /// The file.
        path: String,
        /// Line, from 1; 0 for the whole file.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A table that cannot be read or written.
    #[error(transparent)]
    Table(#[from] FrameError),
    /// Something in the way.
    #[error("{0}")]
    Refused(String),
}

impl StoreError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }
    pub(crate) fn content(path: &Path, line: usize, what: impl ToString) -> Self {
        Self::Content { path: path.display().to_string(), line, what: what.to_string() }
    }
}

/// A run as it lies in its folder.
#[derive(Debug)]
pub struct Stored {
    /// What ran.
    pub manifest: Manifest,
    /// Its cells.
    pub cells: Vec<CellEntry>,
    /// Requests of those cells.
    pub requests: Vec<RequestRow>,
    /// Steps by cell; none in a packed run.
    pub steps: Option<HashMap<String, Vec<StepRecord>>>,
}

/// Reads a run's folder, full, interrupted or packed.
///
/// # Errors
/// When it is no run, is damaged, or is of another schema.
pub fn read(folder: &Path) -> Result<Stored, StoreError> {
    let manifest = read_manifest(folder)?;
    let cells: Vec<CellEntry> = read_lines(&folder.join("cells.jsonl"))?;
    let packed = folder.join("records.parquet");
    let mut requests: Vec<RequestRow> = if packed.exists() {
        packed::read_records(&packed)?
    } else {
        read_lines(&folder.join("records.jsonl"))?
    };
    // Requests without a row of their cell are of a cell that was interrupted.
    let known: HashSet<String> = cells.iter().map(|c| c.key.id()).collect();
    requests.retain(|r| known.contains(&r.key.id()));
    Ok(Stored { manifest, cells, requests, steps: steps::read(folder)? })
}

/// Reads the manifest of a run.
///
/// # Errors
/// When there is none, or it is of another schema.
pub fn read_manifest(folder: &Path) -> Result<Manifest, StoreError> {
    #[derive(serde::Deserialize)]
    struct Version {
        schema_version: u32,
    }
    let path = folder.join("manifest.json");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let what =
                format!("{}: no manifest.json here: this is not the folder of a run", folder.display());
            return Err(StoreError::Refused(what));
        }
        Err(e) => return Err(StoreError::io(&path, e)),
    };
    // The version first: another version's fields would be reported as wrong.
    let version: Version =
        serde_json::from_str(&text).map_err(|e| StoreError::content(&path, e.line(), e))?;
    if version.schema_version != SCHEMA_VERSION {
        let what = format!(
            "records of schema {}; this program reads schema {SCHEMA_VERSION}: use the version that made the run",
            version.schema_version
        );
        return Err(StoreError::content(&path, 0, what));
    }
    serde_json::from_str(&text).map_err(|e| StoreError::content(&path, e.line(), e))
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(path, e)),
    };
    let mut rows = Vec::new();
    let mut lines = BufReader::new(file).lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        let line = line.map_err(|e| StoreError::io(path, e))?;
        match serde_json::from_str(&line) {
            Ok(row) => rows.push(row),
            // The last line may have been cut off by an interruption.
            Err(e) if lines.peek().is_none() && e.is_eof() => {}
            Err(e) => return Err(StoreError::content(path, number + 1, e)),
        }
    }
    Ok(rows)
}

/// A run's folder, open for writing.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    done: HashMap<String, CellEntry>,
}

impl RunFolder {
    /// Makes the folder of a new run.
    ///
    /// # Errors
    /// When there is a run already, or the folder cannot be written.
    pub fn create(path: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        if path.join("manifest.json").exists() {
            let hint = "is a run already: choose another --out, or --resume it";
            return Err(StoreError::Refused(format!("{} {hint}", path.display())));
        }
        fs::create_dir_all(path.join("steps")).map_err(|e| StoreError::io(path, e))?;
        let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data");
        let file = path.join("manifest.json");
        fs::write(&file, text + "\n").map_err(|e| StoreError::io(&file, e))?;
        Ok(Self { path: path.to_owned(), done: HashMap::new() })
    }

    /// Opens the folder of an interrupted run and clears away what its last, unfinished cell left.
    ///
    /// # Errors
    /// When it is no run, or one of other settings.
    pub fn resume(path: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        let old = read_manifest(path)?;
        if old.settings_sha256 != manifest.settings_sha256 {
            let what = differing_settings(&old, manifest);
            let hint = "a run can only be resumed with the settings it began with";
            return Err(StoreError::Refused(format!(
                "{}: the settings differ in {what}: {hint}",
                path.display()
            )));
        }
        if path.join("records.parquet").exists() {
            return Err(StoreError::Refused(format!("{} is packed and complete", path.display())));
        }
        let stored = read(path)?;
        rewrite(&path.join("records.jsonl"), &stored.requests)?;
        rewrite(&path.join("cells.jsonl"), &stored.cells)?;
        steps::split(path, &stored)?;
        let done = stored.cells.into_iter().map(|c| (c.key.id(), c)).collect();
        Ok(Self { path: path.to_owned(), done })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cell of this id, if it is written already.
    pub fn done(&self, id: &str) -> Option<&CellEntry> {
        self.done.get(id)
    }

    /// Writes a cell: its steps and requests first, its own row last.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn add(
        &mut self,
        entry: CellEntry,
        requests: &[RequestRow],
        steps: &[StepRecord],
    ) -> Result<(), StoreError> {
        steps::write_cell(&self.path, &entry.key, steps)?;
        append(&self.path.join("records.jsonl"), requests)?;
        append(&self.path.join("cells.jsonl"), std::slice::from_ref(&entry))?;
        self.done.insert(entry.key.id(), entry);
        Ok(())
    }

    /// Joins the cells' steps into one file.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(self) -> Result<(), StoreError> {
        steps::join(&self.path)
    }
}

/// Names of the settings that differ.
pub(crate) fn differing_settings(old: &Manifest, new: &Manifest) -> String {
    let fields = |m: &Manifest| serde_json::to_value(&m.settings).unwrap_or_default();
    let (a, b) = (fields(old), fields(new));
    let names = a.as_object().into_iter().flatten().filter(|(key, value)| b.get(key) != Some(value));
    names.map(|(key, _)| key.as_str()).collect::<Vec<_>>().join(", ")
}

fn append<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), StoreError> {
    let io = |e| StoreError::io(path, e);
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
    write_rows(BufWriter::new(file), rows).map_err(io)
}

fn rewrite<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), StoreError> {
    let temporary = path.with_extension("new");
    let io = |e| StoreError::io(&temporary, e);
    write_rows(BufWriter::new(File::create(&temporary).map_err(io)?), rows).map_err(io)?;
    fs::rename(&temporary, path).map_err(|e| StoreError::io(path, e))
}

fn write_rows<T: Serialize>(mut out: impl Write, rows: &[T]) -> std::io::Result<()> {
    for row in rows {
        serde_json::to_writer(&mut out, row)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
