//! What lies in the GPU's memory: activations, weights, parameters, the rotation table, the KV cache.

use super::device::{Device, DeviceVec};
use crate::{KernelError, KvShape};

/// Rows that buffers are longer than asked for, at most: products compute whole tiles.
const ROW_PADDING: usize = 128;

/// What a buffer's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    /// What the device's activations are.
    Activation,
    F32,
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::Activation => 2,
            Self::F32 => 4,
        }
    }
}

/// Activations on the GPU, `[rows, cols]`.
#[derive(Debug)]
pub struct CudaBuffer {
    pub(super) memory: DeviceVec<u8>,
    pub(super) element: Element,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) capacity: usize,
}

impl CudaBuffer {
    pub(super) fn new(
        device: &Device,
        rows: usize,
        cols: usize,
        element: Element,
    ) -> Result<Self, KernelError> {
        if cols == 0 {
            return Err(KernelError::Shape(format!("a buffer of {rows} x {cols}")));
        }
        let capacity = rows.max(1).checked_next_multiple_of(ROW_PADDING).unwrap_or(usize::MAX);
        let bytes = capacity.saturating_mul(cols).saturating_mul(element.bytes());
        let what = match element {
            Element::Activation => "an activation buffer: lower the token budget",
            // Nothing else is.
            Element::F32 => "the logits: lower the number of sequences, or of tokens scored at once",
        };
        let memory = device.zeroed(bytes, what)?;
        Ok(Self { memory, element, rows, cols, capacity })
    }

    /// Fills the rows in use.
    pub(super) fn fill(&mut self, device: &Device, values: &[f32]) -> Result<(), KernelError> {
        assert!(values.len() == self.rows * self.cols, "a value for every element in use");
        match self.element {
            Element::F32 => device.upload(values, self.ptr()),
            Element::Activation => device.upload(&device.activations().rounded(values), self.ptr()),
        }
    }

    /// The rows in use.
    pub(super) fn read(&self, device: &Device) -> Result<Vec<f32>, KernelError> {
        let len = self.rows * self.cols;
        match self.element {
            Element::F32 => {
                let mut values = vec![0.0; len];
                device.download(self.ptr(), &mut values)?;
                Ok(values)
            }
            Element::Activation => {
                let mut bits = vec![0u16; len];
                device.download(self.ptr(), &mut bits)?;
                Ok(device.activations().widened(&bits))
            }
        }
    }

    /// Its address.
    pub(super) fn ptr(&self) -> u64 {
        self.memory.ptr()
    }
}

/// A weight matrix on the GPU, of what activations are, row-major.
#[derive(Debug)]
pub struct CudaWeight {
    pub(super) memory: DeviceVec<u16>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl CudaWeight {
    /// Memory for a matrix, not initialized.
    pub(super) fn new(device: &Device, rows: usize, cols: usize) -> Result<Self, KernelError> {
        let memory = device.alloc(
            rows.saturating_mul(cols),
            "the weights: end other programs on the GPU or choose a smaller model",
        )?;
        Ok(Self { memory, rows, cols })
    }
}

/// A parameter vector on the GPU: single precision for norms, what activations are for the biases of products.
#[derive(Debug)]
pub struct CudaVector {
    pub(super) values: DeviceVec<f32>,
    pub(super) rounded: DeviceVec<u16>,
}

impl CudaVector {
    pub(super) fn new(device: &Device, values: &[f32]) -> Result<Self, KernelError> {
        let what = "a parameter vector: end other programs on the GPU or choose a smaller model";
        let vector =
            Self { values: device.alloc(values.len(), what)?, rounded: device.alloc(values.len(), what)? };
        device.upload(values, vector.values.ptr())?;
        device.upload(&device.activations().rounded(values), vector.rounded.ptr())?;
        Ok(vector)
    }
}

/// Cosines and sines by position and frequency.
#[derive(Debug)]
pub struct CudaRope {
    pub(super) table: DeviceVec<[f32; 2]>,
    pub(super) positions: usize,
}

impl CudaRope {
    pub(super) fn new(
        device: &Device,
        inv_freq: &[f32],
        scale: f32,
        positions: usize,
    ) -> Result<Self, KernelError> {
        if inv_freq.is_empty() {
            return Err(KernelError::Shape("a rotation of no frequencies".into()));
        }
        let len = inv_freq.len().saturating_mul(positions);
        let table = device.alloc(len, "the rotation table: lower max_model_len")?;
        let angles = |position: usize| {
            inv_freq.iter().map(move |&f| {
                // The angle is rounded to single precision, as the models' own code has it.
                let (sin, cos) = f64::from(position as f32 * f).sin_cos();
                [(cos * f64::from(scale)) as f32, (sin * f64::from(scale)) as f32]
            })
        };
        let values: Vec<[f32; 2]> = (0..positions).flat_map(angles).collect();
        device.upload(&values, table.ptr())?;
        Ok(Self { table, positions })
    }
}

/// The KV cache of all layers on the GPU: K then V of each layer, `[slot][kv_head][head_dim]`.
#[derive(Debug)]
pub struct CudaKvCache {
    memory: DeviceVec<u8>,
    shape: KvShape,
}

impl CudaKvCache {
    pub(super) fn new(device: &Device, shape: KvShape) -> Result<Self, KernelError> {
        Ok(Self { memory: device.alloc(Self::bytes(&shape), "the KV cache: give it less memory")?, shape })
    }

    /// Bytes of a cache of this shape; more than there are where they cannot be counted.
    pub(super) fn bytes(shape: &KvShape) -> usize {
        let KvShape { layers, slots, kv_heads, head_dim, dtype } = *shape;
        let factors = [2, layers, slots, kv_heads, head_dim, dtype.bytes()];
        factors.into_iter().try_fold(1usize, usize::checked_mul).unwrap_or(usize::MAX)
    }

    /// Its dimensions.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Addresses of a layer's keys and values.
    pub(super) fn layer(&self, layer: usize) -> [u64; 2] {
        let KvShape { slots, kv_heads, head_dim, dtype, .. } = self.shape;
        let bytes = slots * kv_heads * head_dim * dtype.bytes();
        [self.memory.at(2 * layer * bytes), self.memory.at((2 * layer + 1) * bytes)]
    }
}
