//! Logits against candle-transformers, computed beside ours from the same files.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3};
use quire_engine::ModelExecutor;
use serde_json::{Value, json};

use crate::random_model::{distance, exact_options, golden, load, write_folder};

const TOKENS: [u32; 37] = [
    3, 77, 12, 12, 95, 0, 41, 8, 63, 30, 2, 19, 88, 54, 7, 23, 70, 70, 1, 36, 90, 11, 45, 45, 6, 81, 29, 33,
    64, 5, 17, 92, 4, 58, 10, 76, 22,
];

/// The logits after the last of `tokens`.
type Reference = Box<dyn FnMut(&[u32]) -> Vec<f32>>;

/// The model in `folder` as candle runs it.
fn candle(folder: &Path, config: &Value) -> Reference {
    let file = folder.join("model.safetensors");
    // SAFETY: the file is ours, written just now and not changed while it is mapped.
    let vars = unsafe { VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu) }.unwrap();
    let text = config.to_string();
    let input = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let output = |logits: Tensor| logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    match config["model_type"].as_str().unwrap() {
        "llama" => {
            let config: llama::LlamaConfig = serde_json::from_str(&text).unwrap();
            let config = config.into_config(false);
            let model = llama::Llama::load(vars, &config).unwrap();
            Box::new(move |tokens| {
                let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
                output(model.forward(&input(tokens), 0, &mut cache).unwrap())
            })
        }
        "qwen2" => {
            let mut model =
                qwen2::ModelForCausalLM::new(&serde_json::from_str(&text).unwrap(), vars).unwrap();
            Box::new(move |tokens| {
                model.clear_kv_cache();
                output(model.forward(&input(tokens), 0).unwrap())
            })
        }
        "qwen3" => {
            let mut model =
                qwen3::ModelForCausalLM::new(&serde_json::from_str(&text).unwrap(), vars).unwrap();
            Box::new(move |tokens| {
                model.clear_kv_cache();
                output(model.forward(&input(tokens), 0).unwrap())
            })
        }
        other => panic!("no reference for {other}"),
    }
}

fn compare(name: &str, config: &Value) {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), config, 1);
    let mut reference = candle(folder.path(), config);
    let mut executor = load(folder.path(), &exact_options());
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let ours = executor.score(&TOKENS).unwrap().into_owned();
    for length in [1, 2, 16, 37] {
        let expected = reference(&TOKENS[..length]);
        let error = distance(&ours[(length - 1) * vocab..length * vocab], &expected);
        println!("{name}, {length} tokens: {error:.2e}");
        assert!(error < 1e-4, "{name}, {length} tokens: {error:.2e}");
    }
}

#[test]
fn llama_with_and_without_scaling_tied_and_untied() {
    let mut config = golden("llama3")["config"].clone();
    compare("llama3 scaling, untied", &config);
    config["rope_scaling"] = Value::Null;
    config["tie_word_embeddings"] = json!(true);
    config["num_key_value_heads"] = json!(1);
    compare("no scaling, tied, one key/value head", &config);
    config["num_key_value_heads"] = json!(4);
    compare("as many key/value heads as heads", &config);
}

#[test]
fn qwen2_with_biases() {
    compare("qwen2", &golden("qwen2")["config"]);
}

#[test]
fn qwen3_with_head_norms_and_wide_heads() {
    let mut config = golden("qwen3")["config"].clone();
    config["sliding_window"] = Value::Null;
    config["max_window_layers"] = json!(2);
    compare("qwen3", &config);
}
