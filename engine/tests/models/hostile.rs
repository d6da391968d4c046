//! Wrong, truncated and hostile files: an error that says what and where, never a panic or a huge allocation.

use std::path::Path;
use std::sync::OnceLock;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use proptest::prelude::*;
use quire_engine::load::tokenizer_from_gguf;
use quire_engine::load::{GgufHeader, ModelSource, SafetensorsHeader, config_from_gguf, config_from_json};

use crate::gguf::{gguf_tensors, metadata, write};
use crate::random_model::{exact_options, golden, tensors, write_folder};

/// A small GGUF file with everything in it, and where its header ends.
fn gguf() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let config = config_from_json(golden("qwen2")["config"].to_string().as_bytes()).unwrap();
        let text = |t: &str| Value::String(t.into());
        let mut keys = metadata(&config);
        let tokens = ["a", "b", "ab", "<|im_end|>"];
        keys.push(("tokenizer.ggml.model".into(), text("gpt2")));
        keys.push(("tokenizer.ggml.pre".into(), text("qwen2")));
        keys.push(("tokenizer.ggml.tokens".into(), Value::Array(tokens.map(text).to_vec())));
        keys.push(("tokenizer.ggml.token_type".into(), Value::Array([1, 1, 1, 3].map(Value::I32).to_vec())));
        keys.push(("tokenizer.ggml.merges".into(), Value::Array(vec![text("a b")])));
        keys.push(("tokenizer.ggml.eos_token_id".into(), Value::U32(3)));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        write(&path, &keys, &gguf_tensors(&config, tensors(&config), GgmlDType::Q8_0));
        std::fs::read(path).unwrap()
    })
}

/// Everything that is done with a GGUF file's header.
fn parse(bytes: &[u8]) -> Result<(), String> {
    let header = GgufHeader::parse(bytes, Path::new("model.gguf")).map_err(|error| error.to_string())?;
    config_from_gguf(&header, bytes)?;
    tokenizer_from_gguf(&header, bytes)?;
    Ok(())
}

#[test]
fn every_truncation_is_an_error() {
    let whole = gguf();
    parse(whole).unwrap();
    for length in (0..whole.len().min(8192)).chain((8192..whole.len()).step_by(997)) {
        let error = parse(&whole[..length]).expect_err("a truncated file");
        assert!(error.contains("ends at byte"), "{length}: {error}");
    }
}

fn patched(find: &[u8], after: usize, with: &[u8]) -> String {
    let mut bytes = gguf().to_vec();
    let at = bytes.windows(find.len()).position(|w| w == find).expect("it is there") + find.len() + after;
    bytes[at..at + with.len()].copy_from_slice(with);
    parse(&bytes).unwrap_err()
}

#[test]
fn numbers_that_lie_are_told_from_the_files_size() {
    let huge = u64::MAX.to_le_bytes();
    let mut bytes = gguf().to_vec();
    bytes[8..16].copy_from_slice(&huge);
    assert!(parse(&bytes).unwrap_err().contains("tensor"));
    let mut bytes = gguf().to_vec();
    bytes[16..24].copy_from_slice(&huge);
    parse(&bytes).unwrap_err();
    // Lengths of a list, of a text; a tensor's dimension and offset.
    let error = patched(b"tokenizer.ggml.tokens", 8, &huge);
    assert!(error.contains("tokenizer.ggml.tokens"), "{error}");
    let error = patched(b"tokenizer.ggml.model", 4, &huge);
    assert!(error.contains("tokenizer.ggml.model needs 18446744073709551615 bytes"), "{error}");
    let error = patched(b"token_embd.weight", 4, &huge);
    assert!(error.contains("token_embd.weight"), "{error}");
    let error = patched(b"token_embd.weight", 4 + 16 + 4, &huge);
    assert!(error.contains("tensor 'token_embd.weight'") && error.contains("ends at byte"), "{error}");
    let error = patched(b"token_embd.weight", 4 + 16, &6u32.to_le_bytes());
    assert!(error.contains("tensor 'token_embd.weight' is stored as Q5_0"), "{error}");
    let error = patched(b"tokenizer.ggml.eos_token_id", 4, &9u32.to_le_bytes());
    assert!(error.contains("eos_token_id' is 9, but there are 4 tokens"), "{error}");
    let error = patched(b"qwen2.attention.head_count", 4, &0u32.to_le_bytes());
    assert!(error.contains("head_count"), "{error}");
}

#[test]
fn other_files_are_told_apart() {
    let open = |name: &str, content: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        let source = ModelSource::parse(path.to_str().unwrap());
        let executor = source.and_then(|s| quire_engine::CpuExecutor::load(&s, &exact_options()));
        executor.unwrap_err().to_string()
    };
    assert!(open("model.gguf", b"PK\x03\x04 and so on").contains("not a GGUF file"));
    assert!(open("model.gguf", b"").contains("the file ends at byte 0"));
    assert!(open("model.gguf", b"GGUF\x00\x00\x00\x03").contains("big-endian"));
    assert!(open("model.gguf", b"GGUF\x01\x00\x00\x00").contains("version 1 is not supported"));
    assert!(open("model.bin", b"x").contains("a model is a folder"));
    assert!(ModelSource::parse("/nowhere/model").unwrap_err().to_string().contains("no such file"));
    assert!(ModelSource::parse("dummy:gpt-2").unwrap_err().to_string().contains("smollm2-135m"));
    let folder = tempfile::tempdir().unwrap();
    let error = ModelSource::parse(folder.path().to_str().unwrap()).unwrap().tokenizer().unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"));
}

/// The error of loading a folder after `spoil` changed it.
fn spoiled(spoil: impl FnOnce(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden("qwen2")["config"], 2);
    spoil(folder.path());
    let source = ModelSource::parse(folder.path().to_str().unwrap()).unwrap();
    quire_engine::CpuExecutor::load(&source, &exact_options()).unwrap_err().to_string()
}

#[test]
fn spoiled_folders_are_errors_that_name_the_file() {
    let error = spoiled(|f| std::fs::remove_file(f.join("model-1.safetensors")).unwrap());
    assert!(error.contains("model-1.safetensors"), "{error}");
    let error = spoiled(|f| std::fs::remove_file(f.join("config.json")).unwrap());
    assert!(error.contains("config.json"), "{error}");
    let error = spoiled(|f| std::fs::write(f.join("config.json"), "{\"hidden_size\": }").unwrap());
    assert!(error.contains("config.json") && error.contains("line 1"), "{error}");
    let error = spoiled(|f| {
        let bytes = std::fs::read(f.join("model-0.safetensors")).unwrap();
        std::fs::write(f.join("model-0.safetensors"), &bytes[..bytes.len() - 4]).unwrap();
    });
    assert!(error.contains("model-0.safetensors") && error.contains("ends at byte"), "{error}");
    let error = spoiled(|f| {
        let index = "{\"weight_map\": {\"a\": \"../secret.safetensors\"}}";
        std::fs::write(f.join("model.safetensors.index.json"), index).unwrap();
    });
    assert!(error.contains("'../secret.safetensors' is not the name of a file"), "{error}");
    let error = spoiled(|f| {
        let text = std::fs::read_to_string(f.join("config.json")).unwrap();
        std::fs::write(f.join("config.json"), text.replace("\"vocab_size\":96", "\"vocab_size\":97"))
            .unwrap();
    });
    assert!(error.contains("tensor 'model.embed_tokens.weight' has shape [96, 64]"), "{error}");
}

/// A safetensors file with this header and `data` bytes after it.
fn safetensors(header: &str, data: usize) -> Result<SafetensorsHeader, String> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    SafetensorsHeader::parse(&bytes, Path::new("model.safetensors")).map_err(|error| error.to_string())
}

#[test]
fn safetensors_headers_that_lie_are_errors() {
    let good = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    assert_eq!(safetensors(good, 16).unwrap().tensors["a"].bytes.len(), 16);
    let described = good.replacen('{', r#"{"__metadata__":{"format":"pt"},"#, 1);
    assert_eq!(safetensors(&described, 16).unwrap().tensors.len(), 1);
    for (header, data, expected) in [
        (good, 15, "tensor 'a' lies at bytes"),
        (
            r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,16]}}"#,
            16,
            "6 elements of F32 but 16 bytes",
        ),
        (r#"{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,16]}}"#, 16, "tensor 'a'"),
        (r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}"#, 16, "tensor 'a'"),
        (
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551615]}}"#,
            16,
            "beyond any file",
        ),
        (r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#, 16, "tensor 'a': invalid value"),
        (
            r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}}"#,
            4,
            "tensor 'a': invalid length 9, expected at most 8 dimensions",
        ),
        (r#"{"a":0}"#, 0, "tensor 'a': invalid type"),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            8,
            "tensor 'a' appears twice",
        ),
        ("[]", 0, "not a JSON object"),
        ("", 0, "not a JSON object"),
    ] {
        let error = safetensors(header, data).unwrap_err();
        assert!(error.contains(expected), "{header}: {error}");
    }
    let path = Path::new("model.safetensors");
    let error = SafetensorsHeader::parse(&[0xFF; 64], path).unwrap_err().to_string();
    assert!(error.contains("claims 18446744073709551615 bytes"), "{error}");
    assert!(SafetensorsHeader::parse(&[1, 2], path).unwrap_err().to_string().contains("only 2 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn flipped_bytes_never_panic(changes in prop::collection::vec((0usize..4096, any::<u8>()), 1..6)) {
        let mut bytes = gguf().to_vec();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        // An error or a parse are both fine; a panic or an abort is not.
        let _ = parse(&bytes);
    }

    #[test]
    fn any_json_is_a_configuration_or_an_error(key in "[a-z_]{4,20}", number in any::<i64>()) {
        let mut config = golden("llama3")["config"].clone();
        config[key] = number.into();
        let _ = config_from_json(config.to_string().as_bytes());
    }
}
