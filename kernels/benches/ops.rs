//! Norms, rotation, activation and sampling.

#[path = "common/ceiling.rs"]
mod ceiling;
#[path = "common/report.rs"]
mod report;

use ceiling::Ceiling;
use criterion::Criterion;
use quire_kernels::cpu::{Buffer, CpuBackend, CpuOptions, Isa, ThreadPool};
use quire_kernels::sampling::{Sampler, SamplingRule};
use quire_kernels::{AttentionBatch, Backend, HeadShape, KvDtype, KvIndex, KvShape, QkTransform};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use report::{Work, bench, group};

const HEADS: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
const HIDDEN: usize = 576;
const FFN: usize = 1536;

fn buffer(backend: &CpuBackend, rows: usize, cols: usize) -> Buffer {
    let mut rng = StdRng::seed_from_u64(3);
    let mut buffer = backend.buffer(rows, cols).expect("memory");
    buffer.values_mut().fill_with(|| rng.random_range(-2.0..2.0));
    buffer
}

/// Bytes read and written, against the bandwidth of memory: what stays in a cache goes beyond it.
fn bytes(floats: usize, ceiling: Ceiling) -> Work {
    Work { amount: (4 * floats) as f64, name: "GB/s", ceiling: ceiling.read_gbs }
}

fn dense(criterion: &mut Criterion, backend: &CpuBackend, ceiling: Ceiling) {
    let mut group = group(criterion, "dense");
    for rows in [1, 32, 512, 4096] {
        let x = buffer(backend, rows, HIDDEN);
        let mut residual = buffer(backend, rows, HIDDEN);
        let mut out = buffer(backend, rows, HIDDEN);
        let weight = backend.load_vector(&[1.0; HIDDEN]).expect("memory");
        let work = bytes(2 * rows * HIDDEN, ceiling);
        bench(&mut group, &format!("rms_norm {rows} x {HIDDEN}"), work, || {
            backend.rms_norm(&x, &weight, 1e-5, &mut out);
        });
        let work = bytes(4 * rows * HIDDEN, ceiling);
        bench(&mut group, &format!("add_rms_norm {rows} x {HIDDEN}"), work, || {
            backend.add_rms_norm(&mut residual, &x, &weight, 1e-5, &mut out);
        });
        let gate_up = buffer(backend, rows, 2 * FFN);
        let mut out = buffer(backend, rows, FFN);
        let work = bytes(3 * rows * FFN, ceiling);
        bench(&mut group, &format!("silu_mul {rows} x {FFN}"), work, || {
            backend.silu_mul(&gate_up, &mut out);
        });
    }
}

fn rotation(criterion: &mut Criterion, backend: &CpuBackend, ceiling: Ceiling) {
    let mut group = group(criterion, "rotate_and_store");
    let HeadShape { heads, kv_heads, head_dim } = HEADS;
    let inv_freq: Vec<f32> =
        (0..head_dim / 2).map(|i| 1e5f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
    let rope = backend.load_rope(&inv_freq, 1.0, 4096).expect("memory");
    let norm = backend.load_vector(&vec![1.0; head_dim]).expect("memory");
    for rows in [1, 32, 512] {
        let shape = KvShape { layers: 1, slots: rows, kv_heads, head_dim, dtype: KvDtype::Bf16 };
        let mut cache = backend.kv_cache(shape).expect("memory");
        let mut qkv = buffer(backend, rows, (heads + 2 * kv_heads) * head_dim);
        let at: Vec<u32> = (0..rows as u32).collect();
        let batch = AttentionBatch {
            positions: &at,
            slots: &at,
            query_start: &[0],
            context_len: &[],
            kv: KvIndex::Contiguous { start: &[] },
            window: None,
        };
        for (name, qk_norm) in [("", None), (" with QK norm", Some((&norm, &norm, 1e-6)))] {
            let transform = QkTransform { heads: HEADS, rope: &rope, qk_norm };
            // Q and K read and written, V read, K and V stored as bf16.
            let work = bytes(rows * head_dim * (2 * (heads + kv_heads) + 2 * kv_heads), ceiling);
            bench(&mut group, &format!("{rows} rows{name}"), work, || {
                backend.rotate_and_store(&mut qkv, &transform, &batch.into(), 0, &mut cache);
            });
        }
    }
}

fn sampling(criterion: &mut Criterion, ceiling: Ceiling) {
    let mut group = group(criterion, "sample");
    let mut rng = StdRng::seed_from_u64(5);
    let history: Vec<u32> = (0..500).map(|_| rng.random_range(0..49152)).collect();
    let random = SamplingRule { temperature: 0.8, ..SamplingRule::default() };
    let rules = [
        ("greedy", SamplingRule::default()),
        ("temperature", random),
        ("top-k 50", SamplingRule { top_k: 50, ..random }),
        ("top-p 0.9", SamplingRule { top_p: 0.9, ..random }),
        ("min-p 0.05", SamplingRule { min_p: 0.05, ..random }),
        (
            "penalties, top-k, top-p",
            SamplingRule {
                top_k: 50,
                top_p: 0.9,
                repetition_penalty: 1.1,
                presence_penalty: 0.1,
                frequency_penalty: 0.1,
                ..random
            },
        ),
    ];
    let mut sampler = Sampler::new(Isa::detect()).expect("the detected instruction set");
    for vocabulary in [49_152, 128_256] {
        // As peaked as a language model's: a normal spread of 3 in units of e.
        let logits: Vec<f32> =
            (0..vocabulary).map(|_| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() * 3.0).collect();
        for (name, rule) in rules {
            let mut work_logits = logits.clone();
            let mut i = 0u32;
            bench(&mut group, &format!("{name}, {vocabulary} tokens"), bytes(vocabulary, ceiling), || {
                if rule.repetition_penalty != 1.0 {
                    work_logits.copy_from_slice(&logits);
                }
                i = i.wrapping_add(1);
                let uniform = f64::from(i % 1000) / 1000.0;
                std::hint::black_box(sampler.sample(&mut work_logits, &rule, &history, 250, uniform));
            });
        }
    }
}

fn main() {
    let backend = CpuBackend::new(CpuOptions::default()).expect("the detected instruction set");
    let ceiling = Ceiling::measure(&ThreadPool::new(ThreadPool::default_threads()));
    println!("{}, {} threads; {ceiling}", backend.isa().name(), backend.threads());
    let mut criterion = Criterion::default().configure_from_args();
    dense(&mut criterion, &backend, ceiling);
    rotation(&mut criterion, &backend, ceiling);
    sampling(&mut criterion, ceiling);
    criterion.final_summary();
}
