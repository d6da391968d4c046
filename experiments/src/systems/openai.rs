//! Any OpenAI-compatible server as a serving system.

use std::sync::Arc;
use std::time::Duration;

use quire_baselines::openai::{ApiKey, Counting, OpenAiOptions, OpenAiServer};
use quire_workloads::{SystemError, WallClock};
use serde::{Deserialize, Serialize};

use super::{Launched, start_error};

const NAME: &str = "openai";

/// Settings of a server that runs elsewhere. The experiment's `model` must have its vocabulary and its limit: prompts are
/// made for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenAiSystem {
    /// What OpenAI's own clients call the base URL: `http://localhost:8000/v1`.
    pub url: String,
    /// The model's name, as the server has it.
    pub model: String,
    /// Name of the environment variable that holds its API key, where it wants one. The key itself is recorded nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// How tokens are counted.
    #[serde(default)]
    pub counting: Counting,
    /// Whether the server is told to go on past its own end of sequence, so that answers are as long as the workload has
    /// them. Those that do not know this (OpenAI's own among them) refuse it.
    pub ignore_eos: bool,
    /// The most connections, and so requests at the server at once.
    #[serde(default = "connections")]
    pub max_connections: u32,
    /// How long connecting may take, seconds.
    #[serde(default = "connect_timeout")]
    pub connect_timeout_s: f64,
    /// The longest silence of the server within a request, seconds; then the request fails.
    #[serde(default = "silence_timeout")]
    pub silence_timeout_s: f64,
}

fn connections() -> u32 {
    256
}

fn connect_timeout() -> f64 {
    10.0
}

fn silence_timeout() -> f64 {
    600.0
}

impl OpenAiSystem {
    pub(super) fn check(&self) -> Result<(), String> {
        self.options().and_then(|options| options.check())
    }

    /// All but the key, which is not asked for before it is needed.
    fn options(&self) -> Result<OpenAiOptions, String> {
        let time = |name: &str, seconds: f64| {
            Duration::try_from_secs_f64(seconds)
                .map_err(|_| format!("`{name}` must be a number of seconds above 0"))
        };
        Ok(OpenAiOptions {
            counting: self.counting,
            ignore_eos: self.ignore_eos,
            max_connections: self.max_connections as usize,
            connect_timeout: time("connect_timeout_s", self.connect_timeout_s)?,
            silence_timeout: time("silence_timeout_s", self.silence_timeout_s)?,
            ..OpenAiOptions::new(&self.url, &self.model)
        })
    }

    /// Checks that it tells the tokens of answers, which the prompts of later turns hold.
    pub(super) fn check_conversations(&self) -> Result<(), String> {
        if self.counting == Counting::TokenIds {
            return Ok(());
        }
        Err("a panel's `conversations` go on with the tokens of the answers, which a server tells with \
             `counting = \"token_ids\"` alone"
            .into())
    }

    /// Checks that its key is there.
    pub(super) fn check_key(&self) -> Result<(), String> {
        self.key().map(|_| ())
    }

    fn key(&self) -> Result<Option<ApiKey>, String> {
        let Some(name) = &self.api_key_env else { return Ok(None) };
        let key = std::env::var(name)
            .map_err(|error| format!("its key (`api_key_env`): environment variable {name}: {error}"))?;
        ApiKey::new(key).map(Some).map_err(|error| format!("environment variable {name}: {error}"))
    }

    pub(super) fn launch(&self) -> Result<Launched, SystemError> {
        let options = self.options().map_err(|e| start_error(NAME, e))?;
        let options = OpenAiOptions { api_key: self.key().map_err(|e| start_error(NAME, e))?, ..options };
        let clock = WallClock::start();
        let system = OpenAiServer::start(options, clock)?;
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}
