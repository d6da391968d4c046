//! A small model's passes over the whole backend: prefill at once, token by token, and beside others.

use std::num::NonZeroUsize;

use quire_kernels::cpu::{Buffer, CpuBackend, CpuOptions, Isa, KvCache, RopeTable, Vector, Weight};
use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KernelError, KvDtype, KvIndex, KvShape, MatrixSource, NO_SLOT,
    QkTransform, StepInput, WeightFormat,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 32 };
const HIDDEN: usize = 128;
const FFN: usize = 192;
const VOCABULARY: usize = 97;
const LAYERS: usize = 2;
const BLOCK: u32 = 4;
const SLOTS: usize = 256;

struct Layer {
    norm: Vector,
    qkv: Weight,
    bias: Vector,
    out: Weight,
    ffn_norm: Vector,
    gate_up: Weight,
    down: Weight,
}

/// Two layers of a Llama with random weights.
struct Model {
    backend: CpuBackend,
    embedding: Weight,
    layers: Vec<Layer>,
    norm: Vector,
    rope: RopeTable,
    qk_norm: Vector,
}

impl Model {
    fn new(isa: Isa, threads: usize) -> Self {
        let options = CpuOptions { threads: NonZeroUsize::new(threads), isa: Some(isa) };
        let backend = CpuBackend::new(options).expect("available");
        let mut rng = StdRng::seed_from_u64(21);
        let mut matrix = |rows: usize, cols: usize| {
            let bytes: Vec<u8> = (0..rows * cols)
                .flat_map(|_| half::bf16::from_f32(rng.random_range(-0.2..0.2)).to_le_bytes())
                .collect();
            let source = MatrixSource::new(WeightFormat::Bf16, rows, cols, &bytes).expect("sizes agree");
            backend.load_matrix(&[source]).expect("small")
        };
        let vector = |n: usize, x: f32| backend.load_vector(&vec![x; n]).expect("small");
        let cols = (HEADS.heads + 2 * HEADS.kv_heads) * HEADS.head_dim;
        let embedding = matrix(VOCABULARY, HIDDEN);
        let layers = (0..LAYERS)
            .map(|_| Layer {
                norm: vector(HIDDEN, 1.0),
                qkv: matrix(cols, HIDDEN),
                bias: vector(cols, 0.1),
                out: matrix(HIDDEN, HEADS.heads * HEADS.head_dim),
                ffn_norm: vector(HIDDEN, 0.9),
                gate_up: matrix(2 * FFN, HIDDEN),
                down: matrix(HIDDEN, FFN),
            })
            .collect();
        let inv_freq: Vec<f32> = (0..16).map(|i| 1e4f32.powf(-(i as f32) / 16.0)).collect();
        let rope = backend.load_rope(&inv_freq, 1.0, SLOTS).expect("small");
        let (norm, qk_norm) = (vector(HIDDEN, 1.0), vector(HEADS.head_dim, 1.1));
        Self { backend, embedding, layers, norm, rope, qk_norm }
    }

    fn cache(&self) -> KvCache {
        let HeadShape { kv_heads, head_dim, .. } = HEADS;
        let dtype = KvDtype::Bf16;
        self.backend
            .kv_cache(KvShape { layers: LAYERS, slots: SLOTS, kv_heads, head_dim, dtype })
            .expect("small")
    }

    /// Logits of every token's row, padding included.
    fn forward(&self, step: &StepInput<'_>, cache: &mut KvCache) -> Vec<f32> {
        let b = &self.backend;
        let buffer = |cols| -> Buffer {
            let mut buffer = b.buffer(step.tokens.len(), cols).expect("small");
            buffer.values_mut().fill(f32::NAN);
            buffer
        };
        let width = HEADS.heads * HEADS.head_dim;
        let (mut x, mut y) = (buffer(HIDDEN), buffer(HIDDEN));
        let (mut qkv, mut attended) = (buffer(width + 2 * HEADS.kv_heads * HEADS.head_dim), buffer(width));
        let (mut gate_up, mut inner, mut delta) = (buffer(2 * FFN), buffer(FFN), buffer(HIDDEN));
        b.embed(step, &self.embedding, &mut x);
        for (i, layer) in self.layers.iter().enumerate() {
            if i == 0 {
                b.rms_norm(&x, &layer.norm, 1e-5, &mut y);
            } else {
                b.add_rms_norm(&mut x, &delta, &layer.norm, 1e-5, &mut y);
            }
            b.linear(&y, &layer.qkv, Some(&layer.bias), &mut qkv);
            let qk_norm = (i == 1).then_some((&self.qk_norm, &self.qk_norm, 1e-6));
            let transform = QkTransform { heads: HEADS, rope: &self.rope, qk_norm };
            b.rotate_and_store(&mut qkv, &transform, step, i, cache);
            b.attention(&qkv, HEADS, 0.18, step, i, cache, &mut attended);
            b.linear(&attended, &layer.out, None, &mut delta);
            b.add_rms_norm(&mut x, &delta, &layer.ffn_norm, 1e-5, &mut y);
            b.linear(&y, &layer.gate_up, None, &mut gate_up);
            b.silu_mul(&gate_up, &mut inner);
            b.linear(&inner, &layer.down, None, &mut delta);
        }
        b.add_rms_norm(&mut x, &delta, &self.norm, 1e-5, &mut y);
        let mut logits = buffer(VOCABULARY);
        b.linear(&y, &self.embedding, None, &mut logits);
        b.to_host(&logits).into_owned()
    }
}

/// Logits of `tokens` from `from` on, the earlier ones being in the cache, at blocks of the table; with `others`
/// unrelated sequences before it and `padding` rows after.
fn step(
    model: &Model,
    cache: &mut KvCache,
    tokens: &[u32],
    from: usize,
    others: usize,
    padding: usize,
) -> Vec<f32> {
    let table: Vec<u32> = (0..16).map(|i| (i * 11 + 5) % 40).collect();
    let mut tables: Vec<u32> = (50..50 + others as u32).collect();
    let mut table_start: Vec<u32> = (0..others as u32).collect();
    table_start.push(others as u32);
    tables.extend(&table);
    let mut ids = vec![7; others];
    let mut positions = vec![0; others];
    let mut slots: Vec<u32> = (50..50 + others as u32).map(|block| block * BLOCK).collect();
    for position in from..tokens.len() {
        ids.push(tokens[position]);
        positions.push(position as u32);
        slots.push(table[position / BLOCK as usize] * BLOCK + position as u32 % BLOCK);
    }
    let live = ids.len();
    ids.resize(live + padding, 0);
    positions.resize(live + padding, 0);
    slots.resize(live + padding, NO_SLOT);
    let mut query_start: Vec<u32> = (0..=others as u32).collect();
    query_start.push(live as u32);
    let mut context_len = vec![1; others];
    context_len.push(tokens.len() as u32);
    let kv = KvIndex::Paged { block_size: BLOCK, tables: &tables, table_start: &table_start };
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &query_start,
        context_len: &context_len,
        kv,
        window: None,
    };
    let logits = model.forward(&StepInput { tokens: &ids, batch, logit_rows: &[] }, cache);
    assert!(logits.iter().all(|x| x.is_finite()), "padding rows are computed too");
    logits[others * VOCABULARY..live * VOCABULARY].to_vec()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn logits_do_not_depend_on_how_a_sequence_is_computed() {
    let tokens: Vec<u32> = (0..45).map(|i| (i * i + 3) % VOCABULARY as u32).collect();
    for isa in Isa::available() {
        let model = Model::new(isa, 2);
        let whole = step(&model, &mut model.cache(), &tokens, 0, 0, 0);
        assert!(whole.iter().any(|x| x.abs() > 0.01), "{isa:?}: the model does something");

        let mut cache = model.cache();
        let one_by_one: Vec<f32> = (0..tokens.len())
            .flat_map(|i| step(&model, &mut cache, &tokens[..=i], i, i % 9, i % 4))
            .collect();
        assert!(bits(&whole) == bits(&one_by_one), "{isa:?}: token by token, beside others");

        let mut cache = model.cache();
        let mut chunked = step(&model, &mut cache, &tokens[..20], 0, 3, 0);
        chunked.extend(step(&model, &mut cache, &tokens, 20, 0, 6));
        assert!(bits(&whole) == bits(&chunked), "{isa:?}: in two chunks");

        let alone = Model::new(isa, 1);
        assert!(
            bits(&whole) == bits(&step(&alone, &mut alone.cache(), &tokens, 0, 0, 0)),
            "{isa:?}: one thread"
        );
    }
}

#[test]
fn instruction_sets_agree_closely() {
    let tokens: Vec<u32> = (0..30).map(|i| (i * 5 + 1) % VOCABULARY as u32).collect();
    let logits = |isa| {
        let model = Model::new(isa, 1);
        step(&model, &mut model.cache(), &tokens, 0, 0, 0)
    };
    let expected = logits(Isa::Portable);
    let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
    for isa in Isa::available() {
        let difference: f32 = logits(isa).iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
        assert!(difference.sqrt() / norm < 0.03, "{isa:?}: {}", difference.sqrt() / norm);
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    let backend = CpuBackend::new(CpuOptions::default()).expect("detected");
    assert!(matches!(backend.load_matrix(&[]), Err(KernelError::Shape(_))));
    assert!(matches!(backend.buffer(usize::MAX, 8), Err(KernelError::OutOfMemory { .. })));
    assert!(matches!(backend.load_rope(&[], 1.0, 10), Err(KernelError::Shape(_))));
    assert!(matches!(backend.load_rope(&[1.0], 1.0, usize::MAX), Err(KernelError::OutOfMemory { .. })));
    let shape = KvShape { layers: 1, slots: 1 << 50, kv_heads: 1, head_dim: 64, dtype: KvDtype::Bf16 };
    assert!(matches!(backend.kv_cache(shape), Err(KernelError::OutOfMemory { .. })));
    assert!(matches!(backend.kv_cache(KvShape { head_dim: 12, ..shape }), Err(KernelError::Shape(_))));
    let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
    let options = CpuOptions { isa: Some(foreign), ..CpuOptions::default() };
    assert!(matches!(CpuBackend::new(options), Err(KernelError::Unsupported(_))));
}

#[test]
#[should_panic(expected = "rows in a buffer of 3")]
fn more_rows_than_the_capacity() {
    let backend = CpuBackend::new(CpuOptions::default()).expect("detected");
    let mut buffer = backend.buffer(3, 8).expect("small");
    backend.set_rows(&mut buffer, 4);
}
