//! Logits of a prefill, and of decodes, against the CPU's and Hugging Face Transformers', in both modes, and by what the KV memory holds.

use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, CudaExecutor, CudaExecutorOptions, KvCapacity, ModelExecutor,
};
use quire_kernels::KvDtype;

use super::{decode, distance, in_f16, options, source, tokens};

/// Heads of 64 and of 128 elements, norms of queries and keys, and Llama 3's rotation with its vocabulary of 128,256.
const SHAPES: [&str; 3] = ["smollm2-135m", "qwen3-0.6b", "llama-3.2-1b"];

/// Relative error of a GPU's logits by those of the CPU, with the same weights.
fn error_of_logits(shape: &str, kv_dtype: KvDtype, gpu: &CudaExecutorOptions) -> f64 {
    let text = tokens(150, 1);
    let cpu = CpuExecutorOptions {
        dtype: gpu.dtype,
        kv: KvCapacity::Slots(256),
        kv_dtype,
        max_batch_rows: 256,
        ..CpuExecutorOptions::default()
    };
    let mut cpu = CpuExecutor::load(&source(shape), &cpu).unwrap();
    let options = gpu;
    let mut gpu = CudaExecutor::load(&source(shape), options).unwrap();
    let expected = cpu.score(&text).unwrap().into_owned();
    let error = distance(&gpu.score(&text).unwrap(), &expected);
    println!("{shape}, {}: relative error of the logits {error:.2e}", mode(options));
    error
}

fn mode(options: &CudaExecutorOptions) -> &'static str {
    if options.batch_invariant { "batch-invariant" } else { "fast" }
}

/// These options, and the same in the batch-invariant mode, whose algorithms are others.
fn both_modes(options: &CudaExecutorOptions) -> [CudaExecutorOptions; 2] {
    [false, true].map(|batch_invariant| CudaExecutorOptions { batch_invariant, ..options.clone() })
}

#[test]
fn logits_are_the_cpus_within_bf16() {
    for shape in SHAPES {
        for options in both_modes(&options(256)) {
            let error = error_of_logits(shape, KvDtype::Bf16, &options);
            // Activations are rounded to bfloat16 (2^-9 each) some hundred times on the way.
            assert!(error < 3e-2, "{shape}, {}: {error:.2e}", mode(&options));
        }
    }
}

#[test]
fn logits_in_f16_are_the_cpus_within_f16() {
    for shape in SHAPES {
        for options in both_modes(&in_f16(256)) {
            // The CPU multiplies weights of float16 in single precision.
            let error = error_of_logits(shape, KvDtype::F32, &options);
            // As above, of three bits more.
            assert!(error < 4e-3, "{shape}, {}: {error:.2e}", mode(&options));
        }
    }
}

#[test]
#[ignore = "needs logits by Hugging Face Transformers: scripts/gpu-check --transformers"]
fn logits_are_as_near_to_exact_ones_as_transformers_are() {
    let folder = std::env::var("QUIRE_HF_LOGITS").expect("QUIRE_HF_LOGITS names the folder");
    let read = |name: String| -> Vec<f32> {
        let bytes = std::fs::read(format!("{folder}/{name}")).expect("written by scripts/hf_logits.py");
        bytes.chunks_exact(4).map(|x| f32::from_ne_bytes([x[0], x[1], x[2], x[3]])).collect()
    };
    for shape in SHAPES {
        let model = ModelSource::parse(&format!("{folder}/{shape}")).unwrap();
        let exact = read(format!("{shape}.f32"));
        for options in [options(256), in_f16(256)].iter().flat_map(both_modes) {
            let dtype = options.dtype;
            let mut gpu = CudaExecutor::load(&model, &options).unwrap();
            let logits = gpu.score(&tokens(150, 1)).unwrap().into_owned();
            let theirs = read(format!("{shape}.{dtype}"));
            let (ours, other) = (distance(&logits, &exact), distance(&theirs, &exact));
            println!(
                "{shape}, {}: from Transformers in f32, ours in {dtype} are {ours:.2e} and Transformers' {other:.2e}; from \
                 each other {:.2e}",
                mode(&options),
                distance(&logits, &theirs)
            );
            assert!(ours < 1.5 * other, "{shape}, {dtype}: {ours:.2e}, Transformers {other:.2e}");

            // The last 50 tokens one at a time, by graphs, where Transformers had them all at once.
            let decodes = decode(&mut gpu, &[tokens(150, 1)], &[100], 50).concat();
            let from = exact.len() / 150 * 100;
            let (ours, other) =
                (distance(&decodes, &exact[from..]), distance(&theirs[from..], &exact[from..]));
            println!("{shape}, {}: decodes {ours:.2e}, Transformers {other:.2e}", mode(&options));
            assert!(ours < 1.5 * other, "{shape}, {dtype}, decodes: {ours:.2e}, Transformers {other:.2e}");
        }
    }
}

#[test]
fn narrower_kv_memory_costs_little() {
    let text = tokens(150, 1);
    let logits = |dtype, kv_dtype| {
        let options = CudaExecutorOptions { dtype, kv_dtype, ..options(256) };
        let mut gpu = CudaExecutor::load(&source("smollm2-135m"), &options).unwrap();
        gpu.score(&text).unwrap().into_owned()
    };
    // A half is as near to bfloat16 as bfloat16 is to itself by another kernel; e4m3 rounds every key and value by up to
    // 2^-4.
    for (dtype, widest, other) in
        [(WeightDtype::Bf16, KvDtype::Bf16, KvDtype::F16), (WeightDtype::F16, KvDtype::F16, KvDtype::Bf16)]
    {
        let expected = logits(dtype, widest);
        for (kv_dtype, bound) in [(other, 3e-2), (KvDtype::Fp8, 1e-1)] {
            let error = distance(&logits(dtype, kv_dtype), &expected);
            let kv = kv_dtype.name();
            println!("{dtype} with KV of {kv}: relative difference {error:.2e}");
            assert!(error > 0.0 && error < bound, "{dtype}, {kv}: {error:.2e}");
        }
    }
}
