//! ShareGPT: a JSON array of `{"id": .., "conversations": [{"from": "human", "value": "text"}, ..]}`. It has no times,
//! and texts instead of token counts.

use std::fmt;
use std::io::BufRead;

use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{MAX_TOKENS, ReadOptions, Trace, TraceRequest, Turn};
use crate::error::WorkloadError;

/// What some programs put before a text, and JSON does not know.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Which exchanges of a conversation become requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turns {
    /// The first question and its answer, as serving benchmarks do.
    #[default]
    First,
    /// Each question and its answer; the prompt holds the conversation so far, as a chat server would see it.
    Each,
}

/// How texts become token counts.
#[derive(Clone, Copy)]
pub enum TokenCounter<'a> {
    /// An estimate by the length of the text; the trace says that it is one.
    CharsPerToken(f64),
    /// A tokenizer.
    Tokenizer(&'a dyn Fn(&str) -> usize),
}

impl Default for TokenCounter<'_> {
    /// Four characters a token, about what English text takes in vocabularies of 32,000 to 128,000.
    fn default() -> Self {
        Self::CharsPerToken(4.0)
    }
}

impl fmt::Debug for TokenCounter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label())
    }
}

impl TokenCounter<'_> {
    /// Whether it may be given whatever a trace's format is: only an estimate that is not the default was chosen for texts. A
    /// tokenizer is there for those traces that have texts.
    pub(super) fn serves_any_format(&self) -> bool {
        match (self, Self::default()) {
            (Self::CharsPerToken(chars), Self::CharsPerToken(default)) => *chars == default,
            _ => true,
        }
    }

    fn label(&self) -> String {
        match self {
            Self::CharsPerToken(chars) => format!("estimate: {chars} characters a token"),
            Self::Tokenizer(_) => "tokenizer".to_owned(),
        }
    }

    fn count(&self, text: &str) -> u64 {
        match self {
            Self::CharsPerToken(chars) => (text.chars().count() as f64 / chars).ceil() as u64,
            Self::Tokenizer(count) => count(text) as u64,
        }
    }
}

#[derive(Deserialize)]
struct Conversation {
    conversations: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    from: String,
    value: String,
}

pub(super) fn read(
    mut reader: impl BufRead,
    options: &ReadOptions,
    trace: &mut Trace,
) -> Result<(), WorkloadError> {
    if let TokenCounter::CharsPerToken(chars) = options.tokens {
        crate::error::positive("chars_per_token", chars)?;
    }
    trace.meta.timed = false;
    trace.meta.tokens_by = Some(options.tokens.label());
    let file = trace.meta.file.clone();
    let start = reader.fill_buf().map_err(|error| WorkloadError::Io { path: (&file).into(), error })?;
    if start.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    let mut json = serde_json::Deserializer::from_reader(reader);
    let mut full = false;
    let result = Conversations { options, trace, full: &mut full }.deserialize(&mut json);
    let result = if full { Ok(()) } else { result.and_then(|()| json.end()) };
    result.map_err(|error| {
        let text = error.to_string();
        let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what).to_owned();
        WorkloadError::Malformed { file, line: error.line() as u64, column: error.column() as u64, problem }
    })
}

/// Takes in conversations one by one, so that no more than one conversation's text is in memory.
struct Conversations<'a, 'o> {
    options: &'a ReadOptions<'o>,
    trace: &'a mut Trace,
    full: &'a mut bool,
}

impl<'de> DeserializeSeed<'de> for Conversations<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Conversations<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut conversations: A) -> Result<(), A::Error> {
        while let Some(conversation) = conversations.next_element::<Conversation>()? {
            let number = self.trace.meta.rows;
            self.trace.meta.rows += 1;
            add(&conversation, number, self.options, self.trace).map_err(serde::de::Error::custom)?;
            if self.trace.is_full(self.options) {
                *self.full = true;
                // The array is left in the middle, which serde_json reports and the caller, knowing why, ignores.
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Adds the exchanges of a conversation: each message of a person that is answered.
fn add(
    conversation: &Conversation,
    number: u64,
    options: &ReadOptions,
    trace: &mut Trace,
) -> Result<(), String> {
    let (mut history, mut turn) = (0_u64, 0_u32);
    let messages = &conversation.conversations;
    for (at, message) in messages.iter().enumerate() {
        let tokens = options.tokens.count(&message.value);
        history = history.saturating_add(tokens);
        let reply = messages.get(at + 1).filter(|next| is_person(&message.from) && is_model(&next.from));
        let Some(reply) = reply else { continue };
        let answer = options.tokens.count(&reply.value);
        if history.max(answer) > u64::from(MAX_TOKENS) {
            return Err(format!("conversation {number} has more than {MAX_TOKENS} tokens"));
        }
        let (input_len, output_len) = (history as u32, answer as u32);
        let turn_of = Turn { conversation: number, turn };
        trace.push(TraceRequest { arrival_s: 0.0, input_len, output_len, prefix: None, turn: Some(turn_of) });
        turn += 1;
        if options.turns == Turns::First || trace.is_full(options) {
            break;
        }
    }
    if turn == 0 {
        trace.meta.left_out.no_exchange += 1;
    }
    Ok(())
}

fn is_person(from: &str) -> bool {
    matches!(from, "human" | "user")
}

fn is_model(from: &str) -> bool {
    matches!(from, "gpt" | "chatgpt" | "assistant" | "bing" | "bard" | "model")
}
