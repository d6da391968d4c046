//! One run of parts that ran apart.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::folder::{make, refuse_a_run, refuse_another};
use super::{RunFolder, StoreError, Stored, check, read};
use crate::record::CellKey;

/// Makes one run in the new folder `dest` of `parts`: runs of cells of one matrix, none of them in two, on machines of one
/// kind. Cells lie in the matrix's order. The parts stay as they are.
///
/// # Errors
/// When a part is no run or does not go with the first, when there are no parts, or `dest` is a run or cannot be
/// written.
pub fn join(parts: &[PathBuf], dest: &Path) -> Result<(), StoreError> {
    refuse_a_run(dest)?;
    let [first, others @ ..] = parts else {
        return Err(StoreError::Refused("there are no parts to join".into()));
    };
    let mut whole = read(first)?;
    let mut known: HashSet<String> = whole.cells.iter().map(|c| c.key.id()).collect();
    for path in others {
        let mut part = read(path)?;
        refuse_another(path, &whole.manifest, &part.manifest)?;
        if let Some(twice) = part.cells.iter().find(|c| !known.insert(c.key.id())) {
            let what = format!("{}: {} is in a part before it already", path.display(), twice.key);
            return Err(StoreError::Refused(what));
        }
        let sittings = whole.manifest.sittings.len() as u32;
        part.cells.iter_mut().for_each(|cell| cell.sitting += sittings);
        whole.manifest.extend(&part.manifest);
        whole.cells.extend(part.cells);
        whole.requests.extend(part.requests);
        whole.steps.extend(part.steps);
    }
    check::workloads(dest, &whole.cells)?;
    sort(&mut whole);
    RunFolder::open(dest, make(dest)?, whole)?.finish()
}

/// Puts cells and requests into the order of the matrix.
fn sort(run: &mut Stored) {
    let cells = run.manifest.settings.cells();
    let places: HashMap<String, usize> = cells.iter().enumerate().map(|(i, key)| (key.id(), i)).collect();
    let place = |key: &CellKey| places.get(&key.id()).copied().unwrap_or(usize::MAX);
    run.cells.sort_by_cached_key(|cell| place(&cell.key));
    run.requests.sort_by_cached_key(|row| place(&row.key));
}
