//! Where a model's weights come from: files of two kinds, or a generator of random ones.

use std::borrow::Cow;

use quire_kernels::{GeneratedMatrix, KernelError, MatrixSource, WeightFormat};

use crate::EngineError;

/// One of a model's tensors, by what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightRole {
    /// Token embedding, `[vocab, hidden]`.
    Embedding,
    /// Norm before the output projection.
    FinalNorm,
    /// Output projection of untied models, `[vocab, hidden]`.
    OutputHead,
    /// A tensor of a layer.
    Layer(usize, LayerWeight),
}

/// A tensor of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerWeight {
    /// Norm before attention.
    AttentionNorm,
    /// Query projection.
    Query,
    /// Key projection.
    Key,
    /// Value projection.
    Value,
    /// Its bias.
    QueryBias,
    /// Its bias.
    KeyBias,
    /// Its bias.
    ValueBias,
    /// Norm of each query head.
    QueryNorm,
    /// Norm of each key head.
    KeyNorm,
    /// Attention's output projection.
    Output,
    /// Its bias.
    OutputBias,
    /// Norm before the feed-forward layer.
    FfnNorm,
    /// Gate projection.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
}

/// A matrix in host memory, borrowed from a mapped file where it could be.
#[derive(Debug, Clone)]
pub struct HostMatrix<'a> {
    /// Storage format.
    pub format: WeightFormat,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The stored bytes.
    pub bytes: Cow<'a, [u8]>,
}

impl HostMatrix<'_> {
    /// The kernels' view of it.
    ///
    /// # Errors
    /// When the bytes do not fit the shape.
    pub fn source(&self) -> Result<MatrixSource<'_>, KernelError> {
        MatrixSource::new(self.format, self.rows, self.cols, &self.bytes)
    }
}

/// A source of a model's weights.
pub trait WeightSource {
    /// The matrix for `role`, which must have this shape.
    ///
    /// # Errors
    /// When it is missing, misshapen or stored in a format that is not supported; the error names it.
    fn matrix(&self, role: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError>;

    /// How a device makes the matrix for `role`, of this shape, where weights are generated and not read.
    fn generated(&self, role: WeightRole, rows: usize, cols: usize) -> Option<GeneratedMatrix> {
        let _ = (role, rows, cols);
        None
    }

    /// The vector for `role`, which must have this length.
    ///
    /// # Errors
    /// As for [`Self::matrix`].
    fn vector(&self, role: WeightRole, len: usize) -> Result<Vec<f32>, EngineError>;
}
