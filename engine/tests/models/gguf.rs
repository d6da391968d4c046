//! GGUF files, written by candle: every format is read as candle reads it, and a model in GGUF is the model in its
//! Hugging Face folder.

use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use quire_engine::ModelExecutor;
use quire_engine::load::{GgufHeader, ModelSource, config_from_json};
use quire_engine::model::{Architecture, ModelConfig};
use quire_kernels::quant;

use crate::random_model::{Tensors, distance, exact_options, golden, load, tensors, write_folder};

/// Metadata of a model, as candle writes it.
pub(crate) fn metadata(config: &ModelConfig) -> Vec<(String, Value)> {
    let name = config.architecture.name();
    let key = |key: &str| format!("{name}.{key}");
    let number = |n: usize| Value::U32(n as u32);
    vec![
        ("general.architecture".into(), Value::String(name.into())),
        (key("block_count"), number(config.layers)),
        (key("context_length"), number(config.max_positions)),
        (key("embedding_length"), number(config.hidden)),
        (key("feed_forward_length"), number(config.ffn)),
        (key("attention.head_count"), number(config.heads)),
        (key("attention.head_count_kv"), number(config.kv_heads)),
        (key("attention.key_length"), number(config.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Value::F32(config.rms_eps)),
        (key("rope.freq_base"), Value::F32(config.rope.theta)),
    ]
}

/// Writes a GGUF file.
pub(crate) fn write(path: &Path, metadata: &[(String, Value)], tensors: &[(String, QTensor)]) {
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

/// The tensors of a model under their GGUF names, matrices as `dtype`; those of Llama have the rows of each head of Q
/// and K interleaved, as converters leave them.
pub(crate) fn gguf_tensors(
    config: &ModelConfig,
    tensors: Tensors,
    dtype: GgmlDType,
) -> Vec<(String, QTensor)> {
    let interleaved = config.architecture == Architecture::Llama;
    let renamed = tensors.into_iter().map(|(name, (shape, values))| {
        let heads = if name.contains("q_proj") { config.heads } else { config.kv_heads };
        let mut tensor = Tensor::from_vec(values, shape.clone(), &Device::Cpu).unwrap();
        if interleaved && (name.contains("q_proj") || name.contains("k_proj")) {
            let width = shape.get(1).copied().unwrap_or(1);
            let split = tensor.reshape((heads, 2, config.head_dim / 2, width)).unwrap();
            tensor = split.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape.clone()).unwrap();
        }
        let dtype = if shape.len() == 2 { dtype } else { GgmlDType::F32 };
        (gguf_name(&name), QTensor::quantize(&tensor, dtype).unwrap())
    });
    renamed.collect()
}

fn gguf_name(name: &str) -> String {
    let pairs = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    pairs.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

#[test]
fn a_model_in_gguf_is_the_model_in_its_folder() {
    let tokens: Vec<u32> = (0..24).map(|i| i * 37 % 96).collect();
    for name in ["linear", "qwen2", "qwen3"] {
        let mut json = golden(name)["config"].clone();
        json["rope_scaling"] = serde_json::Value::Null;
        let config = config_from_json(json.to_string().as_bytes()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &json, 1);
        let expected = load(folder.path(), &exact_options()).score(&tokens).unwrap().into_owned();
        for (dtype, limit) in [(GgmlDType::F32, 1e-6), (GgmlDType::F16, 2e-3), (GgmlDType::Q8_0, 4e-2)] {
            let path = folder.path().join(format!("{dtype:?}.gguf"));
            write(&path, &metadata(&config), &gguf_tensors(&config, tensors(&config), dtype));
            let mut executor = load(&path, &exact_options());
            assert_eq!(executor.info().config, config);
            let error = distance(&executor.score(&tokens).unwrap(), &expected);
            println!("{name} {dtype:?}: {error:.2e}");
            assert!(error < limit, "{name} {dtype:?}: {error:.2e}");
        }
    }
}

#[test]
fn rope_factors_scale_as_llama3_does() {
    let json = golden("llama3")["config"].clone();
    let config = config_from_json(json.to_string().as_bytes()).unwrap();
    let plain = quire_engine::model::Rope {
        scaling: quire_engine::model::RopeScaling::Default,
        ..config.rope.clone()
    };
    let ratio = plain.inverse_frequencies(config.head_dim);
    let factors: Vec<f32> =
        ratio.iter().zip(config.rope.inverse_frequencies(config.head_dim)).map(|(p, s)| p / s).collect();
    let mut files = gguf_tensors(&config, tensors(&config), GgmlDType::F32);
    let factors = Tensor::new(factors, &Device::Cpu).unwrap();
    files.push(("rope_freqs.weight".into(), QTensor::quantize(&factors, GgmlDType::F32).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &json, 1);
    let path = folder.path().join("model.gguf");
    write(&path, &metadata(&config), &files);
    let tokens = [5, 60, 11, 2, 90, 33, 33, 8];
    let expected = load(folder.path(), &exact_options()).score(&tokens).unwrap().into_owned();
    let error = distance(&load(&path, &exact_options()).score(&tokens).unwrap(), &expected);
    assert!(error < 1e-5, "{error:.2e}");
}

#[test]
fn every_format_is_read_as_candle_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("formats.gguf");
    let dtypes = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q8_0,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q4K,
        GgmlDType::Q6K,
    ];
    let values: Vec<f32> = (0..3 * 512).map(|i| ((i * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.1).collect();
    let tensor = Tensor::from_vec(values, (3, 512), &Device::Cpu).unwrap();
    let quantized: Vec<_> =
        dtypes.iter().map(|&d| (format!("{d:?}"), QTensor::quantize(&tensor, d).unwrap())).collect();
    write(&path, &[], &quantized);
    let bytes = std::fs::read(&path).unwrap();
    let header = GgufHeader::parse(&bytes, &path).unwrap();
    for (name, theirs) in &quantized {
        let ours = &header.tensors[name];
        assert_eq!((ours.rows, ours.cols), (3, 512));
        let mut values = vec![0.0; 3 * 512];
        quant::dequantize(ours.format, &bytes[ours.bytes.clone()], &mut values).unwrap();
        let expected =
            theirs.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(distance(&values, &expected) < 1e-6, "{name}: {:.2e}", distance(&values, &expected));
    }
}

#[test]
fn the_rotations_factor_is_read_as_llama_cpp_reads_it() {
    use quire_engine::model::RopeScaling::{Default, Linear};
    let folder = tempfile::tempdir().unwrap();
    let mut json = golden("qwen2")["config"].clone();
    json["rope_scaling"] = serde_json::Value::Null;
    let config = config_from_json(json.to_string().as_bytes()).unwrap();
    let files = gguf_tensors(&config, tensors(&config), GgmlDType::F32);
    let path = folder.path().join("model.gguf");
    let kind = |name: &str| ("type", Value::String(name.into()));
    let (newer, older) = (("factor", Value::F32(4.0)), ("scale_linear", Value::F32(2.0)));
    for (stated, scaling) in [
        (vec![], Default),
        (vec![newer.clone()], Linear { factor: 4.0 }),
        (vec![older.clone()], Linear { factor: 2.0 }),
        (vec![kind("linear"), newer.clone(), older.clone()], Linear { factor: 4.0 }),
        (vec![kind("none"), newer], Default),
        (vec![kind("linear"), ("factor", Value::F32(0.0)), older], Default),
        (vec![kind("linear")], Default),
    ] {
        let mut keys = metadata(&config);
        for (name, value) in &stated {
            let key = if *name == "scale_linear" { "scale_linear".into() } else { format!("scaling.{name}") };
            keys.push((format!("qwen2.rope.{key}"), value.clone()));
        }
        write(&path, &keys, &files);
        let stated: Vec<&str> = stated.iter().map(|(name, _)| *name).collect();
        assert_eq!(load(&path, &exact_options()).info().config.rope.scaling, scaling, "{stated:?}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let json = golden("qwen2")["config"].clone();
    let config = config_from_json(json.to_string().as_bytes()).unwrap();
    let path = folder.path().join("model.gguf");
    let open = |metadata: &[(String, Value)], tensors: &[(String, QTensor)]| {
        write(&path, metadata, tensors);
        let source = ModelSource::parse(path.to_str().unwrap()).unwrap();
        quire_engine::CpuExecutor::load(&source, &exact_options()).unwrap_err().to_string()
    };
    let mut keys = metadata(&config);
    keys[0].1 = Value::String("mamba".into());
    assert!(open(&keys, &[]).contains("architecture 'mamba' is not supported"));
    let mut keys = metadata(&config);
    keys.push(("qwen2.expert_count".into(), Value::U32(8)));
    assert!(open(&keys, &[]).contains("mixture-of-experts"));
    let mut keys = metadata(&config);
    keys.push(("qwen2.rope.scaling.type".into(), Value::String("yarn".into())));
    let files = gguf_tensors(&config, tensors(&config), GgmlDType::F32);
    assert!(open(&keys, &files).contains("rope scaling 'yarn'"));
    let keys = metadata(&config);
    let files = gguf_tensors(&config, tensors(&config), GgmlDType::Q5_0);
    let error = open(&keys, &files);
    assert!(error.contains("blk.0.attn_k.weight") || error.contains("Q5_0"), "{error}");
    let mut files = gguf_tensors(&config, tensors(&config), GgmlDType::F32);
    files.retain(|(name, _)| name != "blk.1.ffn_up.weight");
    assert!(open(&keys, &files).contains("tensor 'blk.1.ffn_up.weight' is missing"));
    let mut keys = metadata(&config);
    keys[4].1 = Value::U32(96);
    let files = gguf_tensors(&config, tensors(&config), GgmlDType::F32);
    assert!(open(&keys, &files).contains("160 x 64, but the metadata make it 96 x 64"));
}
