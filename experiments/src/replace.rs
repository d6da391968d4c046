//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Writes a file beside `path` and then puts it in its place: whatever interrupts this, nothing of half a file is there.
/// `failed` makes an error of one with a file.
pub(crate) fn replace<E>(
    path: &Path,
    write: impl FnOnce(File) -> Result<(), E>,
    failed: impl Fn(&Path, io::Error) -> E,
) -> Result<(), E> {
    let temporary = path.with_extension("new");
    write(File::create(&temporary).map_err(|e| failed(&temporary, e))?)?;
    fs::rename(&temporary, path).map_err(|e| failed(path, e))
}
