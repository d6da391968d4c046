//! The tokenizer inside a GGUF file, rebuilt for the `tokenizers` crate.
//!
//! `gpt2` tokenizers are byte-level BPE; which text may merge is decided by a pre-tokenizer that the file names, and
//! whose patterns are those of the models' own `tokenizer.json`. `llama` tokenizers are SentencePiece BPE: they carry
//! scores instead of merges, and a merge's rank is that of the token it makes.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use crate::Tokenizer;
use crate::load::{GgufHeader, GgufValue};
use crate::tokenizer::TokenizerParts;

const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Control tokens that end an output wherever they exist: files name only one of them as their end of sequence.
const END_OF_TURN: [&str; 5] = ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"];

/// Names under which files ask for Llama 3's pre-tokenizer.
const LLAMA3_NAMES: [&str; 3] = ["llama-bpe", "llama3", "llama-v3"];
/// Llama 3's pattern, from its tokenizer.json.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's: the same with single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer of the file with this header and these bytes.
///
/// # Errors
/// When it is missing, contradicts itself, or is of a kind that is not supported.
pub fn tokenizer_from_gguf(header: &GgufHeader, file: &[u8]) -> Result<Tokenizer, String> {
    let vocabulary = Vocabulary::read(header, file)?;
    let kind = header.text("tokenizer.ggml.model")?.unwrap_or("none");
    let mut inner = match kind {
        "gpt2" => byte_level(header, file, &vocabulary)?,
        "llama" => sentence_piece(header, file, &vocabulary)?,
        _ => return Err(format!("tokenizer kind '{kind}' is not supported; gpt2 and llama are")),
    };
    let added = |wanted: u64, special: bool| {
        let of_kind =
            vocabulary.tokens.iter().zip(&vocabulary.kinds).filter(move |(_, kind)| **kind == wanted);
        of_kind.map(move |(token, _)| AddedToken::from((*token).to_owned(), special)).collect::<Vec<_>>()
    };
    inner.add_special_tokens(added(CONTROL, true)).map_err(|error| error.to_string())?;
    inner.add_tokens(added(USER_DEFINED, false)).map_err(|error| error.to_string())?;
    finish(header, kind, inner, &vocabulary)
}

fn finish(
    header: &GgufHeader,
    kind: &str,
    inner: tokenizers::Tokenizer,
    vocabulary: &Vocabulary<'_>,
) -> Result<Tokenizer, String> {
    let bos = vocabulary.id(header, "tokenizer.ggml.bos_token_id")?;
    let mut stops = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        stops.extend(vocabulary.id(header, key)?);
    }
    let eos = stops.first().map(|&id| vocabulary.tokens[id as usize].to_owned());
    stops.extend(vocabulary.control_ids(&END_OF_TURN));
    let llama3 = header.text("tokenizer.ggml.pre")?.is_some_and(|pre| LLAMA3_NAMES.contains(&pre));
    let add_bos = header.truth("tokenizer.ggml.add_bos_token")?.unwrap_or(kind == "llama" || llama3);
    TokenizerParts {
        inner,
        prefix: bos.filter(|_| add_bos).into_iter().collect(),
        bos_token: bos.map(|id| vocabulary.tokens[id as usize].to_owned()),
        eos_token: eos,
        stop_tokens: stops,
        chat_template: header.text("tokenizer.chat_template")?.map(str::to_owned),
    }
    .build()
    .map_err(|error| error.to_string())
}

/// The tokens of the file, as it lists them.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(header: &GgufHeader, file: &'a [u8]) -> Result<Self, String> {
        let tokens = strings(header, file, "tokenizer.ggml.tokens")?
            .ok_or("the file holds no tokenizer ('tokenizer.ggml.tokens' is missing)")?;
        let kinds = match numbers(header, file, "tokenizer.ggml.token_type")? {
            Some(kinds) if kinds.len() == tokens.len() => kinds.into_iter().map(|kind| kind as u64).collect(),
            Some(kinds) => {
                return Err(format!("there are {} tokens but {} token types", tokens.len(), kinds.len()));
            }
            None => vec![1; tokens.len()],
        };
        Ok(Self { tokens, kinds })
    }

    /// Ids by text. A text that appears twice keeps its first id, as merges mean that one.
    fn ids(&self) -> HashMap<&'a str, u32> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            ids.entry(*token).or_insert(id as u32);
        }
        ids
    }

    fn control_ids(&self, texts: &[&str]) -> impl Iterator<Item = u32> {
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        tokens
            .filter(|(_, (token, kind))| **kind == CONTROL && texts.contains(token))
            .map(|(id, _)| id as u32)
    }

    fn id(&self, header: &GgufHeader, key: &str) -> Result<Option<u32>, String> {
        match header.unsigned(key)? {
            Some(id) if id >= self.tokens.len() as u64 => {
                Err(format!("metadata key '{key}' is {id}, but there are {} tokens", self.tokens.len()))
            }
            id => Ok(id.map(|id| id as u32)),
        }
    }
}

fn byte_level(
    header: &GgufHeader,
    file: &[u8],
    vocabulary: &Vocabulary<'_>,
) -> Result<tokenizers::Tokenizer, String> {
    let ids = vocabulary.ids();
    let lines = strings(header, file, "tokenizer.ggml.merges")?
        .ok_or("metadata key 'tokenizer.ggml.merges' is missing")?;
    let mut merges = Vec::with_capacity(lines.len());
    for (rank, line) in lines.into_iter().enumerate() {
        // A space inside a token is written as another character, so the first space after a token's first
        // character is the separator.
        let pair = line
            .char_indices()
            .skip(1)
            .find(|(_, c)| *c == ' ')
            .map(|(at, _)| (&line[..at], &line[at + 1..]));
        let known = pair.filter(|(a, b)| {
            ids.contains_key(a) && ids.contains_key(b) && ids.contains_key(format!("{a}{b}").as_str())
        });
        let (a, b) = known.ok_or_else(|| {
            format!(
                "merge {rank} of 'tokenizer.ggml.merges', '{line}', does not join two tokens into a token"
            )
        })?;
        merges.push((a.to_owned(), b.to_owned()));
    }
    let pre = header.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let ignore_merges = LLAMA3_NAMES.contains(&pre);
    let mut inner = tokenizers::Tokenizer::new(bpe(ids, merges, |b| b.ignore_merges(ignore_merges))?);
    let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
    let parts = match pre {
        "smollm" => vec![Digits::new(true).into(), bytes(true)],
        _ if ignore_merges => vec![split(LLAMA3)?, bytes(false)],
        "qwen2" => vec![split(QWEN2)?, bytes(false)],
        "gpt-2" | "default" => vec![bytes(true)],
        _ => {
            return Err(format!(
                "pre-tokenizer '{pre}' is not supported; smollm, llama-bpe, qwen2, gpt-2 and default are"
            ));
        }
    };
    if pre == "qwen2" {
        inner.with_normalizer(Some(NFC)).map_err(|error| error.to_string())?;
    }
    inner.with_pre_tokenizer(Some(Sequence::new(parts)));
    inner.with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}

fn split(pattern: &str) -> Result<PreTokenizerWrapper, String> {
    Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false)
        .map(Into::into)
        .map_err(|error| error.to_string())
}

fn sentence_piece(
    header: &GgufHeader,
    file: &[u8],
    vocabulary: &Vocabulary<'_>,
) -> Result<tokenizers::Tokenizer, String> {
    let ids = vocabulary.ids();
    let scores = numbers(header, file, "tokenizer.ggml.scores")?
        .filter(|scores| scores.len() == vocabulary.tokens.len())
        .ok_or("'tokenizer.ggml.scores' must have a score for each token")?;
    let unknown = vocabulary.kinds.iter().position(|&kind| kind == UNKNOWN);
    let unknown = unknown.map(|id| vocabulary.tokens[id].to_owned());
    let merges = merges_from_scores(&ids, vocabulary, &scores);
    let model = bpe(ids, merges, |builder| {
        let builder = builder.fuse_unk(true).byte_fallback(true);
        match unknown {
            Some(token) => builder.unk_token(token),
            None => builder,
        }
    })?;
    let text = |error: tokenizers::Error| error.to_string();
    let mut inner = tokenizers::Tokenizer::new(model);
    let add_space = header.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = Vec::new();
    if add_space {
        normalizers.push(Prepend::new("▁".into()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(text)?.into());
    inner.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(text)?;
    let mut decoders =
        vec![Replace::new("▁", " ").map_err(text)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if add_space {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(inner)
}

/// Every way to join two tokens into a third, best score of the third first.
fn merges_from_scores(
    ids: &HashMap<&str, u32>,
    vocabulary: &Vocabulary<'_>,
    scores: &[f64],
) -> Vec<(String, String)> {
    let mut merges = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if matches!(vocabulary.kinds[id], UNKNOWN | CONTROL) || token.len() > MAX_PIECE {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(a), ids.get(b)) {
                merges.push((scores[id], id, left, right));
            }
        }
    }
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2, x.3).cmp(&(y.1, y.2, y.3))));
    let text = |id: u32| vocabulary.tokens[id as usize].to_owned();
    merges.into_iter().map(|(_, _, left, right)| (text(left), text(right))).collect()
}

/// Longer pieces than any trained vocabulary's: what a hostile file would use to make splitting slow.
const MAX_PIECE: usize = 512;

fn bpe(
    ids: HashMap<&str, u32>,
    merges: Vec<(String, String)>,
    configure: impl FnOnce(tokenizers::models::bpe::BpeBuilder) -> tokenizers::models::bpe::BpeBuilder,
) -> Result<BPE, String> {
    let ids: HashMap<String, u32> = ids.into_iter().map(|(token, id)| (token.to_owned(), id)).collect();
    let builder =
        BPE::builder().vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges);
    configure(builder).build().map_err(|error| error.to_string())
}

fn strings<'a>(header: &GgufHeader, file: &'a [u8], key: &str) -> Result<Option<Vec<&'a str>>, String> {
    match header.metadata.get(key) {
        None => Ok(None),
        Some(GgufValue::Array(array)) if array.is_empty() => Ok(Some(Vec::new())),
        Some(GgufValue::Array(array)) => array
            .strings(file)
            .map(Some)
            .ok_or_else(|| format!("metadata key '{key}' is not a list of texts")),
        Some(_) => Err(format!("metadata key '{key}' is not a list")),
    }
}

fn numbers(header: &GgufHeader, file: &[u8], key: &str) -> Result<Option<Vec<f64>>, String> {
    match header.metadata.get(key) {
        None => Ok(None),
        Some(GgufValue::Array(array)) => array
            .numbers(file)
            .map(Some)
            .ok_or_else(|| format!("metadata key '{key}' is not a list of numbers")),
        Some(_) => Err(format!("metadata key '{key}' is not a list")),
    }
}
