//! K and V on the move: to host memory and back, and between slots.

use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvIndex, KvShape, NO_SLOT, QkTransform, SwapDirection,
};

use crate::{Device, on_every_cache, random};

const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 80 };
const TOKENS: u32 = 21;
const SLOTS: u32 = 64;

/// What a query finds in the tokens at `start` of a layer.
fn attended<B: Backend>(d: &Device<B>, cache: &B::KvCache, start: u32, layer: usize) -> Vec<f32> {
    let width = (HEADS.heads + 2 * HEADS.kv_heads) * HEADS.head_dim;
    let batch = AttentionBatch {
        positions: &[TOKENS - 1],
        slots: &[NO_SLOT],
        query_start: &[0, 1],
        context_len: &[TOKENS],
        kv: KvIndex::Contiguous { start: &[start] },
        window: None,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    let mut out = d.poisoned(1, HEADS.heads * HEADS.head_dim);
    let query = d.filled(width, &random(width, 77));
    d.backend.attention(&query, HEADS, 0.1, &step, layer, cache, &mut out);
    d.read(&out)
}

/// Stores `TOKENS` random tokens from slot `start` on.
fn store<B: Backend>(d: &Device<B>, cache: &mut B::KvCache, start: u32, seed: u64) {
    let width = (HEADS.heads + 2 * HEADS.kv_heads) * HEADS.head_dim;
    let inv_freq: Vec<f32> = (0..HEADS.head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    let rope = d.backend.load_rope(&inv_freq, 1.0, 64).expect("small");
    let transform = QkTransform { heads: HEADS, rope: &rope, qk_norm: None };
    let positions: Vec<u32> = (0..TOKENS).collect();
    let slots: Vec<u32> = (start..start + TOKENS).collect();
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &[0, TOKENS],
        context_len: &[TOKENS],
        kv: KvIndex::Contiguous { start: &[start] },
        window: None,
    };
    let step = d.backend.begin_step(batch.into()).expect("small");
    for layer in 0..2 {
        let values = random(TOKENS as usize * width, seed + layer as u64);
        d.backend.rotate_and_store(&mut d.filled(width, &values), &transform, &step, layer, cache);
    }
}

fn swapped<B: Backend>(d: &Device<B>) {
    let shape = |slots: u32| KvShape {
        layers: 2,
        slots: slots as usize,
        kv_heads: HEADS.kv_heads,
        head_dim: HEADS.head_dim,
        dtype: d.kv,
    };
    let mut cache = d.backend.kv_cache(shape(SLOTS)).expect("small");
    let mut host = d.backend.kv_host(shape(30)).expect("small");
    store(d, &mut cache, 3, 1);
    let expected = [0, 1].map(|layer| attended(d, &cache, 3, layer));
    // Out in an order of its own, others over them, and in again somewhere else: one queued after the other.
    let out: Vec<[u32; 2]> = (0..TOKENS).map(|i| [3 + i, (i * 11 + 5) % 30]).collect();
    d.backend.swap(SwapDirection::Out, &mut cache, &mut host, &out).expect("small");
    store(d, &mut cache, 0, 9);
    store(d, &mut cache, 40, 9);
    let back: Vec<[u32; 2]> = out.iter().map(|&[slot, host]| [slot + 37, host]).collect();
    d.backend.swap(SwapDirection::In, &mut cache, &mut host, &back).expect("small");
    for (layer, expected) in expected.iter().enumerate() {
        assert_eq!(&attended(d, &cache, 40, layer), expected, "{}: layer {layer}", d.name);
        assert_ne!(&attended(d, &cache, 3, layer), expected, "{}: what lies there now", d.name);
    }
    d.backend.swap(SwapDirection::In, &mut cache, &mut host, &[]).expect("nothing to do");
    // Within the cache: what lies from 40 on to slots from 10 on.
    let within: Vec<[u32; 2]> = (0..TOKENS).map(|i| [40 + i, 10 + i]).collect();
    d.backend.copy_within(&mut cache, &within).expect("small");
    for (layer, expected) in expected.iter().enumerate() {
        assert_eq!(&attended(d, &cache, 10, layer), expected, "{}: layer {layer}, copied", d.name);
    }
}

#[test]
fn what_is_swapped_out_comes_back_the_same() {
    on_every_cache!(HEADS, swapped);
}
