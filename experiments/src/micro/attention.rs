//! Attention of a decode step, contiguous and paged: the project's own kernel, one source for both layouts.

use std::time::Instant;

use anyhow::Result;
use quire_kernels::cpu::{CpuBackend, CpuOptions};
use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KernelError, KvDtype, KvIndex, KvShape, NO_SLOT, QkTransform,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::blocks::{Contexts, Places};
use super::{Plan, Subject};

/// Layers of the K and V: a step's are used one after the other.
const LAYERS: usize = 4;
/// Bytes of K and V at least: all are gone through before any is read again, and no cache holds them.
const COLD_BYTES: usize = 192 << 20;
/// Slots of a contiguous region, and the largest block.
const REGION: u32 = 256;
/// Rows filled together.
const FILLED: usize = 256;
/// Seconds that a sample takes at least, by the steps in it.
const SAMPLE_S: f64 = 0.002;
/// Steps of a sample, at most.
const MOST_STEPS: usize = 64;

/// Times what it is given, seconds.
type Clock<B> = fn(&B, &mut dyn FnMut()) -> Result<f64, KernelError>;

/// What a plan needs of a backend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    pub(super) heads: HeadShape,
    pub(super) kv_dtype: KvDtype,
    /// Sequences of the largest step.
    pub(super) sequences: usize,
    /// Slots of a layer.
    pub(super) slots: usize,
    /// Blocks of the largest step.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(super) blocks: usize,
}

impl Needs {
    pub(super) fn of(plan: &Plan, heads: HeadShape, kv_dtype: KvDtype) -> Self {
        let most = |values: &mut dyn Iterator<Item = u32>| values.max().unwrap_or(1) as usize;
        let sequences = most(&mut plan.panels.iter().map(|panel| panel.value));
        let context = most(&mut plan.xs.iter().copied());
        let regions = sequences * context.next_multiple_of(REGION as usize);
        let slot = 2 * heads.kv_heads * heads.head_dim * kv_dtype.bytes();
        let cold = COLD_BYTES.div_ceil(slot * LAYERS).next_multiple_of(REGION as usize);
        let smallest = plan.lines.iter().map(|line| line.value).filter(|size| *size > 0).min().unwrap_or(1);
        Self {
            heads,
            kv_dtype,
            sequences,
            slots: regions.max(cold),
            blocks: sequences * context.div_ceil(smallest as usize),
        }
    }

    fn shape(&self) -> KvShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        KvShape { layers: LAYERS, slots: self.slots, kv_heads, head_dim, dtype: self.kv_dtype }
    }
}

/// K and V in memory, and the places that each line takes in it.
pub(super) struct Attention<B: Backend> {
    backend: B,
    clock: Clock<B>,
    needs: Needs,
    cache: B::KvCache,
    qkv: B::Buffer,
    out: B::Buffer,
    /// Of each line; 0 where it is contiguous.
    block_sizes: Vec<u32>,
    /// Of each line, of the repeat under way.
    places: Vec<Places>,
}

/// On the CPU.
pub(super) fn on_cpu(plan: &Plan, needs: Needs, threads: u16) -> Result<Box<dyn Subject>> {
    let threads = std::num::NonZeroUsize::new(usize::from(threads));
    let backend = CpuBackend::new(CpuOptions { threads, isa: None })?;
    let clock: Clock<CpuBackend> = |_, operations| {
        let start = Instant::now();
        operations();
        Ok(start.elapsed().as_secs_f64())
    };
    Ok(Box::new(Attention::new(backend, clock, plan, needs)?))
}

/// On the first GPU, by its own clock.
#[cfg(feature = "cuda")]
pub(super) fn on_gpu(plan: &Plan, needs: Needs) -> Result<Box<dyn Subject>> {
    use quire_kernels::cuda::{ActivationDtype, CudaBackend, CudaOptions};
    let backend = CudaBackend::new(CudaOptions {
        device: 0,
        activations: ActivationDtype::Bf16,
        heads: needs.heads,
        kv_dtype: needs.kv_dtype,
        max_rows: needs.sequences.max(FILLED),
        max_sequences: needs.sequences,
        max_blocks: needs.blocks,
        batch_invariant: false,
    })?;
    let clock: Clock<CudaBackend> = |backend, operations| backend.device().time(operations);
    Ok(Box::new(Attention::new(backend, clock, plan, needs)?))
}

/// On the first GPU, by its own clock.
#[cfg(not(feature = "cuda"))]
pub(super) fn on_gpu(_: &Plan, _: Needs) -> Result<Box<dyn Subject>> {
    anyhow::bail!(super::NO_GPU)
}

impl<B: Backend> Attention<B> {
    fn new(backend: B, clock: Clock<B>, plan: &Plan, needs: Needs) -> Result<Self, KernelError> {
        let HeadShape { heads, kv_heads, head_dim } = needs.heads;
        Ok(Self {
            cache: backend.kv_cache(needs.shape())?,
            qkv: backend.buffer(needs.sequences.max(FILLED), (heads + 2 * kv_heads) * head_dim)?,
            out: backend.buffer(needs.sequences, heads * head_dim)?,
            block_sizes: plan.lines.iter().map(|line| line.value).collect(),
            places: Vec::new(),
            backend,
            clock,
            needs,
        })
    }

    /// Random numbers in every slot of every layer: what memory held before may be slower or faster to multiply.
    fn fill(&mut self, seed: u64) -> Result<(), KernelError> {
        let b = &self.backend;
        let HeadShape { heads, kv_heads, head_dim } = self.needs.heads;
        let cols = (heads + 2 * kv_heads) * head_dim;
        let mut random = StdRng::seed_from_u64(seed);
        let rows = self.needs.sequences.max(FILLED);
        let values: Vec<f32> = (0..rows * cols).map(|_| random.random_range(-1.0..1.0)).collect();
        b.set_rows(&mut self.qkv, rows);
        b.fill(&values, &mut self.qkv)?;
        b.set_rows(&mut self.qkv, FILLED);
        let rope = b.load_rope(&vec![0.0; head_dim / 2], 1.0, 1)?;
        let transform = QkTransform { heads: self.needs.heads, rope: &rope, qk_norm: None };
        for first in (0..self.needs.slots).step_by(FILLED) {
            let slots: Vec<u32> = (first..first + FILLED).map(|slot| slot as u32).collect();
            let batch = AttentionBatch {
                positions: &[0; FILLED],
                slots: &slots,
                query_start: &[0],
                context_len: &[],
                kv: KvIndex::Contiguous { start: &[] },
                window: None,
            };
            let step = b.begin_step(batch.into())?;
            for layer in 0..LAYERS {
                b.rotate_and_store(&mut self.qkv, &transform, &step, layer, &mut self.cache);
            }
        }
        b.check()
    }

    /// Seconds that the attention of a step takes, all layers together.
    fn step(&mut self, contexts: &Contexts, sequences: usize, len: u32) -> Result<f64, KernelError> {
        let Self { backend, clock, needs, cache, qkv, out, .. } = self;
        backend.set_rows(qkv, sequences);
        backend.set_rows(out, sequences);
        let batch = AttentionBatch {
            positions: &vec![len - 1; sequences],
            slots: &vec![NO_SLOT; sequences],
            query_start: &(0..=sequences as u32).collect::<Vec<_>>(),
            context_len: &vec![len; sequences],
            kv: contexts.index(),
            window: None,
        };
        let scale = 1.0 / (needs.heads.head_dim as f32).sqrt();
        let step = backend.begin_step(batch.into())?;
        let seconds = clock(backend, &mut || {
            for layer in 0..LAYERS {
                backend.attention(qkv, needs.heads, scale, &step, layer, cache, out);
            }
        })?;
        backend.check()?;
        Ok(seconds)
    }
}

impl<B: Backend> Subject for Attention<B> {
    fn renew(&mut self, seed: u64) -> Result<()> {
        self.cache = self.backend.kv_cache(self.needs.shape())?;
        self.fill(seed)?;
        let slots = self.needs.slots;
        let places = self.block_sizes.iter().map(|&size| match size {
            0 => Places::in_order(slots, REGION),
            size => Places::shuffled(slots, size, seed),
        });
        self.places = places.collect();
        Ok(())
    }

    fn time(&mut self, panel: u32, x: u32, line: usize) -> Result<f64> {
        let sequences = panel as usize;
        let (mut steps, mut total) = (0, 0.0);
        while steps == 0 || (total < SAMPLE_S && steps < MOST_STEPS) {
            let contexts = self.places[line].contexts(sequences, x);
            total += self.step(&contexts, sequences, x)?;
            steps += 1;
        }
        Ok(total / (steps * LAYERS) as f64)
    }
}
