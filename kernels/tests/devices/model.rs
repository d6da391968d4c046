//! A small model's passes over whole steps: prefill at once, in chunks, token by token, beside others.

use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvIndex, KvShape, MatrixSource, NO_SLOT, QkTransform, StepInput,
    WeightFormat,
};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::{Device, on_every_device, random, seeds, weight_bytes};

const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
const HIDDEN: usize = 128;
const VOCABULARY: usize = 104;
const BLOCK: u32 = 8;
const SLOTS: usize = 512;

struct Model<B: Backend> {
    embedding: B::Weight,
    qkv: B::Weight,
    out: B::Weight,
    norm: B::Vector,
    rope: B::Rope,
}

impl<B: Backend> Model<B> {
    fn new(d: &Device<B>, rng: &mut StdRng) -> Self {
        let mut matrix = |rows: usize, cols: usize| {
            let values: Vec<f32> = random(rows * cols, rng).iter().map(|x| x * 0.125).collect();
            let bytes = weight_bytes(WeightFormat::Bf16, &values);
            let source = MatrixSource::new(WeightFormat::Bf16, rows, cols, &bytes).expect("sizes agree");
            d.backend.load_matrix(&[source]).expect("small")
        };
        let width = HEADS.heads * HEADS.head_dim;
        let inv_freq: Vec<f32> = (0..32).map(|i| 1e4f32.powf(-(i as f32) / 32.0)).collect();
        Self {
            embedding: matrix(VOCABULARY, HIDDEN),
            qkv: matrix(width + 2 * HEADS.kv_heads * HEADS.head_dim, HIDDEN),
            out: matrix(HIDDEN, width),
            norm: d.backend.load_vector(&[1.0; HIDDEN]).expect("small"),
            rope: d.backend.load_rope(&inv_freq, 1.0, SLOTS).expect("small"),
        }
    }

    fn cache(&self, d: &Device<B>) -> B::KvCache {
        let HeadShape { kv_heads, head_dim, .. } = HEADS;
        let shape = KvShape { layers: 1, slots: SLOTS, kv_heads, head_dim, dtype: d.kv };
        d.backend.kv_cache(shape).expect("small")
    }

    /// Logits of every row, padding included.
    fn forward(&self, d: &Device<B>, input: StepInput<'_>, cache: &mut B::KvCache) -> Vec<f32> {
        let (b, rows) = (&d.backend, input.tokens.len());
        let width = HEADS.heads * HEADS.head_dim;
        let (mut x, mut y, mut delta) =
            (d.poisoned(rows, HIDDEN), d.poisoned(rows, HIDDEN), d.poisoned(rows, HIDDEN));
        let mut qkv = d.poisoned(rows, width + 2 * HEADS.kv_heads * HEADS.head_dim);
        let mut attended = d.poisoned(rows, width);
        let mut logits = b.logits_buffer(rows, VOCABULARY).expect("small");
        b.set_rows(&mut logits, rows);
        let step = b.begin_step(input).expect("small");
        b.embed(&step, &self.embedding, &mut x);
        b.rms_norm(&x, &self.norm, 1e-5, &mut y);
        b.linear(&y, &self.qkv, None, &mut qkv);
        let transform = QkTransform { heads: HEADS, rope: &self.rope, qk_norm: None };
        b.rotate_and_store(&mut qkv, &transform, &step, 0, cache);
        b.attention(&qkv, HEADS, 0.125, &step, 0, cache, &mut attended);
        b.linear(&attended, &self.out, None, &mut delta);
        b.add_rms_norm(&mut x, &delta, &self.norm, 1e-5, &mut y);
        b.linear(&y, &self.embedding, None, &mut logits);
        d.read(&logits)
    }
}

/// Logits of `tokens` from `from` on, the earlier ones being in the cache, with `others` unrelated sequences before and
/// `padding` rows after.
fn step<B: Backend>(
    d: &Device<B>,
    model: &Model<B>,
    cache: &mut B::KvCache,
    tokens: &[u32],
    from: usize,
    [others, padding]: [usize; 2],
) -> Vec<f32> {
    let table: Vec<u32> = (0..16).map(|i| (i * 11 + 5) % 40).collect();
    let mut tables: Vec<u32> = (50..50 + others as u32).collect();
    let mut table_start: Vec<u32> = (0..=others as u32).collect();
    tables.extend(&table);
    table_start.truncate(others + 1);
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
    let input = StepInput { tokens: &ids, batch, logit_rows: &[] };
    let logits = model.forward(d, input, cache);
    assert!(logits.iter().all(|x| x.is_finite()), "padding rows are computed too");
    logits[others * VOCABULARY..live * VOCABULARY].to_vec()
}

/// The same sequence computed whole, in two chunks and token by token, beside other sequences; `close` judges whether
/// two results agree.
fn cuts<B: Backend>(d: &Device<B>, close: fn(&[f32], &[f32]) -> bool, rng: &mut StdRng) {
    let length = rng.random_range(2..=128);
    for (length, cut) in [(90, 40), (length, rng.random_range(1..length))] {
        let tokens: Vec<u32> = (0..length).map(|_| rng.random_range(0..VOCABULARY as u32)).collect();
        let model = Model::new(d, rng);
        let whole = step(d, &model, &mut model.cache(d), &tokens, 0, [0, 0]);
        assert!(whole.iter().any(|x| x.abs() > 0.01), "{}: the model does something", d.name);
        let mut cache = model.cache(d);
        let one_by_one: Vec<f32> =
            (0..length).flat_map(|i| step(d, &model, &mut cache, &tokens[..=i], i, [i % 9, i % 4])).collect();
        assert!(close(&whole, &one_by_one), "{}: {length} tokens one by one, beside others", d.name);
        let mut cache = model.cache(d);
        let mut chunked = step(d, &model, &mut cache, &tokens[..cut], 0, [3, 0]);
        chunked.extend(step(d, &model, &mut cache, &tokens, cut, [0, 6]));
        assert!(close(&whole, &chunked), "{}: {length} tokens in two chunks, cut at {cut}", d.name);
    }
}

fn nearly(a: &[f32], b: &[f32]) -> bool {
    let b: Vec<f64> = b.iter().map(|&x| f64::from(x)).collect();
    crate::relative_error(a, &b) < 1e-2
}

#[test]
fn cuts_of_a_sequence_agree() {
    for mut rng in seeds(&[19]) {
        on_every_device!(HEADS, cuts, nearly, &mut rng);
    }
}
