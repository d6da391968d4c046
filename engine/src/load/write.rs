//! Writes a dummy model as a Hugging Face folder: for measuring how real files load, and for other programs to read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use quire_kernels::quant;
use serde_json::{Value, json};

use super::hf_folder::tensor_name;
use crate::EngineError;
use crate::dummy::{DummyShape, DummyWeights};
use crate::model::architecture::{Facts, Windows};
use crate::model::{LayerWeight, ModelConfig, RopeScaling, WeightDtype, WeightRole, WeightSource};

/// Bytes after which a new file begins.
const SHARD_BYTES: u64 = 4 << 30;

/// The `config.json` of a model of the family, as Hugging Face Transformers reads it.
///
/// # Errors
/// [`EngineError::Config`] where it has no words for something.
pub fn config_to_json(config: &ModelConfig) -> Result<String, EngineError> {
    let Facts { class, name, windows, .. } = config.architecture.facts();
    if config.window.is_some() && windows != Windows::AllLayers {
        return Err(EngineError::Config(format!(
            "config.json has no words for windows in all layers of {name}"
        )));
    }
    let scaling = match &config.rope.scaling {
        RopeScaling::Default => json!(null),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": *original as u64,
        }),
        RopeScaling::Factors(_) => {
            return Err(EngineError::Config("config.json has no rotary factors of a GGUF file".into()));
        }
    };
    let text = json!({
        "architectures": [class], "model_type": name, "vocab_size": config.vocab, "hidden_size": config.hidden,
        "intermediate_size": config.ffn, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps, "rope_theta": config.rope.theta, "rope_scaling": scaling,
        "tie_word_embeddings": config.tied, "attention_bias": config.qkv_bias, "hidden_act": "silu",
        "sliding_window": config.window,
    });
    Ok(text.to_string())
}

/// A tensor to be written.
struct Tensor {
    role: WeightRole,
    shape: Vec<usize>,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        2 * self.shape.iter().map(|&n| n as u64).product::<u64>()
    }
}

/// All tensors of a model in the order in which they are written.
fn tensors(config: &ModelConfig) -> Vec<Tensor> {
    use LayerWeight as W;
    let (hidden, ffn, dim) = (config.hidden, config.ffn, config.head_dim);
    let (q, kv) = (config.heads * dim, config.kv_heads * dim);
    let tensor = |role, shape: &[usize]| Tensor { role, shape: shape.to_vec() };
    let mut all = vec![
        tensor(WeightRole::Embedding, &[config.vocab, hidden]),
        tensor(WeightRole::FinalNorm, &[hidden]),
    ];
    if !config.tied {
        all.push(tensor(WeightRole::OutputHead, &[config.vocab, hidden]));
    }
    for layer in 0..config.layers {
        let mut add = |weight, shape: &[usize]| all.push(tensor(WeightRole::Layer(layer, weight), shape));
        add(W::AttentionNorm, &[hidden]);
        add(W::Query, &[q, hidden]);
        add(W::Key, &[kv, hidden]);
        add(W::Value, &[kv, hidden]);
        add(W::Output, &[hidden, q]);
        add(W::FfnNorm, &[hidden]);
        add(W::Gate, &[ffn, hidden]);
        add(W::Up, &[ffn, hidden]);
        add(W::Down, &[hidden, ffn]);
        if config.qkv_bias {
            add(W::QueryBias, &[q]);
            add(W::KeyBias, &[kv]);
            add(W::ValueBias, &[kv]);
        }
        if config.output_bias {
            add(W::OutputBias, &[hidden]);
        }
        if config.qk_norm {
            add(W::QueryNorm, &[dim]);
            add(W::KeyNorm, &[dim]);
        }
    }
    all
}

/// Writes `config.json` and the weights of `shape` from `seed`, bfloat16, in safetensors files of up to 4 GiB.
/// `progress` hears the bytes written and their number.
///
/// # Errors
/// When `folder` holds a model already, or cannot be written.
pub fn write_dummy(
    shape: DummyShape,
    seed: u64,
    folder: &Path,
    threads: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), EngineError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |error| EngineError::Io { path: path.clone(), error }
    };
    let config = shape.config();
    if folder.join("config.json").exists() {
        let what = "there is a model here already: choose another folder".into();
        return Err(EngineError::Model { path: folder.to_owned(), what });
    }
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let shards = shards(tensors(&config));
    let total = shards.iter().flatten().map(Tensor::bytes).sum();
    let weights = DummyWeights::new(seed, WeightDtype::Bf16, threads);
    let (mut weight_map, mut written) = (BTreeMap::new(), 0);
    for (index, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        let path = folder.join(&name);
        let mut file = BufWriter::new(File::create(&path).map_err(io(&path))?);
        file.write_all(&header(shard)).map_err(io(&path))?;
        for tensor in shard {
            weight_map.insert(tensor_name(tensor.role), name.clone());
            let bytes = match *tensor.shape {
                [rows, cols] => weights.matrix(tensor.role, rows, cols)?.bytes.into_owned(),
                _ => quant::f32_to_bf16_bytes(&weights.vector(tensor.role, tensor.shape[0])?),
            };
            file.write_all(&bytes).map_err(io(&path))?;
            written += tensor.bytes();
            progress(written, total);
        }
        file.flush().map_err(io(&path))?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let path = folder.join("model.safetensors.index.json");
    std::fs::write(&path, index.to_string()).map_err(io(&path))?;
    // Last: a folder without it is no model, so an interrupted one cannot be taken for whole.
    let path = folder.join("config.json");
    std::fs::write(&path, config_to_json(&config)?).map_err(io(&path))
}

fn shards(tensors: Vec<Tensor>) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new()];
    let mut used = 0;
    for tensor in tensors {
        if used > 0 && used + tensor.bytes() > SHARD_BYTES {
            shards.push(Vec::new());
            used = 0;
        }
        used += tensor.bytes();
        shards.last_mut().expect("there is one").push(tensor);
    }
    shards
}

/// The beginning of a safetensors file: the header's length, then the header, padded to a multiple of 8.
fn header(tensors: &[Tensor]) -> Vec<u8> {
    let mut at = 0;
    let mut fields = serde_json::Map::new();
    for tensor in tensors {
        let end = at + tensor.bytes();
        let field = json!({ "dtype": "BF16", "shape": tensor.shape, "data_offsets": [at, end] });
        fields.insert(tensor_name(tensor.role), field);
        at = end;
    }
    let mut text = Value::Object(fields).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::HfFolder;

    #[test]
    fn what_is_written_is_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let folder = temp.path().join("model");
        let mut seen = (0, 0);
        write_dummy(DummyShape::Smollm2_135m, 3, &folder, 2, &mut |done, all| seen = (done, all)).unwrap();
        assert_eq!(seen.0, seen.1);
        assert!(write_dummy(DummyShape::Smollm2_135m, 3, &folder, 2, &mut |_, _| {}).is_err());
        let read = HfFolder::open(&folder).unwrap();
        let config = DummyShape::Smollm2_135m.config();
        assert_eq!(*read.config(), config);
        let made = DummyWeights::new(3, WeightDtype::Bf16, 2);
        for (role, rows, cols) in [
            (WeightRole::Embedding, config.vocab, config.hidden),
            (WeightRole::Layer(29, LayerWeight::Down), config.hidden, config.ffn),
        ] {
            assert!(
                read.matrix(role, rows, cols).unwrap().bytes == made.matrix(role, rows, cols).unwrap().bytes
            );
        }
        let norm = WeightRole::Layer(4, LayerWeight::FfnNorm);
        assert_eq!(read.vector(norm, 576).unwrap(), [1.0; 576]);
    }

    #[test]
    fn every_shape_is_written_whole() {
        for shape in DummyShape::ALL {
            let config = shape.config();
            let parameters: u64 = tensors(&config).iter().map(|t| t.bytes() / 2).sum();
            assert_eq!(parameters, config.parameters(), "{}", shape.name());
            let shards = shards(tensors(&config));
            assert!(shards.iter().all(|shard| !shard.is_empty()));
        }
    }
}
