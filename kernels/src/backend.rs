//! The operations a forward pass needs. A model is written once over [`Backend`]; each device implements it.
//!
//! Shapes: an activation buffer is `[rows, cols]`, row-major; a row is one token of the ragged batch. Rows past the
//! last sequence are padding: dense operations compute them, attention and KV stores skip them.

use crate::{KernelError, MatrixSource, WeightFormat};

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    /// 32-bit float: for checking and for like-for-like comparison with f32 systems.
    F32,
    /// bfloat16: the usual choice.
    Bf16,
    /// IEEE half precision: three bits more of mantissa than bfloat16; values beyond 65,504 are held as that. On a GPU.
    F16,
    /// 8-bit floating point e4m3 (Micikevicius et al. 2022, FP8 formats for deep learning), without a scale: half the
    /// memory of bfloat16, 3 bits of mantissa; values beyond 448 are held as that. On a GPU. Machine
    /// code for compute capability 8.0 converts in software, and takes what is no number for 480.
    Fp8,
}

impl KvDtype {
    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::F16 => "f16",
            KvDtype::Fp8 => "fp8",
        }
    }

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 | KvDtype::F16 => 2,
            KvDtype::Fp8 => 1,
        }
    }
}

/// Dimensions of one KV cache: `slots` slots of `kv_heads * head_dim` elements for K and for V, in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Transformer layers.
    pub layers: usize,
    /// Token slots in each layer.
    pub slots: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
    /// Element type.
    pub dtype: KvDtype,
}

/// Head counts of an attention layer; query head `h` reads KV head `h / (heads / kv_heads)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
}

/// Slot that stores nothing: the padding rows of a batch carry it.
pub const NO_SLOT: u32 = u32::MAX;

/// First of the token ids that name no token but a row: `FED + row` is the token that the step before sampled for `row`
/// of its rows of logits. A device that samples for itself puts it in; it need not be known to the host yet.
pub const FED: u32 = 1 << 31;

/// Where the context of each sequence lies in the KV cache.
#[derive(Debug, Clone, Copy)]
pub enum KvIndex<'a> {
    /// Position `p` of sequence `s` is at slot `tables[table_start[s] + p / block_size] * block_size + p % block_size`.
    Paged {
        /// Slots in a block, 1 to 256.
        block_size: u32,
        /// Physical block numbers of all sequences, concatenated.
        tables: &'a [u32],
        /// Offset of each sequence's first entry in `tables`; one entry a sequence.
        table_start: &'a [u32],
    },
    /// Position `p` of sequence `s` is at slot `start[s] + p`.
    Contiguous {
        /// First slot of each sequence's region.
        start: &'a [u32],
    },
}

/// One ragged batch as attention sees it.
#[derive(Debug, Clone, Copy)]
pub struct AttentionBatch<'a> {
    /// Position of each row in its sequence; padding rows have 0. `[rows]`
    pub positions: &'a [u32],
    /// Slot each row's K and V are stored to, [`NO_SLOT`] for padding rows. `[rows]`
    pub slots: &'a [u32],
    /// First row of each sequence, and one past the last row of the last: `[sequences + 1]`. Rows from there on are
    /// padding.
    pub query_start: &'a [u32],
    /// Tokens in each sequence's context, this step's included: `[sequences]`. The queries are its last tokens.
    pub context_len: &'a [u32],
    /// Where each context lies.
    pub kv: KvIndex<'a>,
    /// Tokens that each row attends to, its own included, at least 1 (sliding-window attention); none for its whole context.
    pub window: Option<u32>,
}

/// One step's input, as the host has it.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// Token ids, one a row; padding rows at the end.
    pub tokens: &'a [u32],
    /// Positions, slots and contexts.
    pub batch: AttentionBatch<'a>,
    /// Rows whose logits are wanted.
    pub logit_rows: &'a [u32],
}

impl<'a> From<AttentionBatch<'a>> for StepInput<'a> {
    /// A step for the operations that need no tokens and no logits.
    fn from(batch: AttentionBatch<'a>) -> Self {
        Self { tokens: &[], batch, logit_rows: &[] }
    }
}

/// The rotation and normalization applied to Q and K before they are stored and used.
#[derive(Debug)]
pub struct QkTransform<'a, B: Backend + ?Sized> {
    /// Query, key and value head counts.
    pub heads: HeadShape,
    /// Rotation angles by position and frequency, from [`Backend::load_rope`].
    pub rope: &'a B::Rope,
    /// Per-head RMSNorm weights of Q and K (Qwen3), with epsilon, applied before the rotation.
    pub qk_norm: Option<(&'a B::Vector, &'a B::Vector, f32)>,
}

/// A matrix of random weights, normal with mean 0, of which each element is a function of the key, its row and its
/// column alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GeneratedMatrix {
    /// Says which tensor of which seed.
    pub key: u64,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Row of the tensor that its first row is: a rank has a part of each.
    pub first_row: usize,
    /// Column that its first one is: a multiple of 4.
    pub first_col: usize,
}

impl KvShape {
    /// Checks pairs of slots, the first of a cache of this shape, the second of host memory of shape `host`.
    ///
    /// # Panics
    /// When one is not there, or the two are not alike.
    pub(crate) fn check_swap(&self, host: &Self, slots: &[[u32; 2]]) {
        let alike = Self { slots: self.slots, ..*host };
        assert!(*self == alike, "{host:?} cannot hold what {self:?} does");
        for [slot, other] in slots {
            assert!(
                (*slot as usize) < self.slots && (*other as usize) < host.slots,
                "no slot {slot} or {other}"
            );
        }
    }
}

/// Which way K and V are swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SwapDirection {
    /// From the cache to host memory.
    Out,
    /// From host memory to the cache.
    In,
}

/// The operations a forward pass needs, over one device's buffers.
///
/// Every result row depends on its own inputs only, in an order of operations that does not change with the number
/// of rows, the layout of the KV cache or the number of threads.
pub trait Backend: Send {
    /// Activations, `[rows, cols]`; capacity is fixed when made, the number of rows in use is set for each step.
    type Buffer: Send;
    /// A weight matrix prepared for products: possibly several formats stacked along the output dimension.
    type Weight: Send + Sync + std::fmt::Debug;
    /// A vector of parameters (norm weights, biases).
    type Vector: Send + Sync + std::fmt::Debug;
    /// Rotation table.
    type Rope: Send + Sync + std::fmt::Debug;
    /// The KV cache of all layers.
    type KvCache: Send;
    /// K and V of tokens in host memory, where they are swapped to.
    type KvHost: Send;
    /// One step's tokens, positions, slots and contexts, where this device reads them.
    type Step<'a>;

    /// Prepares the matrices `parts`, stacked along their rows (the output dimension), for products. All have the
    /// same number of columns; formats may differ.
    fn load_matrix(&self, parts: &[MatrixSource<'_>]) -> Result<Self::Weight, KernelError>;
    /// Copies a parameter vector to the device.
    fn load_vector(&self, values: &[f32]) -> Result<Self::Vector, KernelError>;
    /// Rotation table for `positions` positions from inverse frequencies (`head_dim / 2` of them), the half-split
    /// ("NeoX") pairing: element `i` rotates with `i + head_dim / 2`.
    fn load_rope(
        &self,
        inv_freq: &[f32],
        attention_scale: f32,
        positions: usize,
    ) -> Result<Self::Rope, KernelError>;
    /// A matrix of generated weights ([`GeneratedMatrix`]), stacked along the rows, in this format; none where the device
    /// has no generator of its own for it, and the host makes them.
    fn generate_matrix(
        &self,
        format: WeightFormat,
        parts: &[GeneratedMatrix],
    ) -> Result<Option<Self::Weight>, KernelError> {
        let _ = (format, parts);
        Ok(None)
    }
    /// An activation buffer that can hold `rows` rows.
    fn buffer(&self, rows: usize, cols: usize) -> Result<Self::Buffer, KernelError>;
    /// A buffer for logits, which a device may hold in another precision than activations.
    fn logits_buffer(&self, rows: usize, vocab: usize) -> Result<Self::Buffer, KernelError> {
        self.buffer(rows, vocab)
    }
    /// Sets the rows in use; at most the capacity given at creation.
    fn set_rows(&self, buffer: &mut Self::Buffer, rows: usize);
    /// A KV cache. Fails when the memory cannot be had.
    fn kv_cache(&self, shape: KvShape) -> Result<Self::KvCache, KernelError>;
    /// Host memory for K and V of `shape.slots` tokens of a cache that is like it otherwise. Fails when the memory cannot
    /// be had.
    fn kv_host(&self, shape: KvShape) -> Result<Self::KvHost, KernelError>;
    /// Copies K and V of all layers between the cache and host memory: `slots` are pairs of a cache slot and a host slot.
    /// None is written twice; out of the cache, one may be read more than once. Operations queued before have their effect
    /// first, those after see what was copied.
    ///
    /// # Panics
    /// When a slot is not there, or the two are not alike.
    fn swap(
        &self,
        direction: SwapDirection,
        cache: &mut Self::KvCache,
        host: &mut Self::KvHost,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError>;
    /// Copies K and V of all layers from slots of the cache to others of it: pairs of from and to, no slot on both sides. In
    /// the same order as [`Self::swap`].
    ///
    /// # Panics
    /// When a slot is not there.
    fn copy_within(&self, cache: &mut Self::KvCache, slots: &[[u32; 2]]) -> Result<(), KernelError>;

    /// Brings a step's input to the device. Operations that take the step must be those of the last one begun.
    fn begin_step<'a>(&self, input: StepInput<'a>) -> Result<Self::Step<'a>, KernelError>;
    /// Reports what failed since the last call: operations themselves have no results.
    fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }

    /// `out[i] = table[tokens[i]]`.
    fn embed(&self, step: &Self::Step<'_>, table: &Self::Weight, out: &mut Self::Buffer);
    /// `out = x / rms(x) * weight`, row by row (Zhang & Sennrich 2019).
    fn rms_norm(&self, x: &Self::Buffer, weight: &Self::Vector, eps: f32, out: &mut Self::Buffer);
    /// `residual += delta`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &self,
        residual: &mut Self::Buffer,
        delta: &Self::Buffer,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Buffer,
    );
    /// `out = x * weight^T + bias`.
    fn linear(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    );
    /// Sums `x` over the ranks that the model is divided over, on each of them: the products whose inputs are divided
    /// (Shoeybi et al. 2019, Megatron-LM, §3). One rank alone has nothing to do.
    fn all_reduce(&self, x: &mut Self::Buffer) {
        let _ = x;
    }
    /// SwiGLU of a product: [`Self::linear`] into `gate_up`, then [`Self::silu_mul`]. A device may do both at once, and
    /// what `gate_up` holds afterwards is not specified.
    fn linear_silu_mul(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        gate_up: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) {
        self.linear(x, weight, None, gate_up);
        self.silu_mul(gate_up, out);
    }
    /// Normalizes and rotates the Q and K parts of `qkv` (`[rows, (heads + 2 kv_heads) * head_dim]`: Q, then K, then
    /// V) in place and stores K and V of each row at its slot of `layer`.
    fn rotate_and_store(
        &self,
        qkv: &mut Self::Buffer,
        transform: &QkTransform<'_, Self>,
        step: &Self::Step<'_>,
        layer: usize,
        cache: &mut Self::KvCache,
    );
    /// [`Self::linear`] into `qkv`, then [`Self::rotate_and_store`]. A device may do both at once, and what the K and V
    /// parts of `qkv`, and all of its rows without a slot, hold afterwards is not specified.
    fn linear_rotate_and_store(
        &self,
        x: &Self::Buffer,
        weight: &Self::Weight,
        bias: Option<&Self::Vector>,
        qkv: &mut Self::Buffer,
        transform: &QkTransform<'_, Self>,
        step: &Self::Step<'_>,
        layer: usize,
        cache: &mut Self::KvCache,
    ) {
        self.linear(x, weight, bias, qkv);
        self.rotate_and_store(qkv, transform, step, layer, cache);
    }
    /// Causal attention of each row's Q over its sequence's context up to its own position, or over the batch's window of
    /// it, scaled by `scale`.
    /// `out` is `[rows, heads * head_dim]`. Padding rows become zero in layer 0, where a step begins; in other layers they
    /// may be left as they are, for a step's layers share a buffer.
    fn attention(
        &self,
        qkv: &Self::Buffer,
        heads: HeadShape,
        scale: f32,
        step: &Self::Step<'_>,
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Buffer,
    );
    /// SwiGLU: `gate_up` is `[rows, 2 * n]`, gate first; `out = silu(gate) * up`.
    fn silu_mul(&self, gate_up: &Self::Buffer, out: &mut Self::Buffer);
    /// `out[i] = x[logit_rows[i]]`.
    fn gather_rows(&self, x: &Self::Buffer, step: &Self::Step<'_>, out: &mut Self::Buffer);
    /// Fills the rows in use from host memory, rounded to what the buffer holds: for tests and benches.
    fn fill(&self, values: &[f32], buffer: &mut Self::Buffer) -> Result<(), KernelError>;
    /// The rows in use, in host memory.
    fn to_host<'a>(&self, x: &'a Self::Buffer) -> std::borrow::Cow<'a, [f32]>;
}
