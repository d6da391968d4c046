//! The numbers of Quire: matrix products, attention, normalization and sampling.
//!
//! A model is written once over [`Backend`]; `cpu` implements it with AVX-512, AVX2, NEON and portable paths, and
//! `reference` holds the float64 versions that tests compare with. `clocks` reads a GPU's clocks and power while something is
//! measured.

mod backend;
pub mod clocks;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod generated;
mod group;
mod matrix;
pub mod quant;
pub mod reference;
pub mod sampling;

pub use backend::{
    AttentionBatch, Backend, FED, GeneratedMatrix, HeadShape, KvDtype, KvIndex, KvShape, NO_SLOT,
    QkTransform, StepInput, SwapDirection,
};
pub use error::KernelError;
pub use group::Group;
pub use matrix::{MatrixSource, WeightFormat};
