//! Any server that speaks OpenAI's completions over HTTP (vLLM, SGLang, llama.cpp's and others), as a serving system.
//!
//! Each request is a `POST` to `<url>/completions` with `stream` on, temperature 0 and the prompt as token ids, so that
//! the server gets exactly the tokens of the workload; a server that takes text alone refuses them. Tokens are counted as
//! [`Counting`] says and stamped when the bytes that bring them arrive, which is what a client of that server sees.
//!
//! One thread does all of the talking (a runtime of one thread; the load generator's own never waits on a socket), over
//! at most [`OpenAiOptions::max_connections`] connections, which are kept for later requests. A request that waits for
//! one waits here, and its latency counts from its intended arrival all the same.

mod address;
mod answer;
mod connections;
mod exchange;
mod protocol;
mod server;
mod sse;

use std::fmt;
use std::time::Duration;

pub use connections::{is_gone, is_silent};
pub use server::OpenAiServer;

use crate::BaselineError;

/// How the tokens of a stream are counted: what the server is asked to tell, and must.
///
/// Whichever it is, a server that tells in `usage` how many tokens an answer had settles the number at its end: tokens
/// that no chunk showed count as emitted when that is heard, and fewer than were counted fail the request. Ids that a
/// server does not tell are recorded as [`UNKNOWN_TOKEN`], so that a hash of outputs says their number only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counting {
    /// A chunk with text is a token. What every server can do, and too few where one sends several tokens a chunk.
    #[default]
    Chunks,
    /// `logprobs` are asked for (1), and each chunk's are counted; a server may be slower for it.
    Logprobs,
    /// `stream_options.continuous_usage_stats` is asked for: the `usage` of each chunk, as vLLM has it.
    Usage,
    /// `return_token_ids` is asked for: the `token_ids` of each chunk, as vLLM has them.
    TokenIds,
}

/// The id recorded for a token whose id the server does not tell.
pub const UNKNOWN_TOKEN: u32 = u32::MAX;

/// A key that is sent as a bearer token; it is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// Takes a key.
    ///
    /// # Errors
    /// When it cannot stand in an HTTP header.
    pub fn new(key: String) -> Result<Self, BaselineError> {
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(BaselineError::Options(
                "an API key must be visible ASCII characters, one or more".into(),
            ));
        }
        Ok(Self(key))
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Which server, and how it is talked to.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenAiOptions {
    /// What OpenAI's own clients call the base URL: `http://localhost:8000/v1`. TLS is not spoken.
    pub url: String,
    /// The model's name, as the server has it.
    pub model: String,
    /// Sent with every request.
    pub api_key: Option<ApiKey>,
    /// How tokens are counted.
    pub counting: Counting,
    /// Whether the server is told to go on past its own end of sequence (`ignore_eos`, which vLLM, SGLang and llama.cpp's
    /// know and others refuse). Without, it ends as it likes, which is recorded as
    /// [`Early`](quire_workloads::FinishReason::Early), and answers are not as long as the workload has them.
    pub ignore_eos: bool,
    /// The most connections, and so requests at the server at once.
    pub max_connections: usize,
    /// The most requests that wait here for a connection; those beyond are rejected.
    pub max_waiting: usize,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// The longest silence of a server that has a request; then the request fails.
    pub silence_timeout: Duration,
}

impl OpenAiOptions {
    /// 256 connections, 16,384 waiting, 10 s to connect, ten minutes of silence.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            api_key: None,
            counting: Counting::default(),
            ignore_eos: false,
            max_connections: 256,
            max_waiting: 16_384,
            connect_timeout: Duration::from_secs(10),
            silence_timeout: Duration::from_secs(600),
        }
    }

    /// Checks what types cannot say, without asking the network.
    ///
    /// # Errors
    /// With the field that cannot be so.
    pub fn check(&self) -> Result<(), String> {
        address::Address::parse(&self.url)?;
        match self {
            _ if self.model.is_empty() => Err("`model` is empty: name the model as the server has it".into()),
            _ if !(1..=MOST_CONNECTIONS).contains(&self.max_connections) => {
                Err(format!("`max_connections` must be 1 to {MOST_CONNECTIONS}"))
            }
            _ if self.connect_timeout.is_zero() => Err("`connect_timeout_s` must be more than 0".into()),
            _ if self.silence_timeout.is_zero() => Err("`silence_timeout_s` must be more than 0".into()),
            _ => Ok(()),
        }
    }
}

/// More files than this few systems let a process open.
const MOST_CONNECTIONS: usize = 16_384;
