//! The CPU as a [`Backend`].

use std::borrow::Cow;
use std::cell::RefCell;
use std::num::NonZeroUsize;
use std::sync::Arc;

use half::bf16;

use super::attention::{self, Attention, AttentionScratch, KvSlice};
use super::rope::{RopeTable, RotateAndStore, rotate_and_store};
use super::{AlignedBuffer, CpuGroup, Isa, MatmulScratch, PackedMatrix, ThreadPool};
use super::{activation, embed, gemm, norm};
use crate::{
    Backend, HeadShape, KernelError, KvDtype, KvShape, MatrixSource, QkTransform, StepInput, SwapDirection,
};

/// How to set a [`CpuBackend`] up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the caller's included; by default as many as suit the machine.
    pub threads: Option<NonZeroUsize>,
    /// Instruction set; by default the best that the machine supports.
    pub isa: Option<Isa>,
}

/// The CPU: a thread pool, an instruction set and the memory that operations reuse.
///
/// It is used from one thread at a time (it is [`Send`] and not [`Sync`]), which takes part in the pool.
#[derive(Debug)]
pub struct CpuBackend {
    pool: ThreadPool,
    isa: Isa,
    matmul: RefCell<MatmulScratch>,
    attention: RefCell<AttentionScratch>,
    /// The ranks that the model is divided over, and which of them this is.
    rank: Option<(Arc<CpuGroup>, usize)>,
    /// Why a sum over the ranks failed.
    failure: RefCell<Option<String>>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] when this machine lacks the instruction set asked for.
    pub fn new(options: CpuOptions) -> Result<Self, KernelError> {
        Ok(Self {
            pool: ThreadPool::new(options.threads.unwrap_or_else(ThreadPool::default_threads)),
            isa: options.isa.unwrap_or_else(Isa::detect).require()?,
            matmul: RefCell::default(),
            attention: RefCell::default(),
            rank: None,
            failure: RefCell::default(),
        })
    }

    /// Makes this the rank of that number of a group, over which [`Backend::all_reduce`] sums.
    pub fn join(&mut self, group: Arc<CpuGroup>, rank: usize) {
        self.rank = Some((group, rank));
    }

    /// Threads that take part, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Activations on the CPU, `[rows, cols]`.
#[derive(Debug)]
pub struct Buffer {
    values: AlignedBuffer<f32>,
    rows: usize,
    cols: usize,
}

impl Buffer {
    /// Rows in use.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// The rows in use.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.cols]
    }
    /// The rows in use, to write.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.cols]
    }
}

/// A weight matrix on the CPU: matrices of one format each, stacked along the output dimension.
#[derive(Debug)]
pub struct Weight {
    parts: Vec<PackedMatrix>,
}

impl Weight {
    /// Output features.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(PackedMatrix::rows).sum()
    }
    /// Input features.
    pub fn cols(&self) -> usize {
        self.parts.first().map_or(0, PackedMatrix::cols)
    }
    /// The stacked matrices.
    pub fn parts(&self) -> &[PackedMatrix] {
        &self.parts
    }
}

/// A parameter vector on the CPU.
#[derive(Debug)]
pub struct Vector {
    values: AlignedBuffer<f32>,
}

/// Keys or values of one layer.
#[derive(Debug)]
enum KvArray {
    F32(AlignedBuffer<f32>),
    Bf16(AlignedBuffer<bf16>),
}

impl KvArray {
    fn new(dtype: KvDtype, len: usize) -> Result<Self, KernelError> {
        Ok(match dtype {
            KvDtype::F32 => Self::F32(AlignedBuffer::zeroed(len, "the KV cache")?),
            KvDtype::Bf16 => Self::Bf16(AlignedBuffer::zeroed(len, "the KV cache")?),
            KvDtype::F16 | KvDtype::Fp8 => {
                let name = dtype.name();
                return Err(KernelError::Shape(format!(
                    "KV memory of {name} is for GPUs: choose f32 or bf16"
                )));
            }
        })
    }

    /// Copies rows of `width` elements to others of this.
    fn copy_within(&mut self, width: usize, rows: &[[u32; 2]]) {
        fn copy<T: Copy>(values: &mut [T], width: usize, rows: &[[u32; 2]]) {
            for [from, to] in rows.iter().map(|pair| pair.map(|row| row as usize * width)) {
                values.copy_within(from..from + width, to);
            }
        }
        match self {
            Self::F32(values) => copy(values, width, rows),
            Self::Bf16(values) => copy(values, width, rows),
        }
    }

    /// Copies rows of `width` elements: `rows` are pairs of one of `from` and one of `self`.
    fn copy_rows(&mut self, from: &Self, width: usize, rows: impl Iterator<Item = [u32; 2]>) {
        fn copy<T: Copy>(from: &[T], to: &mut [T], width: usize, rows: impl Iterator<Item = [u32; 2]>) {
            for [a, b] in rows {
                let row = &from[a as usize * width..][..width];
                to[b as usize * width..][..width].copy_from_slice(row);
            }
        }
        match (from, self) {
            (Self::F32(from), Self::F32(to)) => copy(from, to, width, rows),
            (Self::Bf16(from), Self::Bf16(to)) => copy(from, to, width, rows),
            _ => unreachable!("both hold the same type"),
        }
    }

    fn slice(&self) -> KvSlice<'_> {
        match self {
            Self::F32(values) => KvSlice::F32(values),
            Self::Bf16(values) => KvSlice::Bf16(values),
        }
    }
}

/// The KV cache of all layers on the CPU.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    /// Keys and values of each layer, `[slot][kv_head][head_dim]`.
    layers: Vec<(KvArray, KvArray)>,
}

impl KvCache {
    /// Its dimensions.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    fn check(&self, heads: HeadShape) {
        assert!(
            heads.kv_heads == self.shape.kv_heads && heads.head_dim == self.shape.head_dim,
            "{heads:?} with a cache of {:?}",
            self.shape
        );
    }
}

impl Backend for CpuBackend {
    type Buffer = Buffer;
    type Weight = Weight;
    type Vector = Vector;
    type Rope = RopeTable;
    type KvCache = KvCache;
    type KvHost = KvCache;
    type Step<'a> = StepInput<'a>;

    fn load_matrix(&self, parts: &[MatrixSource<'_>]) -> Result<Weight, KernelError> {
        if parts.is_empty() {
            return Err(KernelError::Shape("a weight of no matrices".into()));
        }
        Ok(Weight { parts: PackedMatrix::pack_stack(self.isa, parts)? })
    }

    fn load_vector(&self, values: &[f32]) -> Result<Vector, KernelError> {
        let mut copy = AlignedBuffer::zeroed(values.len(), "a parameter vector")?;
        copy.copy_from_slice(values);
        Ok(Vector { values: copy })
    }

    fn load_rope(&self, inv_freq: &[f32], scale: f32, positions: usize) -> Result<RopeTable, KernelError> {
        RopeTable::new(inv_freq, scale, positions)
    }

    fn buffer(&self, rows: usize, cols: usize) -> Result<Buffer, KernelError> {
        if cols == 0 {
            return Err(KernelError::Shape(format!("a buffer of {rows} x {cols}")));
        }
        let values = AlignedBuffer::zeroed(rows.saturating_mul(cols), "an activation buffer")?;
        Ok(Buffer { values, rows, cols })
    }

    fn set_rows(&self, buffer: &mut Buffer, rows: usize) {
        let capacity = buffer.values.len() / buffer.cols;
        assert!(rows <= capacity, "{rows} rows in a buffer of {capacity}");
        buffer.rows = rows;
    }

    fn kv_cache(&self, shape: KvShape) -> Result<KvCache, KernelError> {
        if shape.layers == 0
            || shape.kv_heads == 0
            || shape.head_dim == 0
            || !shape.head_dim.is_multiple_of(8)
        {
            return Err(KernelError::Shape(format!("{shape:?}: heads must have a multiple of 8 elements")));
        }
        let len = shape.slots.saturating_mul(shape.kv_heads).saturating_mul(shape.head_dim);
        let array = || KvArray::new(shape.dtype, len);
        let layers =
            (0..shape.layers).map(|_| Ok((array()?, array()?))).collect::<Result<_, KernelError>>()?;
        Ok(KvCache { shape, layers })
    }

    fn kv_host(&self, shape: KvShape) -> Result<KvCache, KernelError> {
        self.kv_cache(shape)
    }

    fn swap(
        &self,
        direction: SwapDirection,
        cache: &mut KvCache,
        host: &mut KvCache,
        slots: &[[u32; 2]],
    ) -> Result<(), KernelError> {
        cache.shape.check_swap(&host.shape, slots);
        let width = cache.shape.kv_heads * cache.shape.head_dim;
        let arrays = cache.layers.iter_mut().zip(&mut host.layers);
        for (cache, host) in
            arrays.flat_map(|(cache, host)| [(&mut cache.0, &mut host.0), (&mut cache.1, &mut host.1)])
        {
            match direction {
                SwapDirection::Out => host.copy_rows(cache, width, slots.iter().copied()),
                SwapDirection::In => {
                    cache.copy_rows(host, width, slots.iter().map(|&[slot, host]| [host, slot]))
                }
            }
        }
        Ok(())
    }

    fn copy_within(&self, cache: &mut KvCache, slots: &[[u32; 2]]) -> Result<(), KernelError> {
        cache.shape.check_swap(&cache.shape, slots);
        let width = cache.shape.kv_heads * cache.shape.head_dim;
        for (keys, values) in &mut cache.layers {
            keys.copy_within(width, slots);
            values.copy_within(width, slots);
        }
        Ok(())
    }

    fn begin_step<'a>(&self, input: StepInput<'a>) -> Result<StepInput<'a>, KernelError> {
        Ok(input)
    }

    fn embed(&self, step: &StepInput<'_>, table: &Weight, out: &mut Buffer) {
        let tokens = step.tokens;
        assert!(table.cols() == out.cols && tokens.len() == out.rows, "an output row for every token");
        let cols = out.cols;
        embed::embed(&self.pool, tokens, &table.parts, cols, out.values_mut());
    }

    fn rms_norm(&self, x: &Buffer, weight: &Vector, eps: f32, out: &mut Buffer) {
        assert!(x.cols == weight.values.len() && out.cols == x.cols, "columns of a norm");
        norm::rms_norm(&self.pool, self.isa, x.values(), &weight.values, eps, out.values_mut());
    }

    fn add_rms_norm(
        &self,
        residual: &mut Buffer,
        delta: &Buffer,
        weight: &Vector,
        eps: f32,
        out: &mut Buffer,
    ) {
        assert!(
            residual.cols == weight.values.len() && delta.cols == residual.cols && out.cols == residual.cols,
            "columns of a norm"
        );
        let (residual, out) = (residual.values_mut(), out.values_mut());
        norm::add_rms_norm(&self.pool, self.isa, residual, delta.values(), &weight.values, eps, out);
    }

    fn linear(&self, x: &Buffer, weight: &Weight, bias: Option<&Vector>, out: &mut Buffer) {
        assert!(
            x.cols == weight.cols() && out.cols == weight.rows() && x.rows == out.rows,
            "{} x {} by {} x {} into {} x {}",
            x.rows,
            x.cols,
            weight.rows(),
            weight.cols(),
            out.rows,
            out.cols
        );
        let bias = bias.map(|bias| &*bias.values);
        assert!(bias.is_none_or(|bias| bias.len() == out.cols), "a bias for every column");
        let mut scratch = self.matmul.borrow_mut();
        let (x, rows) = (x.values(), x.rows);
        gemm::matmul(&self.pool, self.isa, x, rows, &weight.parts, bias, out.values_mut(), &mut scratch);
    }

    fn all_reduce(&self, x: &mut Buffer) {
        if let Some((group, rank)) = &self.rank
            && let Err(error) = group.all_reduce(*rank, x.values_mut())
        {
            self.failure.borrow_mut().get_or_insert(error.to_string());
        }
    }

    fn check(&self) -> Result<(), KernelError> {
        match &*self.failure.borrow() {
            Some(why) => Err(KernelError::Device(why.clone())),
            None => Ok(()),
        }
    }

    fn rotate_and_store(
        &self,
        qkv: &mut Buffer,
        transform: &QkTransform<'_, Self>,
        step: &StepInput<'_>,
        layer: usize,
        cache: &mut KvCache,
    ) {
        cache.check(transform.heads);
        let norm = transform.qk_norm.map(|(q, k, eps)| (&*q.values, &*k.values, eps));
        macro_rules! run {
            ($k:expr, $v:expr) => {
                rotate_and_store(
                    &self.pool,
                    self.isa,
                    RotateAndStore {
                        heads: transform.heads,
                        rope: transform.rope,
                        norm,
                        positions: step.batch.positions,
                        slots: step.batch.slots,
                        qkv: qkv.values_mut(),
                        k: $k,
                        v: $v,
                    },
                )
            };
        }
        match &mut cache.layers[layer] {
            (KvArray::F32(k), KvArray::F32(v)) => run!(k, v),
            (KvArray::Bf16(k), KvArray::Bf16(v)) => run!(k, v),
            _ => unreachable!("a cache's arrays are made with one type"),
        }
    }

    fn attention(
        &self,
        qkv: &Buffer,
        heads: HeadShape,
        scale: f32,
        step: &StepInput<'_>,
        layer: usize,
        cache: &KvCache,
        out: &mut Buffer,
    ) {
        cache.check(heads);
        assert!(
            qkv.rows == out.rows && out.cols == heads.heads * heads.head_dim,
            "rows and columns of the output"
        );
        let (k, v) = &cache.layers[layer];
        let call =
            Attention { heads, scale, qkv: qkv.values(), batch: step.batch, k: k.slice(), v: v.slice() };
        let mut scratch = self.attention.borrow_mut();
        attention::attention(&self.pool, self.isa, call, &mut scratch, out.values_mut());
    }

    fn silu_mul(&self, gate_up: &Buffer, out: &mut Buffer) {
        assert!(
            gate_up.cols == 2 * out.cols && gate_up.rows == out.rows,
            "a gate and an up for every output"
        );
        let n = out.cols;
        activation::silu_mul(&self.pool, self.isa, gate_up.values(), n, out.values_mut());
    }

    fn gather_rows(&self, x: &Buffer, step: &StepInput<'_>, out: &mut Buffer) {
        let rows = step.logit_rows;
        assert!(x.cols == out.cols && rows.len() == out.rows, "an output row for every row");
        embed::gather_rows(x.values(), rows, x.cols, out.values_mut());
    }

    fn fill(&self, values: &[f32], buffer: &mut Buffer) -> Result<(), KernelError> {
        buffer.values_mut().copy_from_slice(values);
        Ok(())
    }

    fn to_host<'a>(&self, x: &'a Buffer) -> Cow<'a, [f32]> {
        Cow::Borrowed(x.values())
    }
}
