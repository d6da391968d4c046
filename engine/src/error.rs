//! The engine's errors: what a caller can do something about.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file that is wrong, truncated or hostile.
    #[error("{path}: {what}", path = path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and where.
        what: String,
    },
    /// A file that cannot be read.
    #[error("{path}: {error}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why. No `source`: the text has it, and a chain would say it twice.
        error: std::io::Error,
    },
    /// Settings that cannot work together.
    #[error("{0}")]
    Config(String),
    /// A policy planned what cannot be.
    #[error("the policy's plan {0}")]
    Plan(String),
    /// A kernel's refusal.
    #[error(transparent)]
    Kernel(#[from] quire_kernels::KernelError),
    /// The tokenizer or template failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The engine's thread is gone.
    #[error("the engine stopped: {0}")]
    Stopped(String),
}
