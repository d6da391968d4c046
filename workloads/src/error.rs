//! What can go wrong with a trace, a specification or a workload file.

use std::path::PathBuf;

/// The error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    /// A file cannot be read or written.
    #[error("{path}: {error}{hint}", hint = hint(.error))]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said. No `source`: the text has it, and a chain would say it twice.
        error: std::io::Error,
    },
    /// The content of a file is wrong at a place.
    #[error("{file}:{line}:{column}: {problem}")]
    Malformed {
        /// The file, as the caller named it.
        file: String,
        /// Line, from 1.
        line: u64,
        /// Byte in the line, from 1.
        column: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A file's first bytes are of no trace format that is known here.
    #[error(
        "{file}: not a known trace: {problem}; state the format if it is one of azure, burst_gpt, mooncake, share_gpt"
    )]
    UnknownFormat {
        /// The file, as the caller named it.
        file: String,
        /// What its beginning lacks.
        problem: String,
    },
    /// A setting has a value that means nothing.
    #[error("{field}: {problem}")]
    Spec {
        /// The setting.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A trace cannot give what was asked of it.
    #[error("{file}: {problem}")]
    Trace {
        /// The file, as the caller named it.
        file: String,
        /// What it lacks.
        problem: String,
    },
}

/// What to do about a trace that is not there.
fn hint(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::NotFound => " (scripts/get-traces fetches traces)",
        _ => "",
    }
}

impl WorkloadError {
    pub(crate) fn spec(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Spec { field, problem: problem.into() }
    }
}

/// Checks that a setting is a finite number above zero.
pub(crate) fn positive(field: &'static str, value: f64) -> Result<(), WorkloadError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(WorkloadError::spec(field, format!("must be a finite number above 0, is {value}")))
}
