//! K and V on the move: to host memory and back, and between slots.

use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvIndex, KvShape, NO_SLOT, QkTransform, SwapDirection,
};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::{Device, HEAD_DIMS, on_every_cache, random, random_heads, seeds};

/// Columns of a row's Q, K and V.
fn width(heads: HeadShape) -> usize {
    (heads.heads + 2 * heads.kv_heads) * heads.head_dim
}

/// What a query finds in `tokens` tokens from slot `start` on of a layer.
fn attended<B: Backend>(
    d: &Device<B>,
    heads: HeadShape,
    cache: &B::KvCache,
    query: &[f32],
    [start, tokens]: [u32; 2],
    layer: usize,
) -> Vec<f32> {
    let batch = AttentionBatch {
        positions: &[tokens - 1],
        slots: &[NO_SLOT],
        query_start: &[0, 1],
        context_len: &[tokens],
        kv: KvIndex::Contiguous { start: &[start] },
        window: None,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    let mut out = d.poisoned(1, heads.heads * heads.head_dim);
    d.backend.attention(&d.filled(width(heads), query), heads, 0.1, &step, layer, cache, &mut out);
    d.read(&out)
}

/// Stores `tokens` random tokens from slot `start` on.
fn store<B: Backend>(
    d: &Device<B>,
    heads: HeadShape,
    cache: &mut B::KvCache,
    [start, tokens]: [u32; 2],
    rng: &mut StdRng,
) {
    let inv_freq: Vec<f32> = (0..heads.head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    let rope = d.backend.load_rope(&inv_freq, 1.0, tokens as usize).expect("small");
    let transform = QkTransform { heads, rope: &rope, qk_norm: None };
    let positions: Vec<u32> = (0..tokens).collect();
    let slots: Vec<u32> = (start..start + tokens).collect();
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &[0, tokens],
        context_len: &[tokens],
        kv: KvIndex::Contiguous { start: &[start] },
        window: None,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    for layer in 0..2 {
        let values = random(tokens as usize * width(heads), rng);
        d.backend.rotate_and_store(&mut d.filled(width(heads), &values), &transform, &step, layer, cache);
    }
}

/// Tokens from slot `from` on go to host memory, come back from slot `to` on and are copied to slots from `copied` on.
fn swapped<B: Backend>(
    d: &Device<B>,
    heads: HeadShape,
    tokens: u32,
    [from, to, copied]: [u32; 3],
    rng: &mut StdRng,
) {
    let shape = |slots: u32| KvShape {
        layers: 2,
        slots: slots as usize,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        dtype: d.kv,
    };
    let mut cache = d.backend.kv_cache(shape(to + tokens + 3)).expect("small");
    let mut host = d.backend.kv_host(shape(tokens + 9)).expect("small");
    let query = random(width(heads), rng);
    let attended =
        |cache: &B::KvCache, start, layer| attended(d, heads, cache, &query, [start, tokens], layer);
    store(d, heads, &mut cache, [from, tokens], rng);
    let expected = [0, 1].map(|layer| attended(&cache, from, layer));
    // Out in an order of its own, others over them, and in again somewhere else: one queued after the other.
    let mut order: Vec<u32> = (0..tokens + 9).collect();
    order.shuffle(rng);
    let out: Vec<[u32; 2]> = (from..from + tokens).zip(order).map(|(slot, host)| [slot, host]).collect();
    d.backend.swap(SwapDirection::Out, &mut cache, &mut host, &out).expect("small");
    store(d, heads, &mut cache, [from, tokens], rng);
    store(d, heads, &mut cache, [to, tokens], rng);
    let back: Vec<[u32; 2]> = out.iter().map(|&[slot, host]| [slot - from + to, host]).collect();
    d.backend.swap(SwapDirection::In, &mut cache, &mut host, &back).expect("small");
    let what = format!("{}: {tokens} tokens, {heads:?}", d.name);
    for (layer, expected) in expected.iter().enumerate() {
        assert_eq!(&attended(&cache, to, layer), expected, "{what}: layer {layer}");
        assert_ne!(&attended(&cache, from, layer), expected, "{what}: what lies there now");
    }
    d.backend.swap(SwapDirection::In, &mut cache, &mut host, &[]).expect("nothing to do");
    let within: Vec<[u32; 2]> = (0..tokens).map(|i| [to + i, copied + i]).collect();
    d.backend.copy_within(&mut cache, &within).expect("small");
    for (layer, expected) in expected.iter().enumerate() {
        assert_eq!(&attended(&cache, copied, layer), expected, "{what}: layer {layer}, copied");
    }
}

#[test]
fn what_is_swapped_out_comes_back_the_same() {
    for mut rng in seeds(&[20]) {
        let heads = HeadShape { heads: 4, kv_heads: 2, head_dim: 80 };
        on_every_cache!(heads, swapped, heads, 21, [3, 40, 10], &mut rng);
        for head_dim in HEAD_DIMS {
            let heads = random_heads(head_dim, &mut rng);
            let (tokens, from) = (rng.random_range(1..=150), rng.random_range(0..9));
            let to = from + tokens + rng.random_range(0..9);
            let copied = rng.random_range(0..=to - tokens);
            on_every_cache!(heads, swapped, heads, tokens, [from, to, copied], &mut rng);
        }
    }
}
