//! A file in memory.

use std::fs::File;
use std::io::Read;
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
        let io = |error| EngineError::Io { path: path.to_owned(), error };
        let file = open_file(path)?;
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

/// Opens what is a file, symbolic links followed: a pipe would keep its opener waiting, a device may have no end.
fn open_file(path: &Path) -> Result<File, EngineError> {
    let io = |error| EngineError::Io { path: path.to_owned(), error };
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(EngineError::Model { path: path.to_owned(), what: "this is not a file".into() });
    }
    File::open(path).map_err(io)
}

/// Reads a small file whole: configuration and templates, which have no business being larger than `limit`.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, EngineError> {
    let mut bytes = Vec::new();
    // What a file says of its length is not always what can be read.
    let read = open_file(path)?.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|error| EngineError::Io { path: path.to_owned(), error })?;
    if bytes.len() as u64 > limit {
        let what = format!("it has more than the {limit} bytes that such a file may have");
        return Err(EngineError::Model { path: path.to_owned(), what });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_are_read_to_their_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, [7; 20]).unwrap();
        assert_eq!(read_small(&path, 20).unwrap(), [7; 20]);
        assert!(read_small(&path, 19).unwrap_err().to_string().contains("more than the 19 bytes"));
        assert!(read_small(folder.path(), 20).unwrap_err().to_string().contains("not a file"));
    }

    #[cfg(unix)]
    #[test]
    fn devices_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(read_small(&path, 20).unwrap_err().to_string().contains("not a file"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_length_that_is_understated_is_no_way_around_the_limit() {
        let path = Path::new("/proc/self/status");
        assert_eq!(std::fs::metadata(path).unwrap().len(), 0);
        assert!(read_small(path, 20).unwrap_err().to_string().contains("more than the 20 bytes"));
    }
}
