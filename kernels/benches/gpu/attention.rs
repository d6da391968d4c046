//! Attention, paged and contiguous, of decodes and of prompts.

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use quire_kernels::cuda::{CudaBackend, CudaKvCache, CudaStep};
use quire_kernels::{AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, NO_SLOT, QkTransform};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use super::{Bench, COLD_BYTES, HEADS, ROWS, Work, buffer, group};

/// Sequences of one length whose last `queries` tokens attend, over as many layers as make keys and values cold.
struct Contexts {
    heads: HeadShape,
    cache: CudaKvCache,
    layers: usize,
    tables: Vec<u32>,
    start: Vec<u32>,
    block_size: Option<u32>,
    query_start: Vec<u32>,
    context_len: Vec<u32>,
    rows: usize,
}

impl Contexts {
    fn new(
        backend: &CudaBackend,
        heads: HeadShape,
        kv: KvDtype,
        [batch, context, queries]: [usize; 3],
        block_size: Option<u32>,
    ) -> Self {
        let each = context.next_multiple_of(256);
        let HeadShape { kv_heads, head_dim, .. } = heads;
        let layers = (COLD_BYTES / (batch * each * kv_heads * head_dim * 2 * kv.bytes())).clamp(1, 16);
        let (mut tables, mut start) = (Vec::new(), Vec::new());
        match block_size {
            None => start.extend((0..batch).map(|sequence| (sequence * each) as u32)),
            Some(size) => {
                let mut blocks: Vec<u32> = (0..(batch * each) as u32 / size).collect();
                blocks.shuffle(&mut StdRng::seed_from_u64(1));
                start.extend((0..batch).map(|sequence| (sequence * each) as u32 / size));
                tables = blocks;
            }
        }
        let shape = KvShape { layers, slots: batch * each, kv_heads, head_dim, dtype: kv };
        let mut contexts = Self {
            heads,
            cache: backend.kv_cache(shape).expect("memory"),
            layers,
            tables,
            start,
            block_size,
            query_start: (0..=batch).map(|sequence| (sequence * queries) as u32).collect(),
            context_len: vec![context as u32; batch],
            rows: batch * queries,
        };
        contexts.fill(backend, batch * each);
        contexts
    }

    /// Numbers of ordinary size in every slot: what memory held before could be none, and slower or faster to multiply.
    fn fill(&mut self, backend: &CudaBackend, slots: usize) {
        let HeadShape { heads, kv_heads, head_dim } = self.heads;
        let rope = backend.load_rope(&vec![0.0; head_dim / 2], 1.0, 1).expect("memory");
        let transform = QkTransform { heads: self.heads, rope: &rope, qk_norm: None };
        let rows = ROWS.min(slots);
        let mut qkv = buffer(backend, rows, (heads + 2 * kv_heads) * head_dim);
        for first in (0..slots).step_by(rows) {
            let at: Vec<u32> = (first..slots.min(first + rows)).map(|slot| slot as u32).collect();
            backend.set_rows(&mut qkv, at.len());
            let batch = AttentionBatch {
                positions: &vec![0; at.len()],
                slots: &at,
                query_start: &[0],
                context_len: &[],
                kv: KvIndex::Contiguous { start: &[] },
                window: None,
            };
            let step = backend.begin_step(batch.into()).expect("a step of the backend's size");
            for layer in 0..self.layers {
                backend.rotate_and_store(&mut qkv, &transform, &step, layer, &mut self.cache);
            }
        }
    }

    /// A step in which they attend.
    fn step(&self, backend: &CudaBackend) -> CudaStep {
        let batch = AttentionBatch {
            positions: &vec![0; self.rows],
            slots: &vec![NO_SLOT; self.rows],
            query_start: &self.query_start,
            context_len: &self.context_len,
            kv: match self.block_size {
                Some(block_size) => {
                    KvIndex::Paged { block_size, tables: &self.tables, table_start: &self.start }
                }
                None => KvIndex::Contiguous { start: &self.start },
            },
            window: None,
        };
        backend.begin_step(batch.into()).expect("a step of the backend's size")
    }

    /// Measures the attention of such contexts.
    fn measure(
        bench: &Bench<'_>,
        group: &mut BenchmarkGroup<'_, WallTime>,
        (id, work): (&str, Work),
        make: impl Fn() -> Self,
    ) {
        let make = || {
            let contexts = make();
            let HeadShape { heads, kv_heads, head_dim } = contexts.heads;
            let qkv = buffer(bench.backend, contexts.rows, (heads + 2 * kv_heads) * head_dim);
            let out = buffer(bench.backend, contexts.rows, heads * head_dim);
            let step = contexts.step(bench.backend);
            (contexts, qkv, out, step)
        };
        bench.run(group, id, work, make, |(contexts, qkv, out, step), run| {
            let Contexts { heads, cache, layers, .. } = contexts;
            let scale = (heads.head_dim as f32).sqrt().recip();
            bench.backend.attention(qkv, *heads, scale, step, run % *layers, cache, out);
        });
    }
}

fn layout(block_size: Option<u32>) -> String {
    block_size.map_or("contiguous".into(), |size| format!("blocks of {size}"))
}

/// What attention is timed by with the model's own heads.
pub(super) fn all(criterion: &mut Criterion, bench: &Bench<'_>, kv: KvDtype) {
    let all = [None, Some(8), Some(16), Some(64), Some(256)];
    let layouts = if kv == KvDtype::Bf16 { &all[..] } else { &all[2..3] };
    let batches = [[1, 8192], [1, 65_536], [8, 4096], [32, 2048], [128, 1024], [256, 1024], [64, 8192]];
    decode(criterion, bench, kv, HEADS, &batches, layouts);
    let prompts = [[16, 1024, 1024], [4, 4096, 4096], [1, 16_384, 16_384], [8, 4096, 512], [1, 32_768, 2048]];
    prefill(criterion, bench, kv, HEADS, &prompts, layouts);
}

/// What heads are called in a group's name.
fn of(heads: HeadShape) -> String {
    if heads == HEADS { String::new() } else { format!("heads of {}, ", heads.head_dim) }
}

/// Sequences (how many, and their contexts) of which the last token attends, with such heads.
pub(super) fn decode(
    criterion: &mut Criterion,
    bench: &Bench<'_>,
    kv: KvDtype,
    heads: HeadShape,
    batches: &[[usize; 2]],
    layouts: &[Option<u32>],
) {
    let name = format!("decode, {}{} KV", of(heads), kv.name());
    let mut decode = group(criterion, &name);
    for &[batch, context] in batches {
        let read = batch * context * heads.kv_heads * heads.head_dim * 2 * kv.bytes();
        for &block_size in layouts {
            let id = format!("{batch} x {context}, {}", layout(block_size));
            let make = || Contexts::new(bench.backend, heads, kv, [batch, context, 1], block_size);
            Contexts::measure(bench, &mut decode, (&id, Work::Bytes(read as f64)), make);
        }
    }
    bench.end(decode, &name);
}

/// Sequences (how many, their contexts, and the last tokens of these that attend) with such heads.
pub(super) fn prefill(
    criterion: &mut Criterion,
    bench: &Bench<'_>,
    kv: KvDtype,
    heads: HeadShape,
    prompts: &[[usize; 3]],
    layouts: &[Option<u32>],
) {
    let name = format!("prefill, {}{} KV", of(heads), kv.name());
    let mut prefill = group(criterion, &name);
    for &[batch, context, queries] in prompts {
        // A query sees itself and what is before it.
        let pairs = batch * queries * (2 * context - queries + 1) / 2;
        for &block_size in layouts {
            let id = format!("{batch} x {queries} of {context}, {}", layout(block_size));
            let make = || Contexts::new(bench.backend, heads, kv, [batch, context, queries], block_size);
            let flops = 4.0 * (pairs * heads.heads * heads.head_dim) as f64;
            Contexts::measure(bench, &mut prefill, (&id, Work::Flops(flops)), make);
        }
    }
    bench.end(prefill, &name);
}
