//! A batch of attention in any layout and cut: random contexts, their keys and values stored among poison.

use std::num::NonZeroUsize;

use quire_kernels::cpu::{CpuBackend, CpuOptions, Isa, KvCache};
use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, NO_SLOT, QkTransform, reference,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// Where the contexts lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Layout {
    Contiguous,
    Paged(u32),
}

/// Tokens of some sequences: `qkv` of every position.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) heads: HeadShape,
    pub(crate) scale: f32,
    pub(crate) dtype: KvDtype,
    pub(crate) contexts: Vec<usize>,
    /// Tokens that each row sees.
    pub(crate) window: Option<u32>,
    /// `[sequence][position][(heads + 2 kv_heads) * head_dim]`
    tokens: Vec<Vec<f32>>,
    seed: u64,
}

pub(crate) fn backend(isa: Isa, threads: usize) -> CpuBackend {
    let options = CpuOptions { threads: NonZeroUsize::new(threads), isa: Some(isa) };
    CpuBackend::new(options).expect("an available instruction set")
}

fn round(dtype: KvDtype, x: f32) -> f32 {
    match dtype {
        KvDtype::F32 => x,
        KvDtype::Bf16 => half::bf16::from_f32(x).to_f32(),
        KvDtype::F16 | KvDtype::Fp8 => unreachable!("not on a CPU"),
    }
}

/// An index over slots, owned.
pub(crate) struct Slots {
    layout: Layout,
    tables: Vec<u32>,
    start: Vec<u32>,
    pub(crate) count: usize,
}

impl Slots {
    pub(crate) fn index(&self) -> KvIndex<'_> {
        match self.layout {
            Layout::Contiguous => KvIndex::Contiguous { start: &self.start },
            Layout::Paged(block_size) => {
                KvIndex::Paged { block_size, tables: &self.tables, table_start: &self.start }
            }
        }
    }

    pub(crate) fn of(&self, sequence: usize, position: usize) -> u32 {
        match self.layout {
            Layout::Contiguous => self.start[sequence] + position as u32,
            Layout::Paged(size) => {
                let block = self.tables[self.start[sequence] as usize + position / size as usize];
                block * size + position as u32 % size
            }
        }
    }
}

impl Case {
    pub(crate) fn new(heads: HeadShape, dtype: KvDtype, contexts: &[usize], seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let cols = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
        let tokens =
            contexts.iter().map(|&n| (0..n * cols).map(|_| rng.random_range(-2.0..2.0)).collect()).collect();
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        Self { heads, scale, dtype, contexts: contexts.to_vec(), window: None, tokens, seed }
    }

    pub(crate) fn with_window(self, window: impl Into<Option<u32>>) -> Self {
        Self { window: window.into(), ..self }
    }

    fn cols(&self) -> usize {
        (self.heads.heads + 2 * self.heads.kv_heads) * self.heads.head_dim
    }

    pub(crate) fn token(&self, sequence: usize, position: usize) -> &[f32] {
        &self.tokens[sequence][position * self.cols()..][..self.cols()]
    }

    /// Makes a token's keys and values NaN.
    pub(crate) fn poison(&mut self, sequence: usize, position: usize) {
        let (cols, q) = (self.cols(), self.heads.heads * self.heads.head_dim);
        self.tokens[sequence][position * cols..][q..cols].fill(f32::NAN);
    }

    /// Slots for all contexts, blocks and regions in random order with gaps.
    pub(crate) fn slots(&self, layout: Layout) -> Slots {
        let mut rng = StdRng::seed_from_u64(self.seed ^ 0x51075);
        let (mut tables, mut start) = (Vec::new(), Vec::new());
        let count = match layout {
            Layout::Contiguous => {
                let mut next = 3;
                for &n in &self.contexts {
                    start.push(next as u32);
                    next += n + rng.random_range(0..5);
                }
                next
            }
            Layout::Paged(size) => {
                let needed: Vec<usize> = self.contexts.iter().map(|n| n.div_ceil(size as usize)).collect();
                let blocks = needed.iter().sum::<usize>() + 3;
                let mut free: Vec<u32> = (0..blocks as u32).collect();
                free.shuffle(&mut rng);
                for n in needed {
                    start.push(tables.len() as u32);
                    tables.extend(free.drain(..n));
                }
                blocks * size as usize
            }
        };
        Slots { layout, tables, start, count }
    }

    /// A cache with every slot poisoned, then all tokens' keys and values stored.
    pub(crate) fn fill(&self, backend: &CpuBackend, slots: &Slots) -> KvCache {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        let shape = KvShape { layers: 2, slots: slots.count, kv_heads, head_dim, dtype: self.dtype };
        let mut cache = backend.kv_cache(shape).expect("small");
        let all: Vec<u32> = (0..slots.count as u32).collect();
        let poison = vec![f32::NAN; slots.count * self.cols()];
        self.store(backend, &all, &poison, slots, &mut cache);
        let (mut at, mut rows) = (Vec::new(), Vec::new());
        for (sequence, &n) in self.contexts.iter().enumerate() {
            for position in 0..n {
                at.push(slots.of(sequence, position));
                rows.extend_from_slice(self.token(sequence, position));
            }
        }
        self.store(backend, &at, &rows, slots, &mut cache);
        cache
    }

    /// Stores rows as they are: the rotation has frequency zero.
    fn store(&self, backend: &CpuBackend, at: &[u32], rows: &[f32], slots: &Slots, cache: &mut KvCache) {
        let rope = backend.load_rope(&vec![0.0; self.heads.head_dim / 2], 1.0, 1).expect("small");
        let mut qkv = backend.buffer(at.len(), self.cols()).expect("small");
        qkv.values_mut().copy_from_slice(rows);
        let transform = QkTransform { heads: self.heads, rope: &rope, qk_norm: None };
        let batch = AttentionBatch {
            positions: &vec![0; at.len()],
            slots: at,
            query_start: &[0],
            context_len: &[],
            kv: slots.index(),
            window: None,
        };
        backend.rotate_and_store(&mut qkv, &transform, &batch.into(), 1, cache);
    }

    /// Attention of the tokens `from..to` of each sequence (`None`: none), with `padding` rows after them; the
    /// output of each token in turn.
    pub(crate) fn attend(
        &self,
        backend: &CpuBackend,
        cache: &KvCache,
        slots: &Slots,
        ranges: &[Option<(usize, usize)>],
        padding: usize,
    ) -> Vec<f32> {
        let (mut qkv, mut query_start, mut context_len) = (Vec::new(), vec![0], Vec::new());
        for (sequence, range) in ranges.iter().enumerate() {
            let (from, to) = range.unwrap_or((0, 0));
            for position in from..to {
                // Keys and values must come from the cache: those of the rows are poisoned.
                let q = self.heads.heads * self.heads.head_dim;
                qkv.extend_from_slice(&self.token(sequence, position)[..q]);
                qkv.resize(qkv.len() + self.cols() - q, f32::NAN);
            }
            query_start.push(query_start[sequence] + (to - from) as u32);
            context_len.push(to as u32);
        }
        let live = *query_start.last().expect("not empty") as usize;
        let rows = live + padding;
        qkv.resize(rows * self.cols(), f32::NAN);
        let mut x = backend.buffer(rows, self.cols()).expect("small");
        x.values_mut().copy_from_slice(&qkv);
        let width = self.heads.heads * self.heads.head_dim;
        let mut out = backend.buffer(rows, width).expect("small");
        out.values_mut().fill(f32::NAN);
        let batch = AttentionBatch {
            positions: &vec![0; rows],
            slots: &vec![NO_SLOT; rows],
            query_start: &query_start,
            context_len: &context_len,
            kv: slots.index(),
            window: self.window,
        };
        backend.attention(&x, self.heads, self.scale, &batch.into(), 1, cache, &mut out);
        let (live, rest) = out.values().split_at(live * width);
        assert!(rest.iter().all(|&x| x.to_bits() == 0), "padding rows must be zero");
        live.to_vec()
    }

    /// The float64 result for the tokens `from..to` of each sequence.
    pub(crate) fn expected(&self, ranges: &[Option<(usize, usize)>]) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim } = self.heads;
        let mut out = Vec::new();
        for (sequence, range) in ranges.iter().enumerate() {
            let Some((from, to)) = *range else { continue };
            let part = |start: usize| -> Vec<f32> {
                let head = |p| self.token(sequence, p)[start * head_dim..][..kv_heads * head_dim].to_vec();
                (0..to).flat_map(head).map(|x| round(self.dtype, x)).collect()
            };
            let qkv: Vec<f32> = (from..to).flat_map(|p| self.token(sequence, p).to_vec()).collect();
            let batch = AttentionBatch {
                positions: &[],
                slots: &[],
                query_start: &[0, (to - from) as u32],
                context_len: &[to as u32],
                kv: KvIndex::Contiguous { start: &[0] },
                window: self.window,
            };
            let (k, v) = (part(heads), part(heads + kv_heads));
            out.extend(reference::attention(self.heads, self.scale, &qkv, &batch, &k, &v));
        }
        out
    }
}

/// `||out - reference|| / ||reference||`.
pub(crate) fn relative_error(out: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(out.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut out.iter().zip(expected).map(|(&a, b)| f64::from(a) - b));
    difference / norm(&mut expected.iter().copied())
}
