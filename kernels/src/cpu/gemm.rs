//! Matrix products with packed weights.

use crate::cpu::{Isa, ThreadPool};
use crate::{KernelError, MatrixSource, WeightFormat, quant};

/// A weight matrix prepared for products on the CPU.
#[derive(Debug)]
pub struct PackedMatrix {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl PackedMatrix {
    /// Prepares `source` for `isa`.
    ///
    /// # Errors
    /// When the machine lacks `isa`, or the memory.
    pub fn pack(isa: Isa, source: MatrixSource<'_>) -> Result<Self, KernelError> {
        isa.require()?;
        Ok(Self {
            format: source.format(),
            rows: source.rows(),
            cols: source.cols(),
            bytes: source.bytes().to_vec(),
        })
    }

    /// Prepares `parts`, stacked along their rows, as few matrices: neighbours of one format become one.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), and when the parts differ in columns.
    pub fn pack_stack(isa: Isa, parts: &[MatrixSource<'_>]) -> Result<Vec<Self>, KernelError> {
        if parts.windows(2).any(|pair| pair[0].cols() != pair[1].cols()) {
            return Err(KernelError::Shape("stacked matrices differ in columns".into()));
        }
        parts.iter().map(|&part| Self::pack(isa, part)).collect()
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
    /// The format it was packed from.
    pub fn format(&self) -> WeightFormat {
        self.format
    }
    /// Decodes row `row` into `out`, of `cols` elements.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let stride = self.bytes.len() / self.rows;
        quant::dequantize(self.format, &self.bytes[row * stride..][..stride], out)
            .expect("out has cols elements");
    }
}

/// Memory that products reuse from call to call.
#[derive(Debug, Default)]
pub struct MatmulScratch {
    row: Vec<f32>,
}

impl MatmulScratch {
    /// Empty; grows in the first products.
    pub fn new() -> Self {
        Self::default()
    }
}

/// `out = x * weights^T + bias`: `x` is `[rows, cols]`, `out` is `[rows, n]` with `n` the sum of the weights' rows.
#[allow(clippy::too_many_arguments)]
pub fn matmul(
    _pool: &ThreadPool,
    _isa: Isa,
    x: &[f32],
    rows: usize,
    weights: &[PackedMatrix],
    bias: Option<&[f32]>,
    out: &mut [f32],
    scratch: &mut MatmulScratch,
) {
    let n: usize = weights.iter().map(|w| w.rows).sum();
    let mut col = 0;
    for weight in weights {
        scratch.row.resize(weight.cols, 0.0);
        for r in 0..weight.rows {
            weight.dequantize_row(r, &mut scratch.row);
            for i in 0..rows {
                let x = &x[i * weight.cols..][..weight.cols];
                let dot: f32 = x.iter().zip(&scratch.row).map(|(a, b)| a * b).sum();
                out[i * n + col] = dot + bias.map_or(0.0, |b| b[col]);
            }
            col += 1;
        }
    }
}
