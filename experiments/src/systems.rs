//! The systems under test, behind `ServingSystem`: which there are, and how each is started.

mod engine;
mod model;
mod naive;
mod naive_model;
mod openai;
mod outputs;
mod shape;
mod transformers;

use std::sync::Arc;

use quire_engine::EngineParts;
use quire_workloads::{Clock, Decoding, ServingSystem, SystemError};
use serde::{Deserialize, Serialize};

pub use engine::EngineSystem;
pub use model::Models;
pub(crate) use model::StartListener;
pub use naive::NaiveSystem;
pub use openai::OpenAiSystem;
pub use transformers::{Batching, TransformersSystem};

use crate::settings::Settings;

const EXTERNAL: &str = "it is external: only a program that gives it (Experiment::external) can run it";

/// What serves: the switch behind each line of a figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SystemConfig {
    /// The engine of this project.
    Engine(EngineSystem),
    /// What people write first: static batches on candle.
    Naive(NaiveSystem),
    /// Hugging Face Transformers in a Python process.
    Transformers(TransformersSystem),
    /// A server that runs elsewhere and speaks OpenAI's completions over HTTP.
    #[serde(rename = "openai")]
    OpenAi(OpenAiSystem),
    /// Given by the program that runs the experiment, see [`crate::Experiment::external`].
    External {},
}

/// A system that runs, and the clock its events are timed by.
pub struct Launched {
    /// The system.
    pub system: Box<dyn ServingSystem>,
    /// Its clock; the load generator's too.
    pub clock: Arc<dyn Clock>,
}

/// Starts a system that is not one of this crate's: a policy of one's own, a server elsewhere, a script.
pub trait SystemFactory {
    /// Starts it anew, cold, for one cell.
    ///
    /// # Errors
    /// When it cannot be started.
    fn launch(&mut self, settings: &Settings) -> Result<Launched, SystemError>;
}

impl<F: FnMut(&Settings) -> Result<Launched, SystemError>> SystemFactory for F {
    fn launch(&mut self, settings: &Settings) -> Result<Launched, SystemError> {
        self(settings)
    }
}

impl SystemConfig {
    /// Checks what types cannot say.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            SystemConfig::Engine(engine) => engine.check(),
            SystemConfig::Naive(naive) => naive.check(),
            SystemConfig::Transformers(transformers) => transformers.check(),
            SystemConfig::OpenAi(server) => server.check(),
            SystemConfig::External {} => Ok(()),
        }
    }

    /// Checks that it gives what is wanted of a prompt.
    pub(crate) fn check_decoding(&self, decoding: Decoding) -> Result<(), String> {
        match self {
            SystemConfig::Engine(engine) => engine.check_decoding(decoding),
            SystemConfig::External {} => Ok(()),
            _ if decoding.is_single() => Ok(()),
            _ => Err("it gives one output of a prompt, and a panel's `decoding` asks for several".into()),
        }
    }

    /// Checks that conversations can go on with its answers.
    pub(crate) fn check_conversations(&self) -> Result<(), String> {
        match self {
            SystemConfig::OpenAi(server) => server.check_conversations(),
            _ => Ok(()),
        }
    }

    /// What a reader of results must know about it.
    pub(crate) fn label(&self) -> Option<&'static str> {
        match self {
            SystemConfig::External {} => Some("external to this project"),
            SystemConfig::OpenAi(_) => Some(
                "a server elsewhere over HTTP: its model, machine and memory are its own, it is not restarted between cells, \
                 and what it caches is warm",
            ),
            SystemConfig::Engine(engine) if engine.has_external_parts() => {
                Some("its policy or drafter is external to this project")
            }
            SystemConfig::Engine(engine) if engine.is_synthetic() => {
                Some("synthetic acceptance of proposed tokens, its outputs mean nothing")
            }
            _ => None,
        }
    }

    /// Checks, without starting it, what would keep it from starting; with `own_parts`, its parts are the program's.
    pub(crate) fn check_start(
        &self,
        settings: &Settings,
        models: &mut Models,
        own_parts: bool,
    ) -> Result<(), String> {
        match self {
            SystemConfig::Engine(_) if own_parts => Ok(()),
            SystemConfig::Engine(engine) => shape::check(engine, settings, models).map_err(|e| e.to_string()),
            SystemConfig::OpenAi(server) => server.check_key(),
            SystemConfig::External {} => Err(EXTERNAL.into()),
            SystemConfig::Naive(_) | SystemConfig::Transformers(_) => Ok(()),
        }
    }

    /// Starts a system of this crate.
    pub(crate) fn launch(&self, settings: &Settings, models: &mut Models) -> Result<Launched, SystemError> {
        match self {
            SystemConfig::Engine(engine) => engine.launch(settings, models, EngineParts::default()),
            SystemConfig::Naive(naive) => naive.launch(settings, models),
            SystemConfig::Transformers(transformers) => transformers.launch(settings),
            SystemConfig::OpenAi(server) => server.launch(),
            SystemConfig::External {} => Err(start_error("external", EXTERNAL)),
        }
    }
}

/// An error of starting `system`.
pub(crate) fn start_error(system: &str, reason: impl std::fmt::Display) -> SystemError {
    SystemError::Start { system: system.to_string(), reason: reason.to_string() }
}
