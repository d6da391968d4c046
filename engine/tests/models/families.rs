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

/// Families on a GPU, each with what sets it apart: prefills and decodes against the CPU's in the same formats.
#[cfg(feature = "gpu-tests")]
mod on_a_gpu {
    use std::path::Path;

    use quire_engine::load::ModelSource;
    use quire_engine::model::WeightDtype;
    use quire_engine::{
        CpuExecutorOptions, CudaExecutor, CudaExecutorOptions, Executor, KvCapacity, KvLayout, KvPlacement,
        ModelExecutor, ScheduledBatch,
    };
    use quire_kernels::KvDtype;
    use serde_json::{Value, json};

    use super::super::random_model::{distance, exact_options, golden, load, write_folder};

    const LENGTH: u32 = 300;
    /// Of these, decoded one at a time.
    const DECODES: u32 = 40;
    const VOCAB: u32 = 512;
    const BLOCK_SIZE: u32 = 16;
    /// What the logits may be off by: a few roundings to bfloat16, 2^-9 each, in each of a few layers.
    const BOUND: f64 = 2e-2;

    fn text() -> Vec<u32> {
        (0..LENGTH).map(|i| (i * i).wrapping_mul(2_654_435_761) >> 9).map(|x| x % VOCAB).collect()
    }

    /// A golden model's configuration with heads of 64, and these keys.
    fn config(name: &str, keys: &[(&str, Value)]) -> Value {
        let mut config = golden(name)["config"].clone();
        let wide = [
            ("hidden_size", json!(256)),
            ("head_dim", json!(64)),
            ("intermediate_size", json!(512)),
            ("vocab_size", json!(VOCAB)),
        ];
        for (key, value) in wide.iter().chain(keys) {
            config[*key] = value.clone();
        }
        config
    }

    fn cpu_logits(folder: &Path) -> Vec<f32> {
        let options = CpuExecutorOptions {
            dtype: WeightDtype::Bf16,
            kv: KvCapacity::Slots(LENGTH as usize),
            kv_dtype: KvDtype::Bf16,
            max_batch_rows: LENGTH as usize,
            ..exact_options()
        };
        load(folder, &options).score(&text()).unwrap().into_owned()
    }

    /// A step of these tokens of the text, with the logits of all.
    fn step(range: std::ops::Range<u32>) -> ScheduledBatch {
        let mut batch = ScheduledBatch::new(KvPlacement::Paged {
            block_size: BLOCK_SIZE,
            tables: (0..range.end.div_ceil(BLOCK_SIZE)).collect(),
            table_start: vec![0],
        });
        batch.tokens.extend(&text()[range.start as usize..range.end as usize]);
        batch.positions.extend(range.clone());
        batch.slots.extend(range.clone());
        batch.query_start.push(range.len() as u32);
        batch.context_len.push(range.end);
        batch.logit_rows.extend(0..range.len() as u32);
        batch
    }

    /// Logits of the whole text, its last tokens decoded by graphs.
    fn gpu_logits(folder: &Path) -> Vec<f32> {
        let options = CudaExecutorOptions {
            kv: KvCapacity::Slots(512),
            max_batch_rows: LENGTH as usize,
            max_sequences: LENGTH as usize,
            ..CudaExecutorOptions::default()
        };
        let source = ModelSource::parse(folder.to_str().expect("a path of ASCII")).unwrap();
        let mut gpu = CudaExecutor::load(&source, &options).unwrap();
        gpu.prepare(KvLayout::Paged { block_size: BLOCK_SIZE }, &mut |_, _| {}).unwrap();
        let prompt = LENGTH - DECODES;
        // In two chunks, the second of which sees the first one's keys.
        let steps =
            [0..prompt / 3, prompt / 3..prompt].into_iter().chain((prompt..LENGTH).map(|at| at..at + 1));
        let mut logits = Vec::new();
        for range in steps {
            gpu.forward(&step(range)).unwrap();
            logits.extend_from_slice(&gpu.logits().unwrap());
        }
        logits
    }

    /// Checks a model's logits, and that they would be others `without` what sets it apart.
    fn check(what: &str, config: &Value, without: &[(&str, Value)]) {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), config, 1);
        let expected = cpu_logits(folder.path());
        let (prompt, vocab) = ((LENGTH - DECODES) as usize, VOCAB as usize);
        let logits = gpu_logits(folder.path());
        for (stage, rows) in [("prefill", 0..prompt * vocab), ("decodes", prompt * vocab..expected.len())] {
            let error = distance(&logits[rows.clone()], &expected[rows]);
            println!("{what}, {stage}: relative error of the logits {error:.2e}");
            assert!(error < BOUND, "{what}, {stage}: {error:.2e}");
        }
        let mut other = config.clone();
        for (key, value) in without {
            other[*key] = value.clone();
        }
        write_folder(folder.path(), &other, 1);
        let decoded = prompt * vocab..;
        let difference = distance(&cpu_logits(folder.path())[decoded.clone()], &expected[decoded]);
        assert!(difference > 3.0 * BOUND, "{what} makes a difference of only {difference:.2e}");
    }

    #[test]
    fn a_gpus_rotation_is_scaled_as_llama_3s_is() {
        check("Llama 3's scaling", &config("llama3", &[]), &[("rope_scaling", Value::Null)]);
    }

    #[test]
    fn a_gpus_windows_are_mistrals() {
        let windowed = config("mistral", &[("sliding_window", json!(48))]);
        check("a window of 48", &windowed, &[("sliding_window", Value::Null)]);
    }

    #[test]
    fn a_gpus_biases_are_qwen2s() {
        // The same weights by name, and none of the biases.
        let llama = [("architectures", json!(["LlamaForCausalLM"])), ("model_type", json!("llama"))];
        check("Qwen2's biases", &config("qwen2", &[]), &llama);
    }
}
