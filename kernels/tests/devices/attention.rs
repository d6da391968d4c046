//! Attention of ragged batches: shapes, layouts, cuts.

use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, NO_SLOT, QkTransform, reference,
};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::{Device, HEAD_DIMS, on_every_cache, random, random_heads, seeds};

/// Sequences: tokens in the context, and how many of them are queries.
type Ranges = [(usize, usize)];

/// Slots for each context: contiguous regions with gaps, or blocks in random order.
struct Slots {
    block_size: Option<u32>,
    tables: Vec<u32>,
    start: Vec<u32>,
    count: usize,
}

impl Slots {
    fn new(ranges: &Ranges, block_size: Option<u32>, rng: &mut StdRng) -> Self {
        let (mut tables, mut start) = (Vec::new(), Vec::new());
        let Some(size) = block_size else {
            let mut next = 3;
            for &(context, _) in ranges {
                start.push(next as u32);
                next += context + rng.random_range(0..5);
            }
            return Self { block_size, tables, start, count: next };
        };
        let needed: Vec<usize> = ranges.iter().map(|(context, _)| context.div_ceil(size as usize)).collect();
        let blocks = needed.iter().sum::<usize>() + 3;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        free.shuffle(rng);
        for n in needed {
            start.push(tables.len() as u32);
            tables.extend(free.drain(..n));
        }
        Self { block_size, tables, start, count: blocks * size as usize }
    }

    fn index(&self) -> KvIndex<'_> {
        match self.block_size {
            Some(block_size) => KvIndex::Paged { block_size, tables: &self.tables, table_start: &self.start },
            None => KvIndex::Contiguous { start: &self.start },
        }
    }

    fn of(&self, sequence: usize, position: usize) -> u32 {
        match self.block_size {
            None => self.start[sequence] + position as u32,
            Some(size) => {
                let block = self.tables[self.start[sequence] as usize + position / size as usize];
                block * size + position as u32 % size
            }
        }
    }
}

/// Attention of a batch with `padding` rows after it, everything that must not be read being NaN; checked against
/// float64. Returns the output's bits.
fn attend<B: Backend>(
    d: &Device<B>,
    heads: HeadShape,
    ranges: &Ranges,
    block_size: Option<u32>,
    window: Option<u32>,
    padding: usize,
    rng: &mut StdRng,
) -> Vec<u32> {
    let HeadShape { heads: q_heads, kv_heads, head_dim } = heads;
    let (cols, width) = ((q_heads + 2 * kv_heads) * head_dim, q_heads * head_dim);
    let slots = Slots::new(ranges, block_size, rng);
    let layer = rng.random_range(0..2);
    let shape = KvShape { layers: 2, slots: slots.count, kv_heads, head_dim, dtype: d.kv };
    let mut cache = d.backend.kv_cache(shape).expect("small");
    let tokens: Vec<Vec<f32>> = ranges.iter().map(|&(context, _)| random(context * cols, rng)).collect();
    let all: Vec<u32> = (0..slots.count as u32).collect();
    store(d, heads, layer, &all, &vec![f32::NAN; slots.count * cols], &mut cache);
    for (sequence, tokens) in tokens.iter().enumerate() {
        let at: Vec<u32> = (0..ranges[sequence].0).map(|position| slots.of(sequence, position)).collect();
        store(d, heads, layer, &at, tokens, &mut cache);
    }

    // Keys and values must come from the cache: those of the rows are poisoned.
    let (mut qkv, mut query_start, mut context_len) = (Vec::new(), vec![0u32], Vec::new());
    for (tokens, &(context, queries)) in tokens.iter().zip(ranges) {
        for row in tokens.chunks_exact(cols).skip(context - queries) {
            qkv.extend_from_slice(&row[..width]);
            qkv.resize(qkv.len() + cols - width, f32::NAN);
        }
        query_start.push(query_start[query_start.len() - 1] + queries as u32);
        context_len.push(context as u32);
    }
    let live = query_start[ranges.len()] as usize;
    let rows = live + padding;
    qkv.resize(rows * cols, f32::NAN);
    let batch = AttentionBatch {
        positions: &vec![0; rows],
        slots: &vec![NO_SLOT; rows],
        query_start: &query_start,
        context_len: &context_len,
        kv: slots.index(),
        window,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut out = d.poisoned(rows, width);
    d.backend.attention(&d.filled(cols, &qkv), heads, scale, &step, layer, &cache, &mut out);
    let out = d.read(&out);
    let zero = out[live * width..].iter().all(|x| x.to_bits() == 0);
    assert!(zero || layer > 0, "{}: padding rows must be zero", d.name);
    let mut at = 0;
    for (tokens, &(context, queries)) in tokens.iter().zip(ranges) {
        let what = format!(
            "{heads:?} {} block {block_size:?} window {window:?}: {queries} of {context} in {ranges:?}",
            d.kv.name()
        );
        let expected = expected(heads, scale, tokens, [context, queries], window, d.kv);
        // Where the device multiplies bfloat16, the softmax's weights are rounded to it (2^-9 each), and else to halves
        // (2^-12); and the output of a GPU to what its activations are.
        let weights = if d.kv == KvDtype::Bf16 { 4e-3 } else { 5e-4 };
        let bound = weights + d.rounding;
        let error = crate::relative_error(&out[at..at + queries * width], &expected);
        assert!(error <= bound, "{}: {what}: {error:.2e}", d.name);
        at += queries * width;
    }
    out[..at].iter().map(|x| x.to_bits()).collect()
}

fn store<B: Backend>(
    d: &Device<B>,
    heads: HeadShape,
    layer: usize,
    at: &[u32],
    rows: &[f32],
    cache: &mut B::KvCache,
) {
    let cols = (heads.heads + 2 * heads.kv_heads) * heads.head_dim;
    // Frequency zero: keys are stored as they are.
    let rope = d.backend.load_rope(&vec![0.0; heads.head_dim / 2], 1.0, 1).expect("small");
    let transform = QkTransform { heads, rope: &rope, qk_norm: None };
    for (at, rows) in at.chunks(4096).zip(rows.chunks(4096 * cols)) {
        let batch = AttentionBatch {
            positions: &vec![0; at.len()],
            slots: at,
            query_start: &[0],
            context_len: &[],
            kv: KvIndex::Contiguous { start: &[] },
            window: None,
        };
        let step = d.backend.begin_step(batch.into()).expect("small");
        d.backend.rotate_and_store(&mut d.filled(cols, rows), &transform, &step, layer, cache);
    }
}

fn expected(
    heads: HeadShape,
    scale: f32,
    tokens: &[f32],
    [context, queries]: [usize; 2],
    window: Option<u32>,
    kv: KvDtype,
) -> Vec<f64> {
    let HeadShape { heads: q_heads, kv_heads, head_dim } = heads;
    let cols = (q_heads + 2 * kv_heads) * head_dim;
    let part = |start: usize| -> Vec<f32> {
        tokens
            .chunks_exact(cols)
            .flat_map(|row| {
                row[start * head_dim..][..kv_heads * head_dim].iter().map(|&x| crate::held(x, kv))
            })
            .collect()
    };
    let batch = AttentionBatch {
        positions: &[],
        slots: &[],
        query_start: &[0, queries as u32],
        context_len: &[context as u32],
        kv: KvIndex::Contiguous { start: &[0] },
        window,
    };
    let qkv = &tokens[(context - queries) * cols..];
    reference::attention(heads, scale, qkv, &batch, &part(q_heads), &part(q_heads + kv_heads))
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim }
}

fn mixtures<B: Backend>(d: &Device<B>, heads: HeadShape, block_size: Option<u32>, rng: &mut StdRng) {
    let mut attend = |ranges: &Ranges, padding| attend(d, heads, ranges, block_size, None, padding, rng);
    attend(&[(1, 1)], 0);
    attend(&[(37, 1), (700, 1), (1, 1), (129, 1)], 3);
    attend(&[(150, 150), (64, 1), (200, 70), (90, 3), (33, 0), (5, 5)], 2);
    attend(&[(2100, 1), (300, 129)], 0);
}

#[test]
fn every_shape_and_layout_is_close_to_float64() {
    for mut rng in seeds(&[4]) {
        for heads in [
            shape(9, 3, 64),
            shape(4, 4, 80),
            shape(6, 2, 96),
            shape(8, 2, 128),
            shape(2, 1, 256),
            shape(16, 1, 64),
        ] {
            for block_size in [None, Some(8), Some(16), Some(24), Some(64), Some(256)] {
                on_every_cache!(heads, mixtures, heads, block_size, &mut rng);
            }
        }
    }
}

/// Windows that end within tiles of positions, at their edges and beyond contexts; decodes that are split, and tiles of
/// rows of which some see nothing of the first positions.
fn windows<B: Backend>(d: &Device<B>, heads: HeadShape, rng: &mut StdRng) {
    let ranges = [(37, 1), (2100, 1), (150, 150), (900, 300), (90, 3), (2000, 2)];
    for window in [1, 64, 100, 128, 700, 5000] {
        attend(d, heads, &ranges, Some(16), Some(window), 2, rng);
    }
    attend(d, heads, &ranges, None, Some(100), 0, rng);
}

#[test]
fn windows_are_close_to_float64() {
    for mut rng in seeds(&[5]) {
        for heads in [shape(9, 3, 64), shape(4, 4, 80), shape(8, 2, 128), shape(2, 1, 256)] {
            on_every_cache!(heads, windows, heads, &mut rng);
        }
    }
}

fn random_batches<B: Backend>(d: &Device<B>, heads: HeadShape, rng: &mut StdRng) {
    for _ in 0..2 {
        let mut rows = 0;
        let ranges: Vec<(usize, usize)> = (0..rng.random_range(1..9))
            .map(|_| {
                let context = rng.random_range(1..600usize);
                let queries = if rng.random_bool(0.5) { 1 } else { rng.random_range(1..=context) };
                // Within what the device under test was made for.
                let queries = queries.min(4000 - rows);
                rows += queries;
                (context, queries)
            })
            .collect();
        let block_size = [None, Some(8), Some(16), Some(40), Some(128)][rng.random_range(0..5)];
        let window = [None, None, Some(1), Some(33), Some(200)][rng.random_range(0..5)];
        let padding = rng.random_range(0..4);
        attend(d, heads, &ranges, block_size, window, padding, rng);
    }
}

#[test]
fn random_ragged_batches_are_close_to_float64() {
    for mut rng in seeds(&[1, 2, 3]) {
        for head_dim in HEAD_DIMS {
            let heads = random_heads(head_dim, &mut rng);
            on_every_cache!(heads, random_batches, heads, &mut rng);
        }
    }
}

/// More pieces of work (a tile of rows and a KV head) for each multiprocessor of a large card than a block keeps descriptions
/// of; a few are longer, so that a block's pieces differ.
fn rounds<B: Backend>(d: &Device<B>, heads: HeadShape, rng: &mut StdRng) {
    let mut ranges: Vec<(usize, usize)> = (0..54)
        .map(|_| {
            let context = rng.random_range(18..40usize);
            (context, rng.random_range(17..=context))
        })
        .collect();
    ranges.extend([(400, 150), (300, 20), (140, 30), (270, 17), (33, 1)]);
    ranges.shuffle(rng);
    attend(d, heads, &ranges, Some(16), None, 1, rng);
}

#[test]
fn many_rounds_of_work_are_close_to_float64() {
    for mut rng in seeds(&[7]) {
        for head_dim in HEAD_DIMS {
            on_every_cache!(shape(12, 12, head_dim), rounds, shape(12, 12, head_dim), &mut rng);
        }
    }
}

fn runs_again<B: Backend>(d: &Device<B>, rng: &mut StdRng) {
    let ranges = [(2100, 1), (300, 129), (64, 1), (900, 2)];
    // The same data in every run.
    let seed = rng.random();
    let run = || attend(d, shape(8, 2, 128), &ranges, Some(16), None, 1, &mut StdRng::seed_from_u64(seed));
    let first = run();
    for _ in 0..5 {
        assert!(first == run(), "{}", d.name);
    }
}

#[test]
fn the_same_batch_gives_the_same_bits() {
    for mut rng in seeds(&[6]) {
        on_every_cache!(shape(8, 2, 128), runs_again, &mut rng);
    }
}
