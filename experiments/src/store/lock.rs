//! One writer at a time.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::StoreError;

/// The right to write to a run's folder. However its program ends, the next one can have it.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes it.
    ///
    /// # Errors
    /// When another program has it, or the folder cannot be written.
    pub(super) fn take(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("lock");
        let file = File::create(&path).map_err(|e| StoreError::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            // Some file systems have no locks, and runs can be made on them all the same.
            Err(TryLockError::Error(e)) if e.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(StoreError::io(&path, e)),
            Err(TryLockError::WouldBlock) => {
                let what = "another program writes to it: wait for its end, or choose another folder";
                return Err(StoreError::Refused(format!("{}: {what}", folder.display())));
            }
        }
        Ok(Self { path, _file: file })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // What stays behind locks nothing.
        let _ = fs::remove_file(&self.path);
    }
}
