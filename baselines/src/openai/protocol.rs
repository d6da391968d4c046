//! What is said and heard: the body of a request, the chunks of an answer, and what servers say when they refuse.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Counting;

/// The end of every stream.
pub(super) const DONE: &[u8] = b"[DONE]";

/// Letters of a server's message that are kept.
const KEPT: usize = 300;

/// A request's body. What a server need not know is sent only where the options ask for it.
#[derive(Debug, Serialize)]
pub(super) struct Body<'a> {
    model: &'a str,
    prompt: &'a [u32],
    max_tokens: u32,
    temperature: f32,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    ignore_eos: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<u32>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    return_token_ids: bool,
}

#[derive(Debug, Serialize)]
struct StreamOptions {
    include_usage: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    continuous_usage_stats: bool,
}

impl<'a> Body<'a> {
    pub(super) fn new(
        model: &'a str,
        prompt: &'a [u32],
        max_tokens: u32,
        counting: Counting,
        ignore_eos: bool,
    ) -> Self {
        let continuous_usage_stats = counting == Counting::Usage;
        Self {
            model,
            prompt,
            max_tokens,
            temperature: 0.0,
            stream: true,
            stream_options: StreamOptions { include_usage: true, continuous_usage_stats },
            ignore_eos,
            logprobs: (counting == Counting::Logprobs).then_some(1),
            return_token_ids: counting == Counting::TokenIds,
        }
    }
}

/// One event of a stream. Servers add fields as they like.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Chunk {
    #[serde(default)]
    pub(super) choices: Vec<Choice>,
    #[serde(default)]
    pub(super) usage: Option<Usage>,
    #[serde(default)]
    pub(super) error: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Choice {
    #[serde(default)]
    pub(super) index: u32,
    #[serde(default)]
    pub(super) text: Option<String>,
    #[serde(default)]
    pub(super) finish_reason: Option<String>,
    #[serde(default)]
    pub(super) token_ids: Option<Vec<u32>>,
    #[serde(default)]
    pub(super) logprobs: Option<Logprobs>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Logprobs {
    #[serde(default)]
    pub(super) tokens: Option<Vec<IgnoredAny>>,
}

/// Token counts of a request so far.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct Usage {
    #[serde(default)]
    pub(super) completion_tokens: Option<u64>,
    #[serde(default)]
    pub(super) prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct PromptDetails {
    #[serde(default)]
    pub(super) cached_tokens: Option<u64>,
}

/// Reads an event's data.
pub(super) fn parse(data: &[u8]) -> Result<Chunk, String> {
    let chunk: Chunk = serde_json::from_slice(data)
        .map_err(|error| format!("it sent no chunk of a completion ({error}): {}", shown(data)))?;
    match &chunk.error {
        Some(error) if !error.is_null() => Err(format!("it broke off: {}", said(error))),
        _ => Ok(chunk),
    }
}

/// What the body of an answer with an error status says.
pub(super) fn message(body: &[u8]) -> String {
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => said(value.get("error").or_else(|| value.get("detail")).unwrap_or(&value)),
        Err(_) if body.is_empty() => "no message".into(),
        Err(_) => shown(body),
    }
}

fn said(error: &Value) -> String {
    let words = error.as_str().or_else(|| error.get("message")?.as_str());
    shown(words.map_or_else(|| error.to_string(), str::to_owned).as_bytes())
}

/// The beginning of what came, in one line.
pub(super) fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * KEPT)]);
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let short: String = text.chars().take(KEPT).map(plain).collect();
    if text.chars().count() > KEPT || bytes.len() > 4 * KEPT { format!("{short}...") } else { short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_request_asks_for_nothing_uncommon() {
        let body = |counting, ignore_eos| {
            serde_json::to_value(Body::new("m", &[5, 6], 7, counting, ignore_eos)).unwrap()
        };
        let plain = serde_json::json!({
            "model": "m", "prompt": [5, 6], "max_tokens": 7, "temperature": 0.0, "stream": true,
            "stream_options": { "include_usage": true }
        });
        assert_eq!(body(Counting::Chunks, false), plain);
        assert_eq!(body(Counting::TokenIds, true)["return_token_ids"], true);
        assert_eq!(body(Counting::TokenIds, true)["ignore_eos"], true);
        assert_eq!(body(Counting::Usage, false)["stream_options"]["continuous_usage_stats"], true);
        assert_eq!(body(Counting::Logprobs, false)["logprobs"], 1);
    }

    #[test]
    fn messages_are_found_where_servers_put_them() {
        for (body, expected) in [
            (r#"{"error":{"message":"too long","code":400}}"#, "too long"),
            (r#"{"error":"too long"}"#, "too long"),
            (r#"{"object":"error","message":"too long"}"#, "too long"),
            (r#"{"detail":"too long"}"#, "too long"),
            ("<html>\n502</html>", "<html> 502</html>"),
            ("", "no message"),
        ] {
            assert_eq!(message(body.as_bytes()), expected, "{body}");
        }
        assert!(message(r#"{"detail":[{"loc":["body"]}]}"#.as_bytes()).contains("loc"));
        assert!(message(&[b'x'; 100_000]).len() < 400);
    }
}
