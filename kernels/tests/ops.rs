//! Norms, rotation, activation, embedding and gathering against float64, and row by row against themselves.

use std::num::NonZeroUsize;

use quire_kernels::cpu::{Buffer, CpuBackend, CpuOptions, Isa};
use quire_kernels::{
    AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, MatrixSource, NO_SLOT, QkTransform,
    StepInput, WeightFormat, reference,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Rows and columns: one row, ragged columns, and enough of both to be split among threads.
const SIZES: [(usize, usize); 6] = [(1, 576), (3, 1), (2, 7), (5, 100), (130, 576), (33, 2050)];

fn backend(isa: Isa, threads: usize) -> CpuBackend {
    let options = CpuOptions { threads: NonZeroUsize::new(threads), isa: Some(isa) };
    CpuBackend::new(options).expect("available")
}

fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-3.0..3.0)).collect()
}

fn filled(backend: &CpuBackend, cols: usize, values: &[f32]) -> Buffer {
    // One row more than is used, poisoned: operations must keep to the rows in use.
    let rows = values.len() / cols;
    let mut buffer = backend.buffer(rows + 1, cols).expect("small");
    buffer.values_mut().fill(f32::NAN);
    backend.set_rows(&mut buffer, rows);
    buffer.values_mut().copy_from_slice(values);
    buffer
}

fn poisoned(backend: &CpuBackend, rows: usize, cols: usize) -> Buffer {
    filled(backend, cols, &vec![f32::NAN; rows * cols])
}

fn assert_close(out: &[f32], expected: &[f64], what: &str) {
    assert_eq!(out.len(), expected.len(), "{what}");
    for (i, (&out, &expected)) in out.iter().zip(expected).enumerate() {
        let error = (f64::from(out) - expected).abs();
        assert!(error <= 2e-6 * expected.abs().max(1.0), "{what}: element {i} is {out}, not {expected}");
    }
}

fn every_isa(mut body: impl FnMut(Isa, &CpuBackend)) {
    for isa in Isa::available() {
        body(isa, &backend(isa, 2));
    }
}

#[test]
fn rms_norm() {
    every_isa(|isa, backend| {
        for (rows, cols) in SIZES {
            let (x, weight) = (random(rows * cols, 1), random(cols, 2));
            let w = backend.load_vector(&weight).expect("small");
            let mut out = poisoned(backend, rows, cols);
            backend.rms_norm(&filled(backend, cols, &x), &w, 1e-5, &mut out);
            assert_close(out.values(), &reference::rms_norm(&x, &weight, 1e-5), &format!("{isa:?} {cols}"));
            // A row computed alone has the same bits.
            let mut alone = poisoned(backend, 1, cols);
            let last = (rows - 1) * cols;
            backend.rms_norm(&filled(backend, cols, &x[last..]), &w, 1e-5, &mut alone);
            assert_eq!(alone.values(), &out.values()[last..], "{isa:?} {rows} x {cols}");
        }
    });
}

#[test]
fn add_rms_norm() {
    every_isa(|isa, backend| {
        for (rows, cols) in SIZES {
            let (x, delta, weight) = (random(rows * cols, 3), random(rows * cols, 4), random(cols, 5));
            let w = backend.load_vector(&weight).expect("small");
            let mut residual = filled(backend, cols, &x);
            let mut out = poisoned(backend, rows, cols);
            backend.add_rms_norm(&mut residual, &filled(backend, cols, &delta), &w, 1e-6, &mut out);
            let sum: Vec<f32> = x.iter().zip(&delta).map(|(a, b)| a + b).collect();
            assert_eq!(residual.values(), sum, "{isa:?} {rows} x {cols}");
            assert_close(out.values(), &reference::rms_norm(&sum, &weight, 1e-6), &format!("{isa:?} {cols}"));
        }
    });
}

#[test]
fn silu_mul() {
    every_isa(|isa, backend| {
        for (rows, cols) in SIZES {
            let mut x = random(rows * 2 * cols, 6);
            x[0] = -120.0;
            x[cols / 2] = 90.0;
            let mut out = poisoned(backend, rows, cols);
            backend.silu_mul(&filled(backend, 2 * cols, &x), &mut out);
            assert_close(out.values(), &reference::silu_mul(&x, cols), &format!("{isa:?} {cols}"));
        }
    });
}

/// A step that only says tokens and wanted rows.
fn rows<'a>(tokens: &'a [u32], logit_rows: &'a [u32]) -> StepInput<'a> {
    let kv = KvIndex::Contiguous { start: &[] };
    let batch =
        AttentionBatch { positions: &[], slots: &[], query_start: &[0], context_len: &[], kv, window: None };
    StepInput { tokens, batch, logit_rows }
}

#[test]
fn embedding_over_stacked_formats_and_gather() {
    every_isa(|isa, backend| {
        let cols = 64;
        let f32s = random(5 * cols, 7);
        let bf16s: Vec<half::bf16> = random(400 * cols, 8).into_iter().map(half::bf16::from_f32).collect();
        let first: Vec<u8> = f32s.iter().flat_map(|x| x.to_le_bytes()).collect();
        let second: Vec<u8> = bf16s.iter().flat_map(|x| x.to_le_bytes()).collect();
        let parts = [
            MatrixSource::new(WeightFormat::F32, 5, cols, &first).expect("sizes agree"),
            MatrixSource::new(WeightFormat::Bf16, 400, cols, &second).expect("sizes agree"),
        ];
        let table = backend.load_matrix(&parts).expect("small");
        let tokens: Vec<u32> = (0..600).map(|i| (i * 37 + 4) % 405).collect();
        let mut out = poisoned(backend, tokens.len(), cols);
        backend.embed(&rows(&tokens, &[]), &table, &mut out);
        for (token, row) in tokens.iter().map(|&t| t as usize).zip(out.values().chunks_exact(cols)) {
            for (i, &x) in row.iter().enumerate() {
                let expected =
                    if token < 5 { f32s[token * cols + i] } else { bf16s[(token - 5) * cols + i].to_f32() };
                // The packed form may keep f32 weights as bf16.
                assert!((x - expected).abs() <= expected.abs() / 256.0, "{isa:?}: token {token}");
            }
        }
        let mut gathered = poisoned(backend, 3, cols);
        backend.gather_rows(&out, &rows(&[], &[599, 0, 7]), &mut gathered);
        for (row, from) in gathered.values().chunks_exact(cols).zip([599, 0, 7]) {
            assert_eq!(row, &out.values()[from * cols..][..cols]);
        }
    });
}

#[test]
#[should_panic(expected = "outside the vocabulary")]
fn a_token_outside_the_vocabulary() {
    let backend = backend(Isa::detect(), 1);
    let bytes = [0u8; 4 * 64];
    let source = MatrixSource::new(WeightFormat::F32, 1, 64, &bytes).expect("sizes agree");
    let table = backend.load_matrix(&[source]).expect("small");
    let mut out = backend.buffer(1, 64).expect("small");
    backend.embed(&rows(&[1], &[]), &table, &mut out);
}

/// Rotation, QK norm and the stored values, read back through attention over one token: its output is V.
fn check_rotation(isa: Isa, backend: &CpuBackend, heads: HeadShape, dtype: KvDtype, norm: bool, rows: usize) {
    let HeadShape { heads: q_heads, kv_heads, head_dim } = heads;
    let cols = (q_heads + 2 * kv_heads) * head_dim;
    let inv_freq: Vec<f32> =
        (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let (x, q_weight, k_weight) = (random(rows * cols, 9), random(head_dim, 10), random(head_dim, 11));
    let rope = backend.load_rope(&inv_freq, 1.25, 5000).expect("small");
    let weights =
        (backend.load_vector(&q_weight).expect("small"), backend.load_vector(&k_weight).expect("small"));
    let transform =
        QkTransform { heads, rope: &rope, qk_norm: norm.then_some((&weights.0, &weights.1, 1e-6)) };
    let positions: Vec<u32> = (0..rows as u32).map(|i| (i * 997) % 5000).collect();
    let mut slots: Vec<u32> = (0..rows as u32).rev().collect();
    slots[rows / 2] = NO_SLOT;
    let start: Vec<u32> = slots.iter().map(|&slot| if slot == NO_SLOT { 0 } else { slot }).collect();
    let query_start: Vec<u32> = (0..=rows as u32).collect();
    let batch = AttentionBatch {
        positions: &positions,
        slots: &slots,
        query_start: &query_start,
        context_len: &vec![1; rows],
        kv: KvIndex::Contiguous { start: &start },
        window: None,
    };
    let mut cache =
        backend.kv_cache(KvShape { layers: 1, slots: rows, kv_heads, head_dim, dtype }).expect("small");
    let mut qkv = filled(backend, cols, &x);
    backend.rotate_and_store(&mut qkv, &transform, &batch.into(), 0, &mut cache);
    let mut out = poisoned(backend, rows, q_heads * head_dim);
    backend.attention(&qkv, heads, 1.0, &batch.into(), 0, &cache, &mut out);

    for row in (0..rows).filter(|&row| slots[row] != NO_SLOT) {
        for head in 0..q_heads + kv_heads {
            let at = row * cols + head * head_dim;
            let raw = &x[at..at + head_dim];
            let weight = if head < q_heads { &q_weight } else { &k_weight };
            let head: Vec<f64> = if norm {
                reference::rms_norm(raw, weight, 1e-6)
            } else {
                raw.iter().map(|&x| f64::from(x)).collect()
            };
            let expected = reference::rope(&head, &inv_freq, 1.25, positions[row]);
            assert_close(&qkv.values()[at..at + head_dim], &expected, &format!("{isa:?} row {row}"));
        }
        for head in 0..q_heads {
            let kv = q_heads + kv_heads + head / (q_heads / kv_heads);
            let stored: Vec<f64> = x[row * cols + kv * head_dim..][..head_dim]
                .iter()
                .map(|&x| if dtype == KvDtype::F32 { x } else { half::bf16::from_f32(x).to_f32() })
                .map(f64::from)
                .collect();
            assert_close(&out.values()[(row * q_heads + head) * head_dim..][..head_dim], &stored, "stored V");
        }
    }
}

#[test]
fn rotation_and_store() {
    every_isa(|isa, backend| {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (2, 2, 80), (4, 1, 128), (2, 1, 8), (3, 1, 24)] {
            let heads = HeadShape { heads, kv_heads, head_dim };
            for (rows, norm) in [(1, false), (40, true), (100, false)] {
                // A lone row would be the one without a slot.
                check_rotation(isa, backend, heads, KvDtype::F32, norm, rows + 1);
                check_rotation(isa, backend, heads, KvDtype::Bf16, norm, rows + 1);
            }
        }
    });
}

mod breaches {
    use super::*;

    fn store(positions: &[u32], slots: &[u32]) {
        let backend = backend(Isa::detect(), 2);
        let heads = HeadShape { heads: 1, kv_heads: 1, head_dim: 8 };
        let shape = KvShape { layers: 1, slots: 4, kv_heads: 1, head_dim: 8, dtype: KvDtype::Bf16 };
        let mut cache = backend.kv_cache(shape).expect("small");
        let rope = backend.load_rope(&[1.0; 4], 1.0, 10).expect("small");
        let mut qkv = backend.buffer(slots.len(), 24).expect("small");
        let batch = AttentionBatch {
            positions,
            slots,
            query_start: &[0],
            context_len: &[],
            kv: KvIndex::Contiguous { start: &[] },
            window: None,
        };
        let transform = QkTransform { heads, rope: &rope, qk_norm: None };
        backend.rotate_and_store(&mut qkv, &transform, &batch.into(), 0, &mut cache);
    }

    #[test]
    #[should_panic(expected = "8 at 32 of 32")]
    fn a_slot_outside_the_cache() {
        store(&[0], &[4]);
    }

    #[test]
    #[should_panic(expected = "position 10")]
    fn a_position_outside_the_table() {
        store(&[10], &[0]);
    }

    #[test]
    fn slots_given_twice_are_no_race() {
        store(&[0; 64], &[2; 64]);
    }
}
