//! Hugging Face Transformers as a serving system.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quire_baselines::transformers::{
    TorchDevice, TorchDtype, TransformersModel, TransformersOptions, TransformersServer,
};
use quire_engine::load::{ModelSource, config_to_json};
use quire_engine::model::WeightDtype;
use quire_workloads::{SystemError, WallClock};
use serde::{Deserialize, Serialize};

use super::{Launched, start_error};
use crate::config::Device;
use crate::settings::Settings;

const NAME: &str = "transformers";

/// Settings of the Transformers server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformersSystem {
    /// The Python interpreter, a path or a name to be found in `PATH`.
    #[serde(default = "python")]
    pub python: PathBuf,
    /// Requests in a batch.
    pub batch_size: u32,
    /// How long the oldest request waits for a batch to fill, milliseconds.
    pub timeout_ms: u64,
}

fn python() -> PathBuf {
    "python3".into()
}

impl TransformersSystem {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.batch_size == 0 { Err("`batch_size` must be 1 or more".into()) } else { Ok(()) }
    }

    pub(super) fn launch(&self, settings: &Settings) -> Result<Launched, SystemError> {
        let source = ModelSource::parse(&settings.model).map_err(|e| start_error(NAME, e))?;
        let model = match source {
            ModelSource::Folder(path) => TransformersModel::Folder(path),
            ModelSource::Dummy { shape, seed } => TransformersModel::Dummy {
                config: config_to_json(&shape.config()).map_err(|e| start_error(NAME, e))?,
                seed: u32::try_from(seed).map_err(|_| start_error(NAME, "its seed has 32 bits"))?,
            },
            ModelSource::Gguf(_) => {
                return Err(start_error(NAME, "it reads Hugging Face folders, not GGUF files"));
            }
        };
        let dtype = match settings.weights {
            WeightDtype::F32 => TorchDtype::Float32,
            WeightDtype::Bf16 => TorchDtype::Bfloat16,
            other => {
                let reason = format!("it has no {other} weights: set `weights` to \"f32\" or \"bf16\"");
                return Err(start_error(NAME, reason));
            }
        };
        let options = TransformersOptions {
            python: self.python.clone(),
            dtype,
            device: match settings.device {
                Device::Cpu => TorchDevice::Cpu,
                Device::Cuda => TorchDevice::Cuda,
            },
            threads: usize::from(settings.threads),
            batch_size: self.batch_size as usize,
            batch_timeout: Duration::from_millis(self.timeout_ms),
            max_model_len: Some(settings.max_model_len as usize),
            kv_bytes: Some(settings.kv_bytes),
            ..TransformersOptions::new(model)
        };
        let clock = WallClock::start();
        let system = TransformersServer::start(&options, clock)?;
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}
