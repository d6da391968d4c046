//! Whether what was read can be one run: a folder may come from anywhere, and be what is left of several.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::StoreError;
use crate::manifest::Manifest;
use crate::names;
use crate::record::{CellEntry, RequestRow};

/// Checks that cells are of this manifest, each there once, and had the same requests where they should.
pub(super) fn cells(path: &Path, manifest: &Manifest, cells: &[CellEntry]) -> Result<(), StoreError> {
    let mut ids = HashSet::new();
    for (i, cell) in cells.iter().enumerate() {
        let wrong = |what: String| Err(StoreError::content(path, i + 1, what));
        let named = names::check("a panel's name", &cell.key.panel)
            .and_then(|()| names::check("a system's name", &cell.key.system));
        if let Err(what) = named {
            return wrong(what);
        }
        if cell.sitting as usize >= manifest.sittings.len() {
            return wrong(format!("the run has no sitting {}", cell.sitting));
        }
        if !ids.insert(cell.key.id()) {
            return wrong(format!("{} is there twice", cell.key));
        }
    }
    workloads(path, cells)
}

/// Checks that all systems had the same requests at each rate with each seed.
pub(super) fn workloads<'a>(
    path: &Path,
    cells: impl IntoIterator<Item = &'a CellEntry>,
) -> Result<(), StoreError> {
    let mut first = HashMap::new();
    // What was left out had no workload.
    for cell in cells.into_iter().filter(|cell| !cell.workload_sha256.is_empty()) {
        let place = (&cell.key.panel, cell.key.rate.to_bits(), cell.key.seed);
        let other: &CellEntry = first.entry(place).or_insert(cell);
        if other.workload_sha256 != cell.workload_sha256 {
            let what =
                format!("{} had other requests than {}: is their trace the same?", cell.key, other.key);
            return Err(StoreError::content(path, 0, what));
        }
    }
    Ok(())
}

/// Checks that each request of a cell is there once.
pub(super) fn requests(path: &Path, rows: &[RequestRow]) -> Result<(), StoreError> {
    let mut seen = HashSet::new();
    match rows.iter().find(|row| !seen.insert((row.key.id(), row.request()))) {
        Some(row) => {
            let what = format!("request {} of {} is there twice", row.request(), row.key);
            Err(StoreError::content(path, 0, what))
        }
        None => Ok(()),
    }
}
