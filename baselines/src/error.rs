//! What can go wrong in this crate.

use std::path::PathBuf;

/// An error of building or running a baseline.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// The model's description cannot be used.
    #[error("model configuration: {0}")]
    Config(String),
    /// A weight is missing or has the wrong number of elements.
    #[error("weight {name}: {reason}")]
    Weight {
        /// Its Hugging Face name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of a model folder cannot be read.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// candle refused an operation.
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    /// The system was given settings that cannot work.
    #[error("options: {0}")]
    Options(String),
    /// A thread or a thread pool could not be started.
    #[error("threads: {0}")]
    Threads(String),
}
