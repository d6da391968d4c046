//! The naive model against a plain f64 forward written here, and against itself: batched, padded, cached.

mod tiny;

use candle_core::{Device, Tensor};
use quire_baselines::BaselineError;
use quire_baselines::naive::{KvCache, NaiveModel, RopeScaling, StaticBatch};
use tiny::{TinyModel, llama, prompts};

fn relative_error(actual: &[f32], expected: &[f64]) -> f64 {
    let difference: f64 = actual.iter().zip(expected).map(|(a, e)| (f64::from(*a) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    (difference / norm).sqrt()
}

fn logits(model: &NaiveModel, rows: &[u32], padding: &[usize], cache: &mut KvCache) -> Vec<f32> {
    let shape = (padding.len(), rows.len() / padding.len());
    let ids = Tensor::from_slice(rows, shape, &Device::Cpu).unwrap();
    model.forward(&ids, padding, cache).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn generate(model: &NaiveModel, prompts: &[Vec<u32>], tokens: usize) -> Vec<Vec<u32>> {
    let mut batch = StaticBatch::new(model, prompts);
    let mut outputs = vec![Vec::new(); prompts.len()];
    for _ in 0..tokens {
        for (output, token) in outputs.iter_mut().zip(batch.step().unwrap().tokens) {
            output.push(token);
        }
    }
    outputs
}

/// Every family and switch: Llama, its rope scalings, untied, Qwen2's biases, Qwen3's norms.
fn families() -> Vec<TinyModel> {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 32.0,
    };
    [
        llama(),
        tiny::Config { rope_scaling: Some(llama3), ..llama() },
        tiny::Config { rope_scaling: Some(RopeScaling::Linear { factor: 4.0 }), ..llama() },
        tiny::Config { tie_word_embeddings: false, num_kv_heads: 4, ..llama() },
        tiny::Config { attention_bias: true, ..llama() },
        tiny::Config { attention_output_bias: true, ..llama() },
        tiny::Config { qk_norm: true, head_dim: 12, ..llama() },
    ]
    .into_iter()
    .enumerate()
    .map(|(seed, config)| TinyModel::random(config, seed as u64))
    .collect()
}

#[test]
fn logits_match_a_plain_f64_forward() {
    for tiny in families() {
        let model = tiny.model();
        for prompt in prompts(&[1, 2, 7, 33], tiny.config.vocab_size, 5) {
            let actual = logits(&model, &prompt, &[0], &mut KvCache::default());
            let error = relative_error(&actual, &tiny.forward_f64(&prompt));
            assert!(error < 1e-5, "{error} for {} tokens of {:?}", prompt.len(), tiny.config);
        }
    }
}

#[test]
fn padding_changes_no_logit_beyond_rounding() {
    for tiny in families() {
        let model = tiny.model();
        let prompt = &prompts(&[9], tiny.config.vocab_size, 6)[0];
        let expected = tiny.forward_f64(prompt);
        // The second row is all padding but one token; whatever stands in the padding is not seen.
        let mut rows = vec![3; 5];
        rows.extend_from_slice(prompt);
        rows.extend(vec![4; 13]);
        rows.push(prompt[0]);
        let actual = logits(&model, &rows, &[5, 13], &mut KvCache::default());
        let vocab = tiny.config.vocab_size;
        assert!(relative_error(&actual[..vocab], &expected) < 1e-5);
        assert!(relative_error(&actual[vocab..], &tiny.forward_f64(&prompt[..1])) < 1e-5);
    }
}

#[test]
fn a_padded_batch_gives_the_tokens_of_each_sequence_alone() {
    for tiny in families() {
        let model = tiny.model();
        let prompts = prompts(&[3, 17, 1, 8], tiny.config.vocab_size, 7);
        let together = generate(&model, &prompts, 12);
        for (prompt, output) in prompts.iter().zip(&together) {
            assert_eq!(&generate(&model, std::slice::from_ref(prompt), 12)[0], output, "{:?}", tiny.config);
        }
    }
}

#[test]
fn cached_decoding_equals_full_recomputation() {
    for tiny in families() {
        let model = tiny.model();
        let prompt = prompts(&[6], tiny.config.vocab_size, 8).remove(0);
        let output = generate(&model, std::slice::from_ref(&prompt), 10).remove(0);
        let mut known = prompt;
        for token in output {
            let logits = tiny.forward_f64(&known);
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            assert_eq!(best as u32, token, "after {} tokens of {:?}", known.len(), tiny.config);
            known.push(token);
        }
    }
}

#[test]
fn a_weight_of_the_wrong_size_is_named() {
    let tiny = TinyModel::random(llama(), 1);
    let broken = |name: &str| {
        let mut data = tiny.weights[name].clone();
        if name == "model.layers.1.mlp.up_proj.weight" {
            data.pop();
        }
        data
    };
    match NaiveModel::from_tensors(tiny.config.clone(), broken) {
        Err(BaselineError::Weight { name, reason }) => {
            assert_eq!(name, "model.layers.1.mlp.up_proj.weight");
            assert!(reason.contains("[24, 16]") || reason.contains("numbers"), "{reason}");
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn a_hugging_face_folder_gives_the_same_model() {
    let tiny = TinyModel::random(tiny::Config { tie_word_embeddings: false, ..llama() }, 2);
    let prompt = &prompts(&[5], tiny.config.vocab_size, 9)[0];
    let expected = logits(&tiny.model(), prompt, &[0], &mut KvCache::default());
    for shards in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        tiny.write_hf_folder(folder.path(), shards);
        let model = NaiveModel::from_hf_folder(folder.path()).unwrap();
        assert_eq!(model.config(), &tiny.config);
        assert_eq!(logits(&model, prompt, &[0], &mut KvCache::default()), expected);
    }
}

#[test]
fn a_broken_folder_is_an_error_that_names_the_file() {
    let tiny = TinyModel::random(llama(), 2);
    let folder = tempfile::tempdir().unwrap();
    let error = |folder: &std::path::Path| NaiveModel::from_hf_folder(folder).err().unwrap().to_string();
    assert!(error(folder.path()).contains("config.json"));
    tiny.write_hf_folder(folder.path(), 1);
    std::fs::write(folder.path().join("model.safetensors"), b"\xff\xff\xff\xff\xff\xff\xff\xff{}").unwrap();
    assert!(!error(folder.path()).is_empty());
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(error(folder.path()).contains("model.safetensors"));
    let outside = r#"{"weight_map": {"a": "../elsewhere.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), outside).unwrap();
    assert!(error(folder.path()).contains("elsewhere"));
}
