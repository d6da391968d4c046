//! A run's folder: written cell by cell, so that an interruption loses at most the cell under way.
//!
//! | file | rows |
//! |---|---|
//! | manifest.json | what ran, where, from which source |
//! | cells.jsonl | a row a cell, written after all else of that cell |
//! | records.jsonl | a row a request; records.parquet in the packed form |
//! | steps/ | a file a cell while the run goes on; joined into steps.parquet at its end; none in the packed form |

mod check;
mod folder;
mod join;
mod lock;
mod packed;
mod steps;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use quire_workloads::StepRecord;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::replace::replace;

pub use folder::RunFolder;
pub(crate) use folder::{differing_settings, refuse_a_run};
pub use join::join;
pub use packed::{PACKED_LIMIT_BYTES, pack, size};

use crate::frame::FrameError;
use crate::manifest::{Manifest, SCHEMA_VERSION};
use crate::record::{CellEntry, RequestRow};

/// An error of reading or writing a run.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file that cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why. No `source`: the text has it, and a chain would say it twice.
        error: std::io::Error,
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
    pub(crate) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), error }
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
    /// Steps by cell, of the cells that have them: those that were packed have none any more.
    pub steps: HashMap<String, Vec<StepRecord>>,
}

/// Reads a run's folder, full, interrupted or packed.
///
/// # Errors
/// When it is no run, is damaged, or is of another schema.
pub fn read(folder: &Path) -> Result<Stored, StoreError> {
    let manifest = read_manifest(folder)?;
    let path = folder.join("cells.jsonl");
    let cells: Vec<CellEntry> = read_lines(&path)?;
    check::cells(&path, &manifest, &cells)?;
    let (path, mut requests) = match packed::file(folder) {
        packed if packed.exists() => (packed.clone(), packed::read_records(&packed)?),
        _ => {
            let path = folder.join("records.jsonl");
            (path.clone(), read_lines::<RequestRow>(&path)?)
        }
    };
    // Requests without a row of their cell are of a cell that was interrupted.
    let known: HashSet<String> = cells.iter().map(|c| c.key.id()).collect();
    requests.retain(|r| known.contains(&r.key.id()));
    check::requests(&path, &requests)?;
    for row in &mut requests {
        row.record.synthetic |= manifest.settings.is_synthetic(&row.key.system);
    }
    let steps = steps::read(folder, &known)?;
    Ok(Stored { manifest, cells, requests, steps })
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
            let what = if crate::traces::is_record(folder) {
                "a figure of traces has no cells: it can be plotted and packed only"
            } else if crate::micro::is_record(folder) {
                "a micro-benchmark has no cells: it can be plotted and packed only"
            } else {
                "no manifest.json here: this is not the folder of a run"
            };
            let what = format!("{}: {what}", folder.display());
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
    let mut manifest: Manifest =
        serde_json::from_str(&text).map_err(|e| StoreError::content(&path, e.line(), e))?;
    manifest.complete();
    manifest.settings.check_names_and_size().map_err(|what| StoreError::content(&path, 0, what))?;
    Ok(manifest)
}

/// Writes the manifest of a run; whatever interrupts this, a whole manifest is there, the old or the new.
fn write_manifest(folder: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data");
    // JSON has no infinite numbers: such a manifest could never be read.
    if let Err(e) = serde_json::from_str::<Manifest>(&text) {
        return Err(StoreError::Refused(format!("the settings cannot be kept in a manifest: {e}")));
    }
    write_whole(&folder.join("manifest.json"), |out| writeln!(out, "{text}"))
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(StoreError::io(path, e)),
    };
    let mut rows = Vec::new();
    let mut lines = BufReader::new(file).split(b'\n').enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        let line = line.map_err(|e| StoreError::io(path, e))?;
        // The last line may have been cut off by an interruption, within a character too.
        let cut_off = |e: &serde_json::Error| e.is_eof() || std::str::from_utf8(&line).is_err();
        match serde_json::from_slice(&line) {
            Ok(row) => rows.push(row),
            Err(e) if lines.peek().is_none() && cut_off(&e) => {}
            Err(e) => return Err(StoreError::content(path, number + 1, e)),
        }
    }
    Ok(rows)
}

fn append<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), StoreError> {
    let io = |e| StoreError::io(path, e);
    let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
    let mut out = BufWriter::new(file);
    write_rows(&mut out, rows).and_then(|()| out.flush()).map_err(io)
}

fn rewrite<T: Serialize>(path: &Path, rows: &[T]) -> Result<(), StoreError> {
    write_whole(path, |out| write_rows(out, rows))
}

/// Puts a file in its place, whole.
fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), StoreError> {
    let written = |file| {
        let mut out = BufWriter::new(file);
        write(&mut out).and_then(|()| out.flush()).map_err(|e| StoreError::io(path, e))
    };
    replace(path, written, StoreError::io)
}

fn write_rows<T: Serialize>(out: &mut impl Write, rows: &[T]) -> std::io::Result<()> {
    for row in rows {
        serde_json::to_writer(&mut *out, row)?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_last_line_may_be_cut_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines.jsonl");
        let whole = "\"caf\u{e9}\"\n";
        for cut in 0..whole.len() - 1 {
            std::fs::write(&path, [whole.as_bytes(), &whole.as_bytes()[..cut]].concat()).unwrap();
            assert_eq!(read_lines::<String>(&path).unwrap(), ["caf\u{e9}"], "{cut} bytes of the last line");
        }
        std::fs::write(&path, [b"\"\xc3\n", whole.as_bytes()].concat()).unwrap();
        assert!(read_lines::<String>(&path).is_err(), "only the last");
    }
}
