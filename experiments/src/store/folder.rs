//! A run's folder while the run goes on: made, resumed, added to.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use quire_workloads::StepRecord;

use super::lock::Lock;
use super::{StoreError, Stored, append, check, packed, read, read_manifest, rewrite, steps, write_manifest};
use crate::manifest::Manifest;
use crate::record::{CellEntry, CellKey, CellStatus, RequestRow};

/// A run's folder, open for writing.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: Lock,
    sitting: u32,
    done: HashMap<String, CellEntry>,
}

impl RunFolder {
    /// Makes the folder of a new run.
    ///
    /// # Errors
    /// When there is a run already, or the folder cannot be written.
    pub fn create(path: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        let lock = make(path)?;
        write_manifest(path, manifest)?;
        fs::create_dir_all(path.join("steps")).map_err(|e| StoreError::io(path, e))?;
        Ok(Self { path: path.to_owned(), _lock: lock, sitting: 0, done: HashMap::new() })
    }

    /// Opens the folder of an interrupted run for one more sitting, and clears away what its last, unfinished cell
    /// left, and void cells. `manifest` is that of a run that would begin now.
    ///
    /// # Errors
    /// When it is no run, a packed one, or one of other settings or of another machine.
    pub fn resume(path: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        if packed::file(path).exists() {
            let hint = "is packed, and a packed run is never changed: add --out NEW to go on in a new folder";
            return Err(StoreError::Refused(format!("{} {hint}", path.display())));
        }
        // What is no run gets no lock.
        read_manifest(path)?;
        let lock = Lock::take(path)?;
        Self::open(path, lock, read_to_go_on(path, manifest)?)
    }

    /// Makes the folder `path` of one more sitting of a run that was packed before it was complete. Of the cells it
    /// had, steps stay away: their figures are kept with the cells.
    ///
    /// # Errors
    /// When `packed` is no packed run, or one of other settings or of another machine, or when `path` is a run already.
    pub fn resume_packed(packed: &Path, path: &Path, manifest: &Manifest) -> Result<Self, StoreError> {
        refuse_a_run(path)?;
        let stored = read_to_go_on(packed, manifest)?;
        if !packed::file(packed).exists() {
            let hint = "is not packed and goes on where it is: leave --out away";
            return Err(StoreError::Refused(format!("{} {hint}", packed.display())));
        }
        Self::open(path, make(path)?, stored)
    }

    /// Writes all of `stored`, the manifest last: before that, a new folder is no run, and in an old one nothing refers
    /// to the new sitting.
    pub(super) fn open(path: &Path, lock: Lock, stored: Stored) -> Result<Self, StoreError> {
        rewrite(&path.join("records.jsonl"), &stored.requests)?;
        rewrite(&path.join("cells.jsonl"), &stored.cells)?;
        steps::split(path, &stored)?;
        write_manifest(path, &stored.manifest)?;
        let sitting = (stored.manifest.sittings.len() - 1) as u32;
        let done = stored.cells.into_iter().map(|c| (c.key.id(), c)).collect();
        Ok(Self { path: path.to_owned(), _lock: lock, sitting, done })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cell of this id, if it is written already.
    pub fn done(&self, id: &str) -> Option<&CellEntry> {
        self.done.get(id)
    }

    /// The cells that are written already.
    pub fn cells(&self) -> impl Iterator<Item = &CellEntry> {
        self.done.values()
    }

    /// Writes a cell of this sitting: its steps and requests first, its own row last.
    ///
    /// # Errors
    /// When it had other requests than the other systems' cells at its rate with its seed, or a file cannot be written.
    pub fn add(
        &mut self,
        mut entry: CellEntry,
        requests: &[RequestRow],
        steps: &[StepRecord],
    ) -> Result<(), StoreError> {
        check::workloads(&self.path, self.done.values().chain([&entry]))?;
        entry.sitting = self.sitting;
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
        steps::join(&self.path, self.done.keys())
    }
}

/// Makes the folder of a new run, for one program.
pub(super) fn make(path: &Path) -> Result<Lock, StoreError> {
    refuse_a_run(path)?;
    fs::create_dir_all(path).map_err(|e| StoreError::io(path, e))?;
    let lock = Lock::take(path)?;
    // Another program may have made one before the lock was taken.
    refuse_a_run(path)?;
    Ok(lock)
}

/// Refuses a folder with records of any kind, of which a new run's would become part.
pub(crate) fn refuse_a_run(path: &Path) -> Result<(), StoreError> {
    let left = ["cells.jsonl", "records.jsonl", "records.parquet", "steps.parquet", "steps"];
    let has = |file: &str| path.join(file).exists();
    let what = if has("manifest.json") {
        "is a run already: choose another --out, or --resume it".into()
    } else if has("traces.json") || has("micro.json") {
        "is a run already: choose another --out".into()
    } else if let Some(file) = left.into_iter().find(|file| has(file)) {
        format!("has {file}, which another run left: choose another --out, or remove it")
    } else {
        return Ok(());
    };
    Err(StoreError::Refused(format!("{} {what}", path.display())))
}

/// Reads a run that is to go on as `now` says, and adds the sitting that begins.
fn read_to_go_on(path: &Path, now: &Manifest) -> Result<Stored, StoreError> {
    let mut stored = read(path)?;
    refuse_another(path, &stored.manifest, now)?;
    forget_void(&mut stored, now);
    stored.manifest.extend(now);
    Ok(stored)
}

/// Takes away the void cells that run again `now`, and those that were left out because of one.
fn forget_void(stored: &mut Stored, now: &Manifest) {
    let again: HashSet<String> = now.settings.cells().iter().map(|key| key.id()).collect();
    let is_void = |cell: &&CellEntry| matches!(cell.status, CellStatus::Void { .. });
    let void = stored.cells.iter().filter(is_void).map(|cell| cell.key.clone());
    let void: Vec<CellKey> = void.filter(|key| again.contains(&key.id())).collect();
    let goes = |cell: &&CellEntry| match cell.status {
        CellStatus::Void { .. } => void.contains(&cell.key),
        CellStatus::Skipped { saturated_at } => void.iter().any(|void| {
            (&void.panel, &void.system, void.rate) == (&cell.key.panel, &cell.key.system, saturated_at)
        }),
        CellStatus::Done {} => false,
    };
    let gone: HashSet<String> = stored.cells.iter().filter(goes).map(|cell| cell.key.id()).collect();
    stored.cells.retain(|cell| !gone.contains(&cell.key.id()));
    stored.requests.retain(|row| !gone.contains(&row.key.id()));
    stored.steps.retain(|id, _| !gone.contains(id));
}

/// Refuses the run at `path` to go together with `now`, unless both have the same settings and kind of machine.
pub(super) fn refuse_another(path: &Path, old: &Manifest, now: &Manifest) -> Result<(), StoreError> {
    let refused = |what: String| Err(StoreError::Refused(format!("{}: {what}", path.display())));
    // The machine first: settings may differ because it does (threads are as many as it has cores).
    if !old.machine.same_as(&now.machine) {
        let [run, here] = [&old.machine, &now.machine].map(|m| m.describe_fully());
        return refused(format!(
            "its machine is another ({run}) than {here}: times of different machines must not be mixed in one run"
        ));
    }
    if old.settings_sha256 != now.settings_sha256 {
        let what = differing_settings(old, now);
        let hint = "a run has one, from its first cell to its last";
        return refused(format!("the settings differ in {what}: {hint}"));
    }
    Ok(())
}

/// Names of the settings that differ.
pub(crate) fn differing_settings(old: &Manifest, new: &Manifest) -> String {
    let fields = |m: &Manifest| serde_json::to_value(&m.settings).unwrap_or_default();
    let (a, b) = (fields(old), fields(new));
    // What has its default is not written: a setting may be in one of them only.
    let keys = [&a, &b].into_iter().filter_map(|fields| fields.as_object()).flat_map(|fields| fields.keys());
    let keys: BTreeSet<&str> = keys.map(String::as_str).collect();
    let differ = keys.into_iter().filter(|key| *key != "only" && a.get(key) != b.get(key));
    differ.collect::<Vec<_>>().join(", ")
}
