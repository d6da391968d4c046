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

/// Families by what sets each apart, in steps: a prompt in two chunks and decodes after it, against the text in one piece. One
/// body for the CPU and, with `gpu-tests`, for a GPU, whose logits are held to the CPU's.
mod in_steps {
    use std::path::Path;

    use quire_engine::{
        CpuExecutorOptions, KvCapacity, KvLayout, KvPlacement, ModelExecutor, ScheduledBatch,
    };
    use serde_json::{Value, json};

    use super::super::random_model::{distance, exact_options, golden, load, write_folder};

    const LENGTH: u32 = 300;
    /// Of these, decoded one at a time.
    const DECODES: u32 = 40;
    const VOCAB: u32 = 512;
    const BLOCK_SIZE: u32 = 16;
    fn text() -> Vec<u32> {
        (0..LENGTH).map(|i| (i * i).wrapping_mul(2_654_435_761) >> 9).map(|x| x % VOCAB).collect()
    }

    struct Family {
        what: &'static str,
        config: Value,
        /// Keys of the configuration without what sets it apart.
        without: Vec<(&'static str, Value)>,
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

    /// Formats as in `options`, and room for the text.
    fn roomy(options: CpuExecutorOptions) -> CpuExecutorOptions {
        CpuExecutorOptions { kv: KvCapacity::Slots(512), max_batch_rows: LENGTH as usize, ..options }
    }

    /// A step of these tokens of the text, with the logits of all.
    fn step(range: std::ops::Range<u32>) -> ScheduledBatch {
        let mut batch = ScheduledBatch::new(KvPlacement::Paged {
            block_size: BLOCK_SIZE,
            tables: Vec::new(),
            table_start: Vec::new(),
        });
        if let KvPlacement::Paged { tables, table_start, .. } = &mut batch.kv {
            table_start.push(0);
            tables.extend(0..range.end.div_ceil(BLOCK_SIZE));
        }
        batch.tokens.extend(&text()[range.start as usize..range.end as usize]);
        batch.positions.extend(range.clone());
        batch.slots.extend(range.clone());
        batch.query_start.push(range.len() as u32);
        batch.context_len.push(range.end);
        batch.logit_rows.extend(0..range.len() as u32);
        batch
    }

    /// Logits of the whole text, its last tokens decoded.
    fn by_steps(executor: &mut dyn ModelExecutor) -> Vec<f32> {
        executor.prepare(KvLayout::Paged { block_size: BLOCK_SIZE }, &mut |_, _| {}).unwrap();
        let prompt = LENGTH - DECODES;
        // In two chunks, the second of which sees the first one's keys.
        let chunks = [0..prompt / 3, prompt / 3..prompt].into_iter();
        let mut logits = Vec::new();
        for range in chunks.chain((prompt..LENGTH).map(|at| at..at + 1)) {
            executor.forward(&step(range)).unwrap();
            logits.extend_from_slice(&executor.logits().unwrap());
        }
        logits
    }

    /// Checks a model's logits to within `bound`, and that they would be others `without` what sets it apart. `subject` opens the
    /// folder, and `reference` are the formats that the CPU scores the text in.
    fn check<E: ModelExecutor>(
        Family { what, config, without }: &Family,
        reference: &CpuExecutorOptions,
        subject: impl Fn(&Path) -> E,
        bound: f64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let score = || load(folder.path(), reference).score(&text()).unwrap().into_owned();
        write_folder(folder.path(), config, 1);
        let expected = score();
        let logits = by_steps(&mut subject(folder.path()));
        assert_eq!(logits.len(), expected.len());
        let decoded = ((LENGTH - DECODES) * VOCAB) as usize;
        for (stage, rows) in [("prefill", 0..decoded), ("decodes", decoded..expected.len())] {
            let error = distance(&logits[rows.clone()], &expected[rows]);
            println!("{what}, {stage}: relative error of the logits {error:.2e}");
            assert!(error < bound, "{what}, {stage}: {error:.2e}");
        }
        let mut other = config.clone();
        for (key, value) in without {
            other[*key] = value.clone();
        }
        write_folder(folder.path(), &other, 1);
        let difference = distance(&score()[decoded..], &expected[decoded..]);
        assert!(difference > 0.1, "{what} makes a difference of only {difference:.2e}");
    }

    fn families() -> [Family; 3] {
        // The same weights by name, and none of the biases.
        let llama = vec![("architectures", json!(["LlamaForCausalLM"])), ("model_type", json!("llama"))];
        [
            Family {
                what: "Llama 3's rotation",
                config: config("llama3", &[]),
                without: vec![("rope_scaling", Value::Null)],
            },
            Family {
                what: "a window of 48",
                config: config("mistral", &[("sliding_window", json!(48))]),
                without: vec![("sliding_window", Value::Null)],
            },
            Family { what: "Qwen2's biases", config: config("qwen2", &[]), without: llama },
        ]
    }

    #[test]
    fn families_in_steps_are_those_in_one_piece() {
        let options = roomy(exact_options());
        for family in families() {
            check(&family, &options, |folder| load(folder, &options), 1e-5);
        }
    }

    #[cfg(feature = "gpu-tests")]
    #[test]
    fn a_gpus_families_are_the_cpus() {
        use quire_engine::model::WeightDtype;
        use quire_engine::{CudaExecutor, CudaExecutorOptions, load::ModelSource};
        use quire_kernels::KvDtype;
        // A few roundings in each of a few layers, 2^-9 each in bfloat16; the CPU multiplies weights of float16 in single precision.
        let modes = [
            (WeightDtype::Bf16, KvDtype::Bf16, KvDtype::Bf16, 2e-2),
            (WeightDtype::F16, KvDtype::F16, KvDtype::F32, 3e-3),
        ];
        for (dtype, kv_dtype, cpu_kv, bound) in modes {
            let reference = roomy(CpuExecutorOptions { dtype, kv_dtype: cpu_kv, ..exact_options() });
            let options = CudaExecutorOptions {
                dtype,
                kv: KvCapacity::Slots(512),
                kv_dtype,
                max_batch_rows: LENGTH as usize,
                max_sequences: LENGTH as usize,
                ..CudaExecutorOptions::default()
            };
            let gpu = |folder: &Path| {
                let source = ModelSource::parse(folder.to_str().expect("a path of ASCII")).unwrap();
                CudaExecutor::load(&source, &options).expect("a GPU")
            };
            for family in families() {
                println!("{dtype}:");
                check(&family, &reference, gpu, bound);
            }
        }
    }
}
