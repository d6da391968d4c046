//! A model over several ranks computes what it does on one; `mechanisms` has them under every mechanism.

use candle_core::quantized::GgmlDType;
use quire_engine::load::{ModelSource, config_from_json};
use quire_engine::model::WeightDtype;
use quire_engine::{CpuExecutorOptions, DeviceName, Executor, ModelExecutor, TensorParallel};
use quire_kernels::cpu::Isa;

use crate::gguf;
use crate::random_model::{distance, exact_options, golden, load, tensors, write_folder};

fn ranks(folder: &tempfile::TempDir, options: &CpuExecutorOptions, ranks: usize) -> TensorParallel {
    let source = ModelSource::parse(folder.path().to_str().unwrap()).unwrap();
    TensorParallel::load_cpu(&source, options, ranks, &mut |_, _| {}).unwrap()
}

fn folder(of: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden(of)["config"], 1);
    folder
}

/// Biases of Q, K and V, of the output, norms of heads: each family has something else that is divided.
#[test]
fn logits_are_those_of_one_rank() {
    for name in ["llama3", "linear", "mistral", "qwen2", "qwen3"] {
        let folder = folder(name);
        let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % 96).collect();
        for dtype in [WeightDtype::F32, WeightDtype::Bf16, WeightDtype::F16] {
            let options = CpuExecutorOptions { dtype, ..exact_options() };
            let mut one = load(folder.path(), &options);
            let expected = one.score(&tokens).unwrap().into_owned();
            let mut two = ranks(&folder, &options, 2);
            let error = distance(&two.score(&tokens).unwrap(), &expected);
            // AVX-512 multiplies bfloat16 by activations that are rounded to it: a sum in another order, off by a last bit, may be
            // rounded the other way, by one part in 256 of one element.
            let rounded = dtype == WeightDtype::Bf16 && Isa::Avx512.is_available();
            assert!(error < if rounded { 2e-3 } else { 1e-5 }, "{name} {dtype}: {error:.2e}");
            assert_eq!(two.kv_slots(), one.kv_slots());
            assert_eq!(two.info().kv_bytes, one.info().kv_bytes, "together as much as one has");
            assert_eq!(two.info().config, one.info().config);
            // Norms and the embedding are on each.
            assert!(two.info().weight_bytes > one.info().weight_bytes, "{name}");
            assert!(two.info().weight_bytes < 2 * one.info().weight_bytes, "{name}");
            let DeviceName::Cpu { threads, .. } = two.info().device else { panic!("a CPU") };
            assert_eq!(threads, 2);
        }
    }
}

/// Of a GGUF file Q and K are rearranged before they are divided, and blocks of 32 columns stay whole.
#[test]
fn a_file_of_blocks_is_divided_between_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut json = golden("linear")["config"].clone();
    json["rope_scaling"] = serde_json::Value::Null;
    json["intermediate_size"] = 128.into();
    let config = config_from_json(json.to_string().as_bytes()).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % 96).collect();
    for dtype in [GgmlDType::F32, GgmlDType::Q8_0] {
        let path = folder.path().join(format!("{dtype:?}.gguf"));
        gguf::write(&path, &gguf::metadata(&config), &gguf::gguf_tensors(&config, tensors(&config), dtype));
        // Blocks are multiplied in 8 bits, and a part's activations are rounded by scales of its own.
        for (kept, bound) in [(WeightDtype::F32, 1e-5), (WeightDtype::Keep, 1e-2)] {
            let options = CpuExecutorOptions { dtype: kept, ..exact_options() };
            let expected = load(&path, &options).score(&tokens).unwrap().into_owned();
            let source = ModelSource::parse(path.to_str().unwrap()).unwrap();
            let mut two = TensorParallel::load_cpu(&source, &options, 2, &mut |_, _| {}).unwrap();
            let error = distance(&two.score(&tokens).unwrap(), &expected);
            assert!(error < bound, "{dtype:?} as {kept}: {error:.2e}");
        }
    }
}

#[test]
fn what_cannot_be_divided_is_said() {
    let error = |model: &str, ranks: usize| {
        let source = ModelSource::parse(model).unwrap();
        TensorParallel::load_cpu(&source, &exact_options(), ranks, &mut |_, _| {}).unwrap_err().to_string()
    };
    assert!(error("dummy:smollm2-135m", 2).contains("9 heads"));
    assert!(error("dummy:smollm2-135m", 0).contains("choose 1 to"));
    assert!(error("dummy:smollm2-135m", 1000).contains("choose 1 to"));
    // Found in every rank: told once, and nobody waits.
    let folder = folder("qwen2");
    std::fs::write(folder.path().join("model.safetensors"), b"nothing").unwrap();
    assert!(error(folder.path().to_str().unwrap(), 2).contains("model.safetensors"));
}
