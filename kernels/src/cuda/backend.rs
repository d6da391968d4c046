//! An NVIDIA GPU as a [`Backend`].
//!
//! Activations are bfloat16 or float16, sums are in single precision, logits are single precision. All operations are
//! queued on the device's one stream and return at once; [`Backend::check`] says whether queueing failed, and reading a
//! result waits for it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::Arc;

use super::activations::ActivationDtype;
use super::attention::{AttentionKernels, PlanBounds, Tuning};
use super::device::{Arg, Device, Grid};
use super::gemm::{Gemm, Operands, Shape};
use super::load;
use super::memory::{CudaBuffer, CudaKvCache, CudaRope, CudaVector, CudaWeight, Element};
use super::nccl::{Member, NcclGroup};
use super::ops::{Kernels, rotate_grid, row_threads, silu_grid};
use super::sampling::DeviceSampler;
use super::skinny::Rotation;
use super::step::{CudaStep, StepArena};
use super::swap::{CudaKvHost, SlotCopier};
use super::upload::Uploader;
use crate::{
    Backend, GeneratedMatrix, HeadShape, KernelError, KvDtype, KvShape, MatrixSource, QkTransform, StepInput,
    SwapDirection, WeightFormat,
};

/// How to set a [`CudaBackend`] up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which GPU.
    pub device: usize,
    /// What activations and weights are.
    pub activations: ActivationDtype,
    /// Heads of the model.
    pub heads: HeadShape,
    /// What the KV cache holds: bf16, f16 or fp8.
    pub kv_dtype: KvDtype,
    /// Rows of the largest step.
    pub max_rows: usize,
    /// Sequences of the largest step.
    pub max_sequences: usize,
    /// Blocks of all contexts of a step together.
    pub max_blocks: usize,
    /// Every row's result is the same in any batch, at the cost of the fastest algorithms.
    pub batch_invariant: bool,
}

/// One GPU with the kernels and the memory that operations reuse. Used from one thread at a time.
#[derive(Debug)]
pub struct CudaBackend {
    device: Arc<Device>,
    options: CudaOptions,
    kernels: Kernels,
    attention: AttentionKernels,
    gemm: Gemm,
    arena: RefCell<StepArena>,
    uploader: RefCell<Uploader>,
    copier: RefCell<SlotCopier>,
    /// The ranks that the model is divided over.
    member: Option<Member>,
}

impl CudaBackend {
    /// Opens the GPU and takes the memory that steps need.
    ///
    /// # Errors
    /// [`KernelError::Device`] where there is no usable GPU, in one sentence that says what is missing, or where its memory
    /// is too small, with what to lower; [`KernelError::OutOfMemory`] where the host's is.
    pub fn new(options: CudaOptions) -> Result<Self, KernelError> {
        if options.kv_dtype == KvDtype::F32 {
            return Err(KernelError::Shape("KV memory of f32 is for CPUs: choose bf16, f16 or fp8".into()));
        }
        let device = Device::open(options.device, options.activations)?;
        let sequences = Self::bucket_of(options.max_sequences);
        let rows = options.max_rows.max(sequences);
        let tuning = Tuning::new(&device, options.kv_dtype, options.batch_invariant);
        let bounds = PlanBounds::new(options.heads, &tuning);
        let attention = AttentionKernels::new(&device, options.heads, sequences, &tuning, &bounds)?;
        let arena = StepArena::new(device.clone(), rows, sequences, options.max_blocks, tuning, bounds)?;
        Ok(Self {
            kernels: Kernels::new(&device, options.kv_dtype)?,
            gemm: Gemm::new(device.clone(), options.batch_invariant)?,
            attention,
            arena: RefCell::new(arena),
            uploader: RefCell::new(Uploader::new(device.clone())?),
            copier: RefCell::new(SlotCopier::new(&device)?),
            member: None,
            options,
            device,
        })
    }

    /// Makes this the rank of that number of a group, over which [`Backend::all_reduce`] sums: it waits for the others.
    ///
    /// # Errors
    /// [`KernelError::Device`] when NCCL cannot connect the GPUs.
    pub fn join(&mut self, group: &Arc<NcclGroup>, rank: usize) -> Result<(), KernelError> {
        self.member = Some(group.join(rank, &self.device)?);
        Ok(())
    }

    /// Gives the tokens that the first rank's sampler has chosen for these rows to the other ranks' samplers, which a step's
    /// tokens may name ([`Self::feed_from`]): algorithms are timed on each GPU, and last bits may differ.
    pub fn share_tokens(&self, sampler: &DeviceSampler, rows: usize) {
        if let Some(member) = &self.member
            && rows > 0
        {
            member.broadcast(&self.device, sampler.tokens_ptr(), rows);
        }
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Gives back the memory that choosing algorithms took; it is taken again where more are to be chosen.
    ///
    /// # Errors
    /// When the device failed.
    pub fn end_timing(&self) -> Result<(), KernelError> {
        self.gemm.end_timing()
    }

    /// The numbers of rows for which decodes of up to `most` sequences are captured.
    pub fn buckets(most: usize) -> Vec<usize> {
        let mut buckets: Vec<usize> = (1..=most).map(Self::bucket_of).collect();
        buckets.dedup();
        buckets
    }

    /// The bucket of a decode of `sequences` sequences: a number of rows that products compute in any case.
    pub fn bucket_of(sequences: usize) -> usize {
        Gemm::padded_rows(sequences)
    }

    /// Begins a step of decodes that is padded to `bucket` sequences and rows: its addresses are those of every step
    /// of this bucket, so its operations can be captured in a graph and run again.
    ///
    /// # Errors
    /// When the step is larger than the backend was made for.
    pub fn begin_bucket(&self, input: &StepInput<'_>, bucket: usize) -> Result<CudaStep, KernelError> {
        self.arena.borrow_mut().begin(input, self.options.heads, Some(bucket))
    }

    /// From now on tokens from [`FED`](crate::FED) on name rows of this sampler's last batch. It must outlive all steps.
    pub fn feed_from(&self, sampler: &DeviceSampler) {
        self.arena.borrow_mut().feed_from(sampler.tokens_ptr(), sampler.max_rows());
    }

    /// Address of a buffer of logits, for sampling.
    pub(super) fn logits_ptr(buffer: &CudaBuffer) -> u64 {
        assert!(buffer.element == Element::F32, "logits are single precision");
        buffer.ptr()
    }
}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Weight = CudaWeight;
    type Vector = CudaVector;
    type Rope = CudaRope;
    type KvCache = CudaKvCache;
    type KvHost = CudaKvHost;
    type Step<'a> = CudaStep;

    fn load_matrix(&self, parts: &[MatrixSource<'_>]) -> Result<CudaWeight, KernelError> {
        load::matrix(&self.device, &mut self.uploader.borrow_mut(), parts)
    }

    fn generate_matrix(
        &self,
        format: WeightFormat,
        parts: &[GeneratedMatrix],
    ) -> Result<Option<CudaWeight>, KernelError> {
        if format != self.options.activations.weight_format() {
            return Ok(None);
        }
        load::generated(&self.device, &self.kernels.fill_normal, parts).map(Some)
    }

    fn load_vector(&self, values: &[f32]) -> Result<CudaVector, KernelError> {
        CudaVector::new(&self.device, values)
    }

    fn load_rope(&self, inv_freq: &[f32], scale: f32, positions: usize) -> Result<CudaRope, KernelError> {
        CudaRope::new(&self.device, inv_freq, scale, positions)
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<CudaBuffer, KernelError> {
        CudaBuffer::new(&self.device, rows, cols, Element::Activation)
    }

    fn logits_buffer(&self, rows: usize, vocab: usize) -> Result<CudaBuffer, KernelError> {
        CudaBuffer::new(&self.device, rows, vocab, Element::F32)
    }

    fn set_rows(&self, buffer: &mut CudaBuffer, rows: usize) {
        assert!(rows <= buffer.capacity, "{rows} rows in a buffer of {}", buffer.capacity);
        buffer.rows = rows;
    }

    fn kv_cache(&self, shape: KvShape) -> Result<CudaKvCache, KernelError> {
        let CudaOptions { heads: HeadShape { kv_heads, head_dim, .. }, kv_dtype, .. } = self.options;
        if (shape.kv_heads, shape.head_dim, shape.dtype) != (kv_heads, head_dim, kv_dtype) {
            let heads = self.options.heads;
            return Err(KernelError::Shape(format!("{shape:?} for {heads:?} and {}", kv_dtype.name())));
        }
        CudaKvCache::new(&self.device, shape)
    }

    fn kv_host(&self, shape: KvShape) -> Result<CudaKvHost, KernelError> {
        CudaKvHost::new(&self.device, shape)
    }

    fn swap(
        &self,
        direction: SwapDirection,
        cache: &mut CudaKvCache,
        host: &mut CudaKvHost,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError> {
        self.copier.borrow_mut().swap(&self.device, direction, cache, host, slots)
    }

    fn copy_within(&self, cache: &mut CudaKvCache, slots: &[[u32; 2]]) -> Result<(), KernelError> {
        self.copier.borrow_mut().within(&self.device, cache, slots)
    }

    fn begin_step<'a>(&self, input: StepInput<'a>) -> Result<CudaStep, KernelError> {
        self.arena.borrow_mut().begin(&input, self.options.heads, None)
    }

    fn check(&self) -> Result<(), KernelError> {
        self.device.check()
    }

    fn embed(&self, step: &CudaStep, table: &CudaWeight, out: &mut CudaBuffer) {
        assert!(table.cols == out.cols && step.rows == out.rows, "an output row for every token");
        self.device.launch(
            &self.kernels.embed,
            Grid::of(step.rows as u32, 1, row_threads(out.cols)),
            &[
                Arg::Ptr(step.tokens),
                Arg::Ptr(step.sampled),
                Arg::Ptr(table.memory.ptr()),
                Arg::Ptr(out.ptr()),
                Arg::U32(out.cols as u32),
            ],
        );
    }

    fn rms_norm(&self, x: &CudaBuffer, weight: &CudaVector, eps: f32, out: &mut CudaBuffer) {
        assert!(
            x.cols == weight.values.len() && out.cols == x.cols && out.rows == x.rows,
            "columns of a norm"
        );
        self.device.launch(
            &self.kernels.rms_norm,
            Grid::of(x.rows as u32, 1, row_threads(x.cols)),
            &[
                Arg::Ptr(x.ptr()),
                Arg::Ptr(weight.values.ptr()),
                Arg::F32(eps),
                Arg::Ptr(out.ptr()),
                Arg::U32(x.cols as u32),
            ],
        );
    }

    fn add_rms_norm(
        &self,
        residual: &mut CudaBuffer,
        delta: &CudaBuffer,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaBuffer,
    ) {
        let cols = residual.cols;
        assert!(cols == weight.values.len() && delta.cols == cols && out.cols == cols, "columns of a norm");
        assert!(residual.rows == delta.rows && out.rows == delta.rows, "rows of a norm");
        self.device.launch(
            &self.kernels.add_rms_norm,
            Grid::of(residual.rows as u32, 1, row_threads(cols)),
            &[
                Arg::Ptr(residual.ptr()),
                Arg::Ptr(delta.ptr()),
                Arg::Ptr(weight.values.ptr()),
                Arg::F32(eps),
                Arg::Ptr(out.ptr()),
                Arg::U32(cols as u32),
            ],
        );
    }

    fn linear(&self, x: &CudaBuffer, weight: &CudaWeight, bias: Option<&CudaVector>, out: &mut CudaBuffer) {
        if x.rows > 0 {
            let (shape, operands) = Self::product(x, weight, bias, out);
            self.gemm.run(shape, operands);
        }
    }

    fn all_reduce(&self, x: &mut CudaBuffer) {
        if let Some(member) = &self.member
            && x.rows > 0
        {
            member.all_reduce(&self.device, x.ptr(), x.rows * x.cols);
        }
    }

    fn linear_silu_mul(
        &self,
        x: &CudaBuffer,
        weight: &CudaWeight,
        gate_up: &mut CudaBuffer,
        out: &mut CudaBuffer,
    ) {
        assert!(gate_up.cols == 2 * out.cols && x.rows == out.rows, "a gate and an up for every output");
        if x.rows == 0 {
            return;
        }
        let (shape, operands) = Self::product(x, weight, None, gate_up);
        match self.gemm.skinny(shape, operands) {
            Some(skinny) => {
                let shape = Shape { rows: x.rows, ..shape };
                skinny.gated(&self.device, shape, Operands { out: out.ptr(), ..operands });
            }
            None => {
                self.gemm.run(shape, operands);
                self.silu_mul(gate_up, out);
            }
        }
    }

    fn linear_rotate_and_store(
        &self,
        x: &CudaBuffer,
        weight: &CudaWeight,
        bias: Option<&CudaVector>,
        qkv: &mut CudaBuffer,
        transform: &QkTransform<'_, Self>,
        step: &CudaStep,
        layer: usize,
        cache: &mut CudaKvCache,
    ) {
        let HeadShape { heads, kv_heads, head_dim } = transform.heads;
        assert!(qkv.cols == (heads + 2 * kv_heads) * head_dim && qkv.rows == step.rows, "rows of Q, K and V");
        assert!(transform.rope.positions > 0, "a rotation table");
        if x.rows == 0 {
            return;
        }
        let (shape, operands) = Self::product(x, weight, bias, qkv);
        // The product kernel stores what activations are.
        let same = self.options.kv_dtype == self.options.activations.kv();
        let fused = transform.qk_norm.is_none() && same;
        match self.gemm.skinny(shape, operands).filter(|_| fused) {
            Some(skinny) => {
                let [keys, values] = cache.layer(layer);
                let rotation = Rotation {
                    heads: transform.heads,
                    table: transform.rope.table.ptr(),
                    positions: step.positions,
                    slots: step.slots,
                    keys,
                    values,
                };
                skinny.rotated(&self.device, Shape { rows: x.rows, ..shape }, operands, rotation);
            }
            None => {
                self.gemm.run(shape, operands);
                self.rotate_and_store(qkv, transform, step, layer, cache);
            }
        }
    }

    fn rotate_and_store(
        &self,
        qkv: &mut CudaBuffer,
        transform: &QkTransform<'_, Self>,
        step: &CudaStep,
        layer: usize,
        cache: &mut CudaKvCache,
    ) {
        let HeadShape { heads, kv_heads, head_dim } = transform.heads;
        assert!(qkv.cols == (heads + 2 * kv_heads) * head_dim && qkv.rows == step.rows, "rows of Q, K and V");
        assert!(transform.rope.positions > 0, "a rotation table");
        let [k, v] = cache.layer(layer);
        let (q_norm, k_norm, eps) = match transform.qk_norm {
            Some((q, k, eps)) => (q.values.ptr(), k.values.ptr(), eps),
            None => (0, 0, 0.0),
        };
        let grid = rotate_grid(step.rows, transform.heads);
        self.device.launch(
            &self.kernels.rotate_and_store,
            grid,
            &[
                Arg::Ptr(qkv.ptr()),
                Arg::Ptr(transform.rope.table.ptr()),
                Arg::Ptr(step.positions),
                Arg::Ptr(step.slots),
                Arg::Ptr(q_norm),
                Arg::Ptr(k_norm),
                Arg::F32(eps),
                Arg::Ptr(k),
                Arg::Ptr(v),
                Arg::U32(heads as u32),
                Arg::U32(kv_heads as u32),
                Arg::U32(head_dim as u32),
            ],
        );
    }

    fn attention(
        &self,
        qkv: &CudaBuffer,
        heads: HeadShape,
        scale: f32,
        step: &CudaStep,
        layer: usize,
        cache: &CudaKvCache,
        out: &mut CudaBuffer,
    ) {
        assert!(heads == self.options.heads, "heads are fixed when the backend is made");
        assert!(
            qkv.rows == out.rows && out.cols == heads.heads * heads.head_dim,
            "rows and columns of the output"
        );
        // No layer writes these rows: once a step will do.
        if step.padded && layer == 0 {
            self.device.launch(
                &self.kernels.zero_rows,
                Grid::of(out.rows.min(128) as u32, 1, row_threads(out.cols)),
                &[
                    Arg::Ptr(out.ptr()),
                    Arg::Ptr(step.live_rows),
                    Arg::U32(out.rows as u32),
                    Arg::U32(out.cols as u32),
                ],
            );
        }
        let [k, v] = cache.layer(layer);
        self.attention.run(&self.device, step, [qkv.ptr(), k, v, out.ptr()], scale);
    }

    fn silu_mul(&self, gate_up: &CudaBuffer, out: &mut CudaBuffer) {
        assert!(
            gate_up.cols == 2 * out.cols && gate_up.rows == out.rows,
            "a gate and an up for every output"
        );
        self.device.launch(
            &self.kernels.silu_mul,
            silu_grid(out.rows, out.cols),
            &[Arg::Ptr(gate_up.ptr()), Arg::Ptr(out.ptr()), Arg::U32(out.cols as u32)],
        );
    }

    fn gather_rows(&self, x: &CudaBuffer, step: &CudaStep, out: &mut CudaBuffer) {
        assert!(x.cols == out.cols && step.logit_rows == out.rows, "an output row for every row");
        self.device.launch(
            &self.kernels.gather_rows,
            Grid::of(step.logit_rows as u32, 1, row_threads(x.cols)),
            &[Arg::Ptr(x.ptr()), Arg::Ptr(step.logit_row_list), Arg::Ptr(out.ptr()), Arg::U32(x.cols as u32)],
        );
    }

    fn fill(&self, values: &[f32], buffer: &mut CudaBuffer) -> Result<(), KernelError> {
        buffer.fill(&self.device, values)
    }

    fn to_host<'a>(&self, x: &'a CudaBuffer) -> Cow<'a, [f32]> {
        let values = x.read(&self.device);
        Cow::Owned(values.unwrap_or_else(|error| {
            self.device.fail(&error.to_string());
            vec![0.0; x.rows * x.cols]
        }))
    }
}

impl CudaBackend {
    /// A product's shape, with its rows padded, and addresses.
    fn product(
        x: &CudaBuffer,
        weight: &CudaWeight,
        bias: Option<&CudaVector>,
        out: &CudaBuffer,
    ) -> (Shape, Operands) {
        assert!(
            x.cols == weight.cols && out.cols == weight.rows && x.rows == out.rows,
            "{} x {} by {} x {} into {} x {}",
            x.rows,
            x.cols,
            weight.rows,
            weight.cols,
            out.rows,
            out.cols
        );
        assert!(bias.is_none_or(|bias| bias.rounded.len() == out.cols), "a bias for every column");
        let rows = Gemm::padded_rows(x.rows);
        assert!(rows <= x.capacity && rows <= out.capacity, "buffers have room for whole tiles");
        let shape = Shape {
            rows,
            n: weight.rows,
            k: weight.cols,
            f32_out: out.element == Element::F32,
            bias: bias.is_some(),
        };
        let operands = Operands {
            x: x.ptr(),
            weight: weight.memory.ptr(),
            bias: bias.map_or(0, |bias| bias.rounded.ptr()),
            out: out.ptr(),
        };
        (shape, operands)
    }
}
