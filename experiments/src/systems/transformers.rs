//! Hugging Face Transformers as a serving system: its static batches, or its own continuous batching.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quire_baselines::transformers::{
    TorchDevice, TorchDtype, TransformersBatching, TransformersModel, TransformersOptions, TransformersServer,
};
use quire_engine::load::{ModelSource, config_to_json};
use quire_engine::model::WeightDtype;
use quire_workloads::{SystemError, WallClock};
use serde::{Deserialize, Serialize};

use super::{Launched, start_error};
use crate::config::Device;
use crate::config::KvPrecision;
use crate::settings::Settings;

const NAME: &str = "transformers";

/// Settings of the Transformers server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformersSystem {
    /// The Python interpreter, a path or a name to be found in `PATH`.
    #[serde(default = "python")]
    pub python: PathBuf,
    /// How requests are batched.
    pub batching: Batching,
    /// Where it computes; on the experiment's device when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<TorchDevice>,
    /// Precision of weights, activations and KV; that of the experiment's weights when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<TorchDtype>,
}

/// How requests are batched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Batching {
    /// `model.generate` on one padded batch after another.
    Static {
        /// Requests in a batch.
        batch_size: u32,
        /// How long the oldest request waits for a batch to fill, milliseconds.
        timeout_ms: u64,
    },
    /// Transformers' own continuous batching over a paged cache of the experiment's `kv_bytes`.
    Continuous {
        /// Tokens in a pass.
        token_budget: u32,
        /// Requests in a pass.
        max_running: u32,
        /// Tokens in a block of the cache.
        block_size: u32,
    },
}

impl From<Batching> for TransformersBatching {
    fn from(batching: Batching) -> Self {
        match batching {
            Batching::Static { batch_size, timeout_ms } => {
                Self::Static { batch_size: batch_size as usize, timeout: Duration::from_millis(timeout_ms) }
            }
            Batching::Continuous { token_budget, max_running, block_size } => Self::Continuous {
                token_budget: token_budget as usize,
                max_running: max_running as usize,
                block_size: block_size as usize,
            },
        }
    }
}

fn python() -> PathBuf {
    "python3".into()
}

impl TransformersSystem {
    pub(super) fn check(&self) -> Result<(), String> {
        TransformersBatching::from(self.batching).check()
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
        let dtype = match (self.dtype, settings.weights) {
            (Some(dtype), _) => dtype,
            (None, WeightDtype::F32) => TorchDtype::Float32,
            (None, WeightDtype::Bf16) => TorchDtype::Bfloat16,
            (None, WeightDtype::F16) => TorchDtype::Float16,
            (None, other) => {
                let reason = format!(
                    "it has no {other} weights: set `weights` to \"f32\", \"bf16\" or \"f16\", or its own `dtype`"
                );
                return Err(start_error(NAME, reason));
            }
        };
        // Its cache is of its dtype.
        let held = match dtype {
            TorchDtype::Float32 => KvPrecision::F32,
            TorchDtype::Bfloat16 => KvPrecision::Bf16,
            TorchDtype::Float16 => KvPrecision::F16,
        };
        if settings.kv_dtype != held {
            let (asked, held) = (settings.kv_dtype.name(), held.name());
            let reason =
                format!("it holds KV as it computes, in {held}, and `kv_dtype` is {asked}: make them equal");
            return Err(start_error(NAME, reason));
        }
        let options = TransformersOptions {
            python: self.python.clone(),
            dtype,
            device: self.device.unwrap_or(match settings.device {
                Device::Cpu => TorchDevice::Cpu,
                Device::Cuda => TorchDevice::Cuda,
            }),
            threads: usize::from(settings.threads),
            batching: self.batching.into(),
            max_model_len: Some(settings.max_model_len as usize),
            kv_bytes: Some(settings.kv_bytes),
            ..TransformersOptions::new(model)
        };
        let clock = WallClock::start();
        let system = TransformersServer::start(&options, clock)?;
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}
