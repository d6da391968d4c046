//! Hugging Face Transformers as a serving system.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use quire_baselines::transformers::{
    TorchDevice, TorchDtype, TransformersModel, TransformersOptions, TransformersServer,
};
use quire_engine::load::ModelSource;
use quire_engine::model::{Architecture, ModelConfig, RopeScaling, WeightDtype};
use quire_workloads::{SystemError, WallClock};
use serde::{Deserialize, Serialize};
use serde_json::json;

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
                config: hugging_face(&shape.config()).map_err(|e| start_error(NAME, e))?,
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

/// The `config.json` of a shape.
fn hugging_face(config: &ModelConfig) -> Result<String, String> {
    let (class, kind) = match config.architecture {
        Architecture::Llama => ("LlamaForCausalLM", "llama"),
        Architecture::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
        Architecture::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
    };
    let scaling = match &config.rope.scaling {
        RopeScaling::Default => json!(null),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": *original as u64,
        }),
        RopeScaling::Factors(_) => return Err("it does not know rotary factors from a GGUF file".into()),
    };
    let text = json!({
        "architectures": [class], "model_type": kind, "vocab_size": config.vocab, "hidden_size": config.hidden,
        "intermediate_size": config.ffn, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps, "rope_theta": config.rope.theta, "rope_scaling": scaling,
        "tie_word_embeddings": config.tied, "attention_bias": config.qkv_bias, "hidden_act": "silu",
    });
    Ok(text.to_string())
}
