//! Tokenizers rebuilt from GGUF metadata, against tokens worked out by hand.

use candle_core::quantized::gguf_file::Value;
use quire_engine::Tokenizer;
use quire_engine::load::{GgufHeader, tokenizer_from_gguf};

use crate::gguf::write;

fn build(keys: Vec<(&str, Value)>) -> Result<Tokenizer, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.gguf");
    let keys: Vec<_> =
        keys.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    write(&path, &keys, &[]);
    let bytes = std::fs::read(&path).unwrap();
    tokenizer_from_gguf(&GgufHeader::parse(&bytes, &path).unwrap(), &bytes)
}

fn text(text: &str) -> Value {
    Value::String(text.into())
}

fn texts(list: &[&str]) -> Value {
    Value::Array(list.iter().map(|t| text(t)).collect())
}

/// A byte-level tokenizer that knows ASCII and these merges, and its tokens of `input`, as text.
fn byte_level(pre: &str, merges: &[&str], input: &str) -> Result<Vec<String>, String> {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "Ċ"].map(String::from));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let tokenizer = build(vec![
        ("model", text("gpt2")),
        ("pre", text(pre)),
        ("tokens", texts(&tokens)),
        ("merges", texts(merges)),
        ("add_bos_token", Value::Bool(false)),
    ])?;
    let ids = tokenizer.encode(input).map_err(|error| error.to_string())?;
    assert_eq!(tokenizer.decode(&ids).unwrap(), input);
    Ok(ids.into_iter().map(|id| tokenizer.token(id).unwrap()).collect())
}

#[test]
fn pre_tokenizers_split_digits_as_their_models_do() {
    let merges = ["1 2", "3 4", "12 34", "Ġ 12"];
    for (pre, expected) in [
        // Digits join freely, with the space before them.
        ("gpt-2", vec!["a", "Ġ", "1234", "5"]),
        ("default", vec!["a", "Ġ", "1234", "5"]),
        // Digits are single.
        ("smollm", vec!["a", "Ġ", "1", "2", "3", "4", "5"]),
        ("qwen2", vec!["a", "Ġ", "1", "2", "3", "4", "5"]),
        // Groups of three, from the left.
        ("llama-bpe", vec!["a", "Ġ", "12", "3", "4", "5"]),
    ] {
        assert_eq!(byte_level(pre, &merges, "a 12345").unwrap(), expected, "{pre}");
    }
}

#[test]
fn pre_tokenizers_split_contractions_and_newlines_as_their_models_do() {
    let merges = ["' L", "'L L", ". Ċ"];
    let gpt2 = byte_level("gpt-2", &merges, "I'LL.\nx").unwrap();
    assert_eq!(gpt2, ["I", "'", "L", "L", ".", "Ċ", "x"]);
    for pre in ["llama-bpe", "qwen2"] {
        // Contractions in any case, and newlines joined to the punctuation before them.
        assert_eq!(byte_level(pre, &merges, "I'LL.\nx").unwrap(), ["I", "'LL", ".Ċ", "x"], "{pre}");
    }
}

#[test]
fn unknown_kinds_and_broken_merges_are_named() {
    assert!(byte_level("tekken", &[], "a").unwrap_err().contains("pre-tokenizer 'tekken'"));
    let error = byte_level("gpt-2", &["a é"], "a").unwrap_err();
    assert!(error.contains("merge 0") && error.contains("'a é'"), "{error}");
    let keys = vec![("model", text("bert")), ("tokens", texts(&["a"]))];
    assert!(build(keys).unwrap_err().contains("tokenizer kind 'bert'"));
}

/// A SentencePiece vocabulary: unknown, begin, end, all bytes, then pieces with falling scores.
fn sentence_piece(pieces: &[&str]) -> Tokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(pieces.iter().map(|&piece| piece.to_owned()));
    let kinds = (0..tokens.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    });
    let scores = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 258.0 - id as f32 });
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    build(vec![
        ("model", text("llama")),
        ("tokens", texts(&tokens)),
        ("token_type", Value::Array(kinds.map(Value::I32).collect())),
        ("scores", Value::Array(scores.map(Value::F32).collect())),
        ("bos_token_id", Value::U32(1)),
        ("eos_token_id", Value::U32(2)),
    ])
    .unwrap()
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    // Scores fall along the list: "lo" is joined before "el".
    let tokenizer = sentence_piece(&["lo", "el", "▁hel", "he", "▁h", "▁", "h", "e", "l", "o"]);
    let ids = tokenizer.encode("hello é").unwrap();
    let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
    // ▁ h e l l o -> lo; el; then ▁hel cannot come of ▁ h el but of "▁h" and "el".
    assert_eq!(tokens, ["<s>", "▁hel", "lo", "▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "hello é");
    assert_eq!(tokenizer.stop_tokens(), [2]);
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["", "hel", "lo", " ", "", "é"]);
}

#[test]
fn a_stream_of_broken_bytes_does_not_wait_for_ever() {
    let tokenizer = sentence_piece(&["▁", "a"]);
    let mut stream = tokenizer.stream();
    let shown: String = (0..40).map(|_| stream.push(3 + 0xC3).unwrap()).collect();
    assert!(shown.chars().count() >= 20, "{shown}");
}
