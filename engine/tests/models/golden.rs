//! Logits against those of Hugging Face Transformers, kept in `tests/golden`.

use quire_engine::model::WeightDtype;
use quire_engine::{CpuExecutorOptions, ModelExecutor};
use quire_kernels::KvDtype;
use quire_kernels::cpu::Isa;
use serde_json::{Value, json};

use crate::random_model::{distance, exact_options, golden, load, write_folder};

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// The distance of our logits from the golden ones, over all positions.
fn distance_from_golden(name: &str, shards: usize, options: &CpuExecutorOptions) -> f64 {
    let golden = golden(name);
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden["config"], shards);
    let mut executor = load(folder.path(), options);
    let tokens: Vec<u32> = numbers(&golden["tokens"]).iter().map(|&t| t as u32).collect();
    let expected: Vec<f32> = golden["logits"].as_array().unwrap().iter().flat_map(numbers).collect();
    distance(&executor.score(&tokens).unwrap(), &expected)
}

#[test]
fn float32_agrees_to_rounding() {
    for (name, shards) in [("llama3", 1), ("linear", 3), ("mistral", 1), ("qwen2", 2), ("qwen3", 1)] {
        for isa in Isa::available() {
            let options = CpuExecutorOptions { isa: Some(isa), ..exact_options() };
            let error = distance_from_golden(name, shards, &options);
            println!("{name}, {}: {error:.2e}", isa.name());
            assert!(error < 1e-5, "{name}, {}: {error:.2e}", isa.name());
        }
    }
}

#[test]
fn sixteen_and_eight_bits_stay_close() {
    for name in ["llama3", "linear", "mistral", "qwen2", "qwen3"] {
        for (dtype, limit) in [
            (WeightDtype::F16, 1e-2),
            (WeightDtype::Bf16, 2e-2),
            (WeightDtype::Q8_0, 4e-2),
            (WeightDtype::Q4_1, 0.35),
        ] {
            let options = CpuExecutorOptions { dtype, kv_dtype: KvDtype::Bf16, ..exact_options() };
            let error = distance_from_golden(name, 1, &options);
            println!("{name} {dtype}: {error:.2e}");
            assert!(error < limit, "{name} {dtype}: {error:.2e}");
        }
    }
}

#[test]
fn wrong_constants_would_show() {
    // The test can fail: another scaling of the rotation, or another epsilon, is far outside the tolerance.
    for (name, pointer, value) in [
        ("llama3", "/rope_scaling/factor", json!(4.0)),
        ("llama3", "/rms_norm_eps", json!(1e-2)),
        ("llama3", "/rope_theta", json!(20_000.0)),
        ("mistral", "/sliding_window", json!(8)),
        ("mistral", "/sliding_window", json!(null)),
    ] {
        let golden = golden(name);
        let mut config = golden["config"].clone();
        *config.pointer_mut(pointer).unwrap() = value;
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &config, 1);
        let tokens: Vec<u32> = numbers(&golden["tokens"]).iter().map(|&t| t as u32).collect();
        let expected: Vec<f32> = golden["logits"].as_array().unwrap().iter().flat_map(numbers).collect();
        let mut executor = load(folder.path(), &exact_options());
        let error = distance(&executor.score(&tokens).unwrap(), &expected);
        assert!(error > 1e-3, "{pointer}: {error:.2e}");
    }
}
