//! Attention, paged and contiguous, by batch, context and block size.

#[path = "common/ceiling.rs"]
mod ceiling;
#[path = "common/report.rs"]
mod report;

use ceiling::Ceiling;
use criterion::Criterion;
use quire_kernels::cpu::{Buffer, CpuBackend, CpuOptions, KvCache, ThreadPool};
use quire_kernels::{AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, NO_SLOT, QkTransform};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use report::{Work, bench, group};

/// SmolLM2-135M.
const SMALL: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
/// Llama-3.1-8B.
const LARGE: HeadShape = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
/// KV bytes gone through before any is read again: six times a 32 MiB cache.
const COLD_BYTES: usize = 192 << 20;

/// Sequences of one length whose last `queries` tokens attend, over as many layers as make the KV cold.
struct Setup {
    heads: HeadShape,
    cache: KvCache,
    layers: usize,
    tables: Vec<u32>,
    start: Vec<u32>,
    /// 0: contiguous.
    block_size: u32,
    query_start: Vec<u32>,
    context_len: Vec<u32>,
    qkv: Buffer,
    out: Buffer,
}

impl Setup {
    fn new(
        backend: &CpuBackend,
        heads: HeadShape,
        batch: usize,
        context: usize,
        queries: usize,
        size: u32,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(1);
        let slots = batch * context.next_multiple_of(256);
        let bytes = slots * heads.kv_heads * heads.head_dim * 2 * KvDtype::Bf16.bytes();
        let layers = COLD_BYTES.div_ceil(bytes);
        let (mut tables, mut start) = (Vec::new(), Vec::new());
        match (slots as u32).checked_div(size) {
            None => start.extend((0..batch).map(|s| (s * context.next_multiple_of(256)) as u32)),
            Some(blocks) => {
                let mut free: Vec<u32> = (0..blocks).collect();
                free.shuffle(&mut rng);
                for blocks in free.chunks_exact(slots / batch / size as usize) {
                    start.push(tables.len() as u32);
                    tables.extend_from_slice(blocks);
                }
            }
        }
        let shape = KvShape {
            layers,
            slots,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            dtype: KvDtype::Bf16,
        };
        let cols = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let rows = batch * queries;
        let mut qkv = backend.buffer(rows, cols).expect("memory");
        qkv.values_mut().fill_with(|| rng.random_range(-1.0..1.0));
        let mut setup = Self {
            heads,
            cache: backend.kv_cache(shape).expect("memory"),
            layers,
            tables,
            start,
            block_size: size,
            query_start: (0..=batch).map(|s| (s * queries) as u32).collect(),
            context_len: vec![context as u32; batch],
            qkv,
            out: backend.buffer(rows, heads.heads * heads.head_dim).expect("memory"),
        };
        setup.fill(backend, slots, &mut rng);
        setup
    }

    /// Stores random keys and values in every slot of every layer.
    fn fill(&mut self, backend: &CpuBackend, slots: usize, rng: &mut StdRng) {
        let rope = backend.load_rope(&vec![0.0; self.heads.head_dim / 2], 1.0, 1).expect("memory");
        let transform = QkTransform { heads: self.heads, rope: &rope, qk_norm: None };
        let mut rows = backend.buffer(256, self.qkv.cols()).expect("memory");
        rows.values_mut().fill_with(|| rng.random_range(-1.0..1.0));
        for layer in 0..self.layers {
            for first in (0..slots as u32).step_by(256) {
                let at: Vec<u32> = (first..first + 256).collect();
                let batch = AttentionBatch {
                    positions: &[0; 256],
                    slots: &at,
                    query_start: &[0],
                    context_len: &[],
                    kv: KvIndex::Contiguous { start: &[] },
                    window: None,
                };
                backend.rotate_and_store(&mut rows, &transform, &batch.into(), layer, &mut self.cache);
            }
        }
    }

    fn run(&mut self, backend: &CpuBackend, layer: usize) {
        let kv = match self.block_size {
            0 => KvIndex::Contiguous { start: &self.start },
            block_size => KvIndex::Paged { block_size, tables: &self.tables, table_start: &self.start },
        };
        let rows = self.qkv.rows();
        let batch = AttentionBatch {
            positions: &vec![0; rows],
            slots: &vec![NO_SLOT; rows],
            query_start: &self.query_start,
            context_len: &self.context_len,
            kv,
            window: None,
        };
        let scale = 1.0 / (self.heads.head_dim as f32).sqrt();
        let layer = layer % self.layers;
        backend.attention(&self.qkv, self.heads, scale, &batch.into(), layer, &self.cache, &mut self.out);
    }
}

fn name(block_size: u32) -> String {
    if block_size == 0 { "contiguous".into() } else { format!("block {block_size}") }
}

fn decode(
    criterion: &mut Criterion,
    backend: &CpuBackend,
    ceiling: Ceiling,
    heads: HeadShape,
    cases: &[(usize, usize)],
    block_sizes: &[u32],
) {
    let mut group =
        group(criterion, &format!("decode {}x{}x{}", heads.heads, heads.kv_heads, heads.head_dim));
    for &(batch, context) in cases {
        for &size in block_sizes {
            let mut setup = Setup::new(backend, heads, batch, context, 1, size);
            let bytes = batch * context * heads.kv_heads * heads.head_dim * 2 * KvDtype::Bf16.bytes();
            let work = Work { amount: bytes as f64, name: "GB/s of KV", ceiling: ceiling.read_gbs };
            let mut layer = 0;
            bench(&mut group, &format!("{batch} x {context}, {}", name(size)), work, || {
                setup.run(backend, layer);
                layer += 1;
            });
        }
    }
}

fn prefill(
    criterion: &mut Criterion,
    backend: &CpuBackend,
    ceiling: Ceiling,
    heads: HeadShape,
    cases: &[(usize, usize, usize)],
    block_sizes: &[u32],
) {
    let mut group =
        group(criterion, &format!("prefill {}x{}x{}", heads.heads, heads.kv_heads, heads.head_dim));
    for &(batch, context, queries) in cases {
        for &size in block_sizes {
            let mut setup = Setup::new(backend, heads, batch, context, queries, size);
            let pairs = batch * queries * (2 * context - queries + 1) / 2;
            let flops = 4 * pairs * heads.heads * heads.head_dim;
            let work = Work { amount: flops as f64, name: "GFLOP/s", ceiling: ceiling.f32_gflops };
            let mut layer = 0;
            bench(&mut group, &format!("{batch} x {queries} of {context}, {}", name(size)), work, || {
                setup.run(backend, layer);
                layer += 1;
            });
        }
    }
}

fn main() {
    let backend = CpuBackend::new(CpuOptions::default()).expect("the detected instruction set");
    let ceiling = Ceiling::measure(&ThreadPool::new(ThreadPool::default_threads()));
    println!("{}, {} threads; {ceiling}", backend.isa().name(), backend.threads());
    let mut criterion = Criterion::default().configure_from_args();
    let all = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256];
    let few = [0, 16];
    decode(&mut criterion, &backend, ceiling, SMALL, &[(32, 1024)], &all);
    decode(&mut criterion, &backend, ceiling, SMALL, &[(1, 512), (1, 4096), (8, 512), (32, 128)], &few);
    decode(&mut criterion, &backend, ceiling, LARGE, &[(1, 4096), (16, 1024)], &few);
    prefill(&mut criterion, &backend, ceiling, SMALL, &[(1, 512, 512)], &all);
    prefill(&mut criterion, &backend, ceiling, SMALL, &[(4, 256, 256), (1, 2048, 256)], &few);
    prefill(&mut criterion, &backend, ceiling, LARGE, &[(1, 512, 512)], &few);
    criterion.final_summary();
}
