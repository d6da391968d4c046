//! A file in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::EngineError;

/// A memory-mapped file.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let io = |source| EngineError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(EngineError::Model { path: path.to_owned(), what: "this is not a file".into() });
        }
        // SAFETY: the map is only read. As with every mapped model, a process that truncates the file while it is in
        // use can stop this one; no memory of ours is reachable that way.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { path: path.to_owned(), map })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Reads a small file whole: configuration and templates, which have no business being larger than `limit`.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, EngineError> {
    let io = |source| EngineError::Io { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(io)?.len();
    if len > limit {
        return Err(EngineError::Model {
            path: path.to_owned(),
            what: format!("{len} bytes are more than the {limit} that such a file may have"),
        });
    }
    std::fs::read(path).map_err(io)
}
