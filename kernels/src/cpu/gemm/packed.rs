//! Weights in panels of 16 interleaved outputs.

use super::simd::LANES;
use crate::cpu::{AlignedBuffer, Isa};
use crate::quant::{self, Group, dequantize, unpack_block};
use crate::{KernelError, MatrixSource, WeightFormat};
use half::f16;

/// How a panel's weights lie in memory, and with which kernel they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// A vector of 16 f32 for each `k`.
    F32,
    /// A vector of 16 f16 for each `k`.
    F16,
    /// A vector of 16 pairs of bf16 for each two of `k`.
    Bf16,
    /// Unsigned bytes with offset 128, in groups of 32: Q8_0.
    Int8,
    /// Nibbles with offset 8, in groups of 32: Q4_0.
    Int4,
    /// Nibbles with a minimum for each group of 32: Q4_1, Q4_K.
    Int4Min,
    /// Bytes below 64 with offset 32, in groups of 16: Q6_K.
    Int6,
}

impl Scheme {
    fn of(format: WeightFormat) -> Self {
        match format {
            WeightFormat::F32 => Scheme::F32,
            WeightFormat::F16 => Scheme::F16,
            WeightFormat::Bf16 => Scheme::Bf16,
            WeightFormat::Q8_0 => Scheme::Int8,
            WeightFormat::Q4_0 => Scheme::Int4,
            WeightFormat::Q4_1 | WeightFormat::Q4K => Scheme::Int4Min,
            WeightFormat::Q6K => Scheme::Int6,
        }
    }

    pub(super) fn is_int(self) -> bool {
        self.group() != 1
    }

    /// Elements of `k` that share a scale.
    pub(super) fn group(self) -> usize {
        match self {
            Scheme::F32 | Scheme::F16 | Scheme::Bf16 => 1,
            Scheme::Int8 | Scheme::Int4 | Scheme::Int4Min => 32,
            Scheme::Int6 => 16,
        }
    }

    /// What an unsigned value of zero stands for, negated, in units of the scale; `None` where it is a minimum.
    pub(super) fn offset(self) -> Option<i32> {
        match self {
            Scheme::Int8 => Some(128),
            Scheme::Int4 => Some(8),
            Scheme::Int6 => Some(32),
            Scheme::F32 | Scheme::F16 | Scheme::Bf16 | Scheme::Int4Min => None,
        }
    }

    /// Bytes of a panel's scales (and minimums), in front of its weights: f16, for each group.
    fn scale_bytes(self, cols: usize) -> usize {
        let vectors = match self {
            Scheme::F32 | Scheme::F16 | Scheme::Bf16 => 0,
            Scheme::Int8 | Scheme::Int4 | Scheme::Int6 => cols / self.group(),
            Scheme::Int4Min => 2 * (cols / self.group()),
        };
        (vectors * 2 * LANES).next_multiple_of(64)
    }

    /// Bytes of a panel's weights.
    fn weight_bytes(self, cols: usize) -> usize {
        match self {
            Scheme::F32 => cols * 4 * LANES,
            Scheme::F16 => (cols * 2 * LANES).next_multiple_of(64),
            Scheme::Bf16 => cols.div_ceil(2) * 4 * LANES,
            Scheme::Int8 | Scheme::Int6 => cols * LANES,
            Scheme::Int4 | Scheme::Int4Min => cols * LANES / 2,
        }
    }

    /// Offset in a panel's weights of element `k` of output `lane`; for nibbles, of the byte that holds it.
    fn weight_at(self, k: usize, lane: usize) -> usize {
        match self {
            Scheme::F32 => (k * LANES + lane) * 4,
            Scheme::F16 => (k * LANES + lane) * 2,
            Scheme::Bf16 => (k / 2 * LANES + lane) * 4 + k % 2 * 2,
            Scheme::Int8 | Scheme::Int6 => (k / 4 * LANES + lane) * 4 + k % 4,
            // Half a group further, the same byte's high nibble.
            Scheme::Int4 | Scheme::Int4Min => {
                let half = k / 32 * 16 + k % 16;
                (half / 4 * LANES + lane) * 4 + half % 4
            }
        }
    }

    /// Whether two elements share a byte.
    fn is_nibbles(self) -> bool {
        matches!(self, Scheme::Int4 | Scheme::Int4Min)
    }

    /// Shift of element `k` in its byte.
    fn shift(self, k: usize) -> usize {
        if self.is_nibbles() { k % 32 / 16 * 4 } else { 0 }
    }
}

/// A weight matrix prepared for products on the CPU.
///
/// The floating-point formats keep their values; so do Q8_0, Q4_0 and Q4_1. Q4_K and Q6_K have two levels of scales,
/// whose product is rounded to f16 (a relative error of at most 2^-11 of a group's scale, against quantization
/// steps of 2^-4 and 2^-6 of its range).
#[derive(Debug)]
pub struct PackedMatrix {
    format: WeightFormat,
    scheme: Scheme,
    rows: usize,
    cols: usize,
    scale_bytes: usize,
    panel_bytes: usize,
    data: AlignedBuffer<u8>,
}

impl PackedMatrix {
    /// Prepares `source` for products on `isa`.
    ///
    /// # Errors
    /// When the machine lacks `isa`, or the memory.
    pub fn pack(isa: Isa, source: MatrixSource<'_>) -> Result<Self, KernelError> {
        Self::pack_run(isa, &[source])
    }

    /// Prepares `parts`, stacked along their rows, as few matrices: neighbours of one format become one.
    ///
    /// # Errors
    /// As [`pack`](Self::pack), and when the parts differ in columns.
    pub fn pack_stack(isa: Isa, parts: &[MatrixSource<'_>]) -> Result<Vec<Self>, KernelError> {
        if parts.windows(2).any(|pair| pair[0].cols() != pair[1].cols()) {
            return Err(KernelError::Shape("stacked matrices differ in columns".into()));
        }
        parts.chunk_by(|a, b| a.format() == b.format()).map(|run| Self::pack_run(isa, run)).collect()
    }

    /// One matrix of parts of one format and the same columns.
    fn pack_run(isa: Isa, parts: &[MatrixSource<'_>]) -> Result<Self, KernelError> {
        isa.require()?;
        let (format, cols) = (parts[0].format(), parts[0].cols());
        let scheme = Scheme::of(format);
        let rows = parts.iter().map(MatrixSource::rows).sum::<usize>();
        let (scale_bytes, weight_bytes) = (scheme.scale_bytes(cols), scheme.weight_bytes(cols));
        let panel_bytes = scale_bytes + weight_bytes;
        let bytes = rows.div_ceil(LANES).saturating_mul(panel_bytes);
        let mut packed = Self {
            format,
            scheme,
            rows,
            cols,
            scale_bytes,
            panel_bytes,
            data: AlignedBuffer::zeroed(bytes, "a packed weight matrix")?,
        };
        let row_bytes = |part: &MatrixSource<'_>| part.bytes().len() / part.rows();
        let sources = parts.iter().flat_map(|part| part.bytes().chunks_exact(row_bytes(part)));
        for (row, source) in sources.enumerate() {
            packed.pack_row(row, source);
        }
        Ok(packed)
    }

    /// Writes one output's weights into its lane.
    fn pack_row(&mut self, row: usize, source: &[u8]) {
        let (scheme, format, lane) = (self.scheme, self.format, row % LANES);
        let panel = &mut self.data[row / LANES * self.panel_bytes..][..self.panel_bytes];
        let (scales, weights) = panel.split_at_mut(self.scale_bytes);
        if !scheme.is_int() {
            let size = format.block_bytes();
            for (k, value) in source.chunks_exact(size).enumerate() {
                weights[scheme.weight_at(k, lane)..][..size].copy_from_slice(value);
            }
            return;
        }
        let (block_elements, group) = (format.block_elements(), scheme.group());
        let (mut values, mut groups) = ([0u8; 256], [Group { scale: 0.0, min: 0.0 }; 16]);
        for (block, bytes) in source.chunks_exact(format.block_bytes()).enumerate() {
            unpack_block(format, bytes, &mut values, &mut groups);
            for (i, &Group { scale, min }) in groups.iter().enumerate().take(block_elements / group) {
                let g = block * (block_elements / group) + i;
                if scheme.offset().is_some() {
                    put_f16(scales, g * LANES + lane, scale);
                } else {
                    put_f16(scales, 2 * g * LANES + lane, scale);
                    put_f16(scales, (2 * g + 1) * LANES + lane, min);
                }
            }
            for (i, &value) in values.iter().enumerate().take(block_elements) {
                let k = block * block_elements + i;
                weights[scheme.weight_at(k, lane)] |= value << scheme.shift(k);
            }
        }
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
        self.data.len()
    }

    /// The format it was packed from.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    pub(super) fn scheme(&self) -> Scheme {
        self.scheme
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The bytes of panel `panel`.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &self.data[panel * self.panel_bytes..][..self.panel_bytes]
    }

    /// Offset of the weights in a panel.
    pub(super) fn weights_at(&self) -> usize {
        self.scale_bytes
    }

    /// Decodes row `row` into `out`, of `cols` elements: an embedding look-up.
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix of {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "a row has as many elements as the matrix has columns");
        let (scheme, lane) = (self.scheme, row % LANES);
        let (scales, weights) = self.panel(row / LANES).split_at(self.scale_bytes);
        if !scheme.is_int() {
            let size = self.format.block_bytes();
            for (k, out) in out.iter_mut().enumerate() {
                let value = &weights[scheme.weight_at(k, lane)..][..size];
                dequantize(self.format, value, std::slice::from_mut(out))
                    .expect("one element of a float format");
            }
            return;
        }
        let mask = if scheme.is_nibbles() { 15 } else { 255 };
        for (g, out) in out.chunks_exact_mut(scheme.group()).enumerate() {
            let (scale, min) = match scheme.offset() {
                Some(offset) => {
                    let scale = get_f16(scales, g * LANES + lane);
                    (scale, -(offset as f32) * scale)
                }
                None => (get_f16(scales, 2 * g * LANES + lane), get_f16(scales, (2 * g + 1) * LANES + lane)),
            };
            for (i, out) in out.iter_mut().enumerate() {
                let k = g * scheme.group() + i;
                let value = weights[scheme.weight_at(k, lane)] >> scheme.shift(k) & mask;
                *out = scale * f32::from(value) + min;
            }
        }
    }
}

fn put_f16(bytes: &mut [u8], index: usize, value: f32) {
    bytes[2 * index..][..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

fn get_f16(bytes: &[u8], index: usize) -> f32 {
    quant::f16_at(bytes, 2 * index)
}
