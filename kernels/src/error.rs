//! What can go wrong in preparing kernels' inputs. Kernels themselves do not fail.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Sizes that do not fit together.
    #[error("{0}")]
    Shape(String),
    /// Memory that could not be had.
    #[error("cannot allocate {bytes} bytes for {what}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: usize,
    },
    /// A GPU that cannot be used, or that failed.
    #[error("{0}")]
    Device(String),
    /// An instruction set that was asked for and that this machine lacks.
    #[error("this machine does not support {0}")]
    Unsupported(&'static str),
}
