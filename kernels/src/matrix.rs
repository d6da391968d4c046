//! Weight formats as they lie in files, before they are prepared for a device.

use crate::KernelError;

/// How the elements of a weight matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF Q8_0: 32 signed bytes and an f16 scale.
    Q8_0,
    /// GGUF Q4_0: 32 nibbles, offset 8, and an f16 scale.
    Q4_0,
    /// GGUF Q4_1: 32 nibbles, an f16 scale and an f16 minimum.
    Q4_1,
    /// GGUF Q4_K: super-blocks of 256 in eight groups with 6-bit scales and minimums.
    Q4K,
    /// GGUF Q6_K: super-blocks of 256 in sixteen groups with 8-bit scales.
    Q6K,
}

impl WeightFormat {
    /// Elements in a block: a row's length is a multiple of it.
    pub fn block_elements(self) -> usize {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 1,
            WeightFormat::Q8_0 | WeightFormat::Q4_0 | WeightFormat::Q4_1 => 32,
            WeightFormat::Q4K | WeightFormat::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            WeightFormat::F32 => 4,
            WeightFormat::F16 | WeightFormat::Bf16 => 2,
            WeightFormat::Q8_0 => 34,
            WeightFormat::Q4_0 => 18,
            WeightFormat::Q4_1 => 20,
            WeightFormat::Q4K => 144,
            WeightFormat::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` elements, or `None` when `cols` is no multiple of the block or the size overflows.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_elements()) {
            return None;
        }
        (cols / self.block_elements()).checked_mul(self.block_bytes())
    }
}

/// A weight matrix `[rows, cols]` as it lies in a file: `rows` output features of `cols` inputs, row-major.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSource<'a> {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

impl<'a> MatrixSource<'a> {
    /// Checks that `bytes` is exactly as long as the shape and format say.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when it is not.
    pub fn new(format: WeightFormat, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, KernelError> {
        let expected = format.row_bytes(cols).and_then(|row| row.checked_mul(rows));
        if rows == 0 || cols == 0 || expected != Some(bytes.len()) {
            return Err(KernelError::Shape(format!(
                "a {rows} x {cols} matrix in {format:?} needs {expected:?} bytes, found {}",
                bytes.len()
            )));
        }
        Ok(Self { format, rows, cols, bytes })
    }

    /// Storage format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }
    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// The stored bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}
