//! Text to tokens and back, one token at a time if need be.

use std::path::Path;

use serde_json::Value;

use crate::EngineError;
use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::load::read_small;

/// Tokenizer files of large vocabularies are some tens of megabytes.
const FILE_LIMIT: u64 = 256 << 20;

/// A model's tokenizer, its special tokens and its chat template.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put before every text by hand, when `inner` does not do it.
    prefix: Vec<u32>,
    stop_tokens: Vec<u32>,
    template: Option<ChatTemplate>,
}

/// What a tokenizer is made of.
pub(crate) struct TokenizerParts {
    pub(crate) inner: tokenizers::Tokenizer,
    pub(crate) prefix: Vec<u32>,
    pub(crate) bos_token: Option<String>,
    pub(crate) eos_token: Option<String>,
    pub(crate) stop_tokens: Vec<u32>,
    pub(crate) chat_template: Option<String>,
}

impl TokenizerParts {
    pub(crate) fn build(self) -> Result<Tokenizer, EngineError> {
        let template = match self.chat_template {
            Some(source) => Some(ChatTemplate::new(&source, self.bos_token, self.eos_token)?),
            None => None,
        };
        let mut stop_tokens = self.stop_tokens;
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        Ok(Tokenizer { inner: self.inner, prefix: self.prefix, stop_tokens, template })
    }
}

impl Tokenizer {
    /// The tokenizer of a Hugging Face folder: `tokenizer.json`, and what `tokenizer_config.json`,
    /// `generation_config.json`, `config.json` and `chat_template.jinja` say beside it.
    ///
    /// # Errors
    /// When a file is missing or wrong.
    pub fn from_folder(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("tokenizer.json");
        let bytes = read_small(&path, FILE_LIMIT)?;
        let fail = |what: String| EngineError::Model { path: path.clone(), what };
        // The parser of the tokenizers crate indexes by what some fields say; a wrong file must not end the process.
        let mut inner = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|_| fail("the tokenizer contradicts itself".into()))?
            .map_err(|error| fail(error.to_string()))?;
        // Files keep what was set for training. A prompt is all of its text and nothing else.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        let config = optional_json(&folder.join("tokenizer_config.json"))?;
        let token = |key: &str| {
            let value = config.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        let (bos_token, eos_token) = (token("bos_token"), token("eos_token"));
        let mut stop_tokens: Vec<u32> = eos_token.iter().filter_map(|t| inner.token_to_id(t)).collect();
        for file in ["generation_config.json", "config.json"] {
            stop_tokens.extend(eos_ids(&optional_json(&folder.join(file))?));
        }
        let chat_template = folder_template(folder, &config)?;
        TokenizerParts { inner, prefix: Vec::new(), bos_token, eos_token, stop_tokens, chat_template }.build()
    }

    /// The tokens of `text`, with those that the model wants around every text.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        let encoding = self.inner.encode_fast(text, true).map_err(failed)?;
        Ok([self.prefix.as_slice(), encoding.get_ids()].concat())
    }

    /// The tokens of `text` alone.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, EngineError> {
        Ok(self.inner.encode_fast(text, false).map_err(failed)?.get_ids().to_vec())
    }

    /// The tokens of a conversation under the model's chat template, the assistant's turn opened.
    ///
    /// # Errors
    /// When the model has no chat template or it fails.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>, EngineError> {
        let template = self.template.as_ref().ok_or_else(|| {
            EngineError::Tokenizer("this model has no chat template: give it the text raw".into())
        })?;
        self.encode_plain(&template.render(messages, true)?)
    }

    /// The model's chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// The text of `tokens`, special ones left out.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, EngineError> {
        self.inner.decode(tokens, true).map_err(failed)
    }

    /// Tokens that end the model's output.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Tokens it knows, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The text of one token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Turns tokens into text as they come.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, tokens: Vec::new(), shown: 0, read: 0 }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (vocab, stops) = (self.vocab_size(), &self.stop_tokens);
        f.debug_struct("Tokenizer")
            .field("vocab_size", &vocab)
            .field("stop_tokens", stops)
            .finish_non_exhaustive()
    }
}

/// Text from tokens as they come. A character of several tokens appears when its last token does, so what has been
/// given out is always whole characters and never changes.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens since the last place where the text could be cut.
    tokens: Vec<u32>,
    /// Bytes of the text of `tokens` that come from tokens given out before.
    shown: usize,
    /// Tokens of `tokens` whose text has been given out.
    read: usize,
}

/// No character has more bytes, and so more tokens, than four: with twice as many there is none to wait for.
const MAX_PENDING: usize = 8;

impl TextStream<'_> {
    /// The text that `token` completes; empty inside a character.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, token: u32) -> Result<String, EngineError> {
        self.tokens.push(token);
        let text = self.tokenizer.decode(&self.tokens)?;
        let pending = self.tokens.len() - self.read;
        if text.len() <= self.shown {
            // Special tokens have no text, and there may be any number of them: they are not decoded again and again.
            if pending > MAX_PENDING {
                self.tokens.truncate(self.read);
            }
            return Ok(String::new());
        }
        if text.ends_with(char::REPLACEMENT_CHARACTER) && pending <= MAX_PENDING {
            return Ok(String::new());
        }
        self.advance(&text)
    }

    /// What is left when the output ends inside a character.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(mut self) -> Result<String, EngineError> {
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.len() <= self.shown {
            return Ok(String::new());
        }
        self.advance(&text)
    }

    /// Gives out what is new in `text` and drops the tokens before the last ones given out: decoders look at what
    /// precedes a token (a leading space is dropped at the start), so those stay as context.
    fn advance(&mut self, text: &str) -> Result<String, EngineError> {
        let new = text.get(self.shown..).unwrap_or_default().to_owned();
        self.tokens.drain(..self.read);
        self.read = self.tokens.len();
        self.shown = self.tokenizer.decode(&self.tokens)?.len();
        Ok(new)
    }
}

fn folder_template(folder: &Path, config: &Value) -> Result<Option<String>, EngineError> {
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        let text = String::from_utf8(read_small(&path, FILE_LIMIT)?);
        let not_text = |_| EngineError::Model { path, what: "the template is not UTF-8".into() };
        return text.map(Some).map_err(not_text);
    }
    let template = match config.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(named)) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    };
    Ok(template)
}

fn eos_ids(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The JSON of a file that may be missing: then `null`.
fn optional_json(path: &Path) -> Result<Value, EngineError> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&read_small(path, FILE_LIMIT)?)
        .map_err(|error| EngineError::Model { path: path.to_owned(), what: error.to_string() })
}

fn failed(error: tokenizers::Error) -> EngineError {
    EngineError::Tokenizer(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As files are that were saved in training; the second would panic in the tokenizer.
    #[test]
    fn a_prompt_is_neither_cut_nor_filled() {
        for (length, stride) in [(2, 0), (1, 1)] {
            let json = serde_json::json!({
                "version": "1.0",
                "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride},
                "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1,
                    "pad_type_id": 0, "pad_token": "b"},
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
            });
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
            let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
            assert_eq!(tokenizer.encode("a a b a a").unwrap(), [0, 0, 1, 0, 0]);
            assert_eq!(tokenizer.encode_plain("a a b a a").unwrap(), [0, 0, 1, 0, 0]);
        }
    }

    #[test]
    fn tokens_without_text_do_not_pile_up() {
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 2, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}],
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<s>": 2}, "unk_token": "a"},
        });
        let tokenizer = Tokenizer {
            inner: tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap(),
            prefix: Vec::new(),
            stop_tokens: Vec::new(),
            template: None,
        };
        for specials in [0, 1, MAX_PENDING, MAX_PENDING + 1, 1000] {
            let mut stream = tokenizer.stream();
            let tokens = [vec![2; specials], vec![0], vec![2; specials], vec![1]].concat();
            let mut text = String::new();
            for &token in &tokens {
                text += &stream.push(token).unwrap();
                assert!(stream.tokens.len() <= 2 * (MAX_PENDING + 1), "{} tokens", stream.tokens.len());
            }
            assert_eq!(text, tokenizer.decode(&tokens).unwrap());
            assert_eq!(text, "a b");
        }
    }
}
