//! Small models with generated weights, in a Hugging Face folder.

use std::collections::BTreeMap;
use std::path::Path;

use quire_engine::load::{ModelSource, config_from_json};
use quire_engine::model::{ModelConfig, WeightDtype};
use quire_engine::{CpuExecutor, CpuExecutorOptions, KvCapacity};
use quire_kernels::KvDtype;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

/// Tensors by Hugging Face name: shape and elements.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// A golden file of `tests/golden`.
pub(crate) fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).with_extension("json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Shapes of a model's tensors.
pub(crate) fn shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let (hidden, ffn) = (config.hidden, config.ffn);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut shapes = BTreeMap::new();
    shapes.insert("model.embed_tokens.weight".to_owned(), vec![config.vocab, hidden]);
    shapes.insert("model.norm.weight".to_owned(), vec![hidden]);
    if !config.tied {
        shapes.insert("lm_head.weight".to_owned(), vec![config.vocab, hidden]);
    }
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.insert(format!("model.layers.{layer}.{name}"), shape.to_vec());
        };
        add("input_layernorm.weight", &[hidden]);
        add("post_attention_layernorm.weight", &[hidden]);
        add("self_attn.q_proj.weight", &[q, hidden]);
        add("self_attn.k_proj.weight", &[kv, hidden]);
        add("self_attn.v_proj.weight", &[kv, hidden]);
        add("self_attn.o_proj.weight", &[hidden, q]);
        add("mlp.gate_proj.weight", &[ffn, hidden]);
        add("mlp.up_proj.weight", &[ffn, hidden]);
        add("mlp.down_proj.weight", &[hidden, ffn]);
        if config.qkv_bias {
            add("self_attn.q_proj.bias", &[q]);
            add("self_attn.k_proj.bias", &[kv]);
            add("self_attn.v_proj.bias", &[kv]);
        }
        if config.output_bias {
            add("self_attn.o_proj.bias", &[hidden]);
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[config.head_dim]);
            add("self_attn.k_norm.weight", &[config.head_dim]);
        }
    }
    shapes
}

/// The weights that `scripts/golden_logits.py` computes: SplitMix64 of the name's FNV-1a hash and the index.
pub(crate) fn tensors(config: &ModelConfig) -> Tensors {
    shapes(config)
        .into_iter()
        .map(|(name, shape)| (name.clone(), (shape.clone(), values(&name, &shape))))
        .collect()
}

fn values(name: &str, shape: &[usize]) -> Vec<f32> {
    let key = name.bytes().fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let unit = |index: u64| {
        let mut x = key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^= x >> 31;
        (x >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let count = shape.iter().product::<usize>() as u64;
    let units = (1..=count).map(unit);
    match shape {
        _ if name.contains("norm") => units.map(|u| 1.0 + 0.25 * u).collect(),
        [_] => units.map(|u| 0.5 * u).collect(),
        _ => {
            let scale = (3.0 / shape[1] as f64).sqrt() as f32;
            units.map(|u| scale * u).collect()
        }
    }
}

/// Writes a folder with this configuration and its generated weights, in `shards` files.
pub(crate) fn write_folder(folder: &Path, config: &Value, shards: usize) {
    let text = config.to_string();
    std::fs::write(folder.join("config.json"), &text).unwrap();
    let tensors = tensors(&config_from_json(text.as_bytes()).unwrap());
    if shards == 1 {
        return write_safetensors(&folder.join("model.safetensors"), tensors);
    }
    let mut parts = vec![Tensors::new(); shards];
    let mut weight_map = serde_json::Map::new();
    for (index, (name, tensor)) in tensors.into_iter().enumerate() {
        weight_map.insert(name.clone(), shard_name(index % shards).into());
        parts[index % shards].insert(name, tensor);
    }
    for (shard, part) in parts.into_iter().enumerate() {
        write_safetensors(&folder.join(shard_name(shard)), part);
    }
    let index = serde_json::json!({ "weight_map": weight_map });
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn shard_name(shard: usize) -> String {
    format!("model-{shard}.safetensors")
}

fn write_safetensors(path: &Path, tensors: Tensors) {
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Options that keep float32 throughout.
pub(crate) fn exact_options() -> CpuExecutorOptions {
    CpuExecutorOptions {
        dtype: WeightDtype::F32,
        kv: KvCapacity::Slots(256),
        kv_dtype: KvDtype::F32,
        max_batch_rows: 64,
        threads: std::num::NonZeroUsize::new(2),
        ..CpuExecutorOptions::default()
    }
}

/// An executor over a folder or file.
pub(crate) fn load(path: &Path, options: &CpuExecutorOptions) -> CpuExecutor {
    CpuExecutor::load(&ModelSource::parse(path.to_str().unwrap()).unwrap(), options).unwrap()
}

/// `||a - b|| / ||b||`.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(x, y)| f64::from(*x) - f64::from(*y)));
    difference / norm(&mut b.iter().map(|y| f64::from(*y)))
}
