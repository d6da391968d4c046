//! The engine's weights as the naive server wants them: f32, by Hugging Face name.

use quire_baselines::naive::{NaiveConfig, NaiveModel};
use quire_engine::load::Checkpoint;
use quire_engine::model::{LayerWeight, ModelConfig, RopeScaling, WeightRole};
use quire_kernels::quant;
use quire_workloads::SystemError;

use super::start_error;

/// Builds the naive model from an opened one.
pub(super) fn build(checkpoint: &Checkpoint) -> Result<NaiveModel, SystemError> {
    let config = naive_config(&checkpoint.config).map_err(|e| start_error("naive", e))?;
    // The model asks by name and takes plain numbers; what went wrong is kept beside.
    let mut failure = None;
    let built = NaiveModel::from_tensors(config, |name| {
        tensor(checkpoint, name).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            Vec::new()
        })
    });
    match failure {
        Some(error) => Err(start_error("naive", error)),
        None => built.map_err(|e| start_error("naive", e)),
    }
}

fn naive_config(config: &ModelConfig) -> Result<NaiveConfig, String> {
    use quire_baselines::naive::RopeScaling as Naive;
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Default => None,
        RopeScaling::Linear { factor } => Some(Naive::Linear { factor: f64::from(factor) }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => Some(Naive::Llama3 {
            factor: f64::from(factor),
            low_freq_factor: f64::from(low_freq_factor),
            high_freq_factor: f64::from(high_freq_factor),
            original_max_position_embeddings: f64::from(original),
        }),
        RopeScaling::Factors(_) => {
            return Err(
                "it does not know rotary factors from a GGUF file; use the Hugging Face folder".into()
            );
        }
    };
    if config.window.is_some() {
        return Err("it does not know sliding-window attention".into());
    }
    Ok(NaiveConfig {
        vocab_size: config.vocab,
        hidden_size: config.hidden,
        intermediate_size: config.ffn,
        num_layers: config.layers,
        num_heads: config.heads,
        num_kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        rope_theta: f64::from(config.rope.theta),
        rope_scaling,
        rms_norm_eps: f64::from(config.rms_eps),
        max_position_embeddings: config.max_positions,
        tie_word_embeddings: config.tied,
        attention_bias: config.qkv_bias,
        attention_output_bias: config.output_bias,
        qk_norm: config.qk_norm,
    })
}

/// The numbers of a tensor by its Hugging Face name.
fn tensor(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, String> {
    let c = &checkpoint.config;
    let role = role(name).ok_or_else(|| format!("it asks for `{name}`, which the engine does not know"))?;
    let (rows, cols) = match role {
        WeightRole::Embedding | WeightRole::OutputHead => (c.vocab, c.hidden),
        WeightRole::FinalNorm => (c.hidden, 0),
        WeightRole::Layer(_, weight) => match weight {
            LayerWeight::AttentionNorm | LayerWeight::FfnNorm | LayerWeight::OutputBias => (c.hidden, 0),
            LayerWeight::Query => (c.heads * c.head_dim, c.hidden),
            LayerWeight::Key | LayerWeight::Value => (c.kv_heads * c.head_dim, c.hidden),
            LayerWeight::QueryBias => (c.heads * c.head_dim, 0),
            LayerWeight::KeyBias | LayerWeight::ValueBias => (c.kv_heads * c.head_dim, 0),
            LayerWeight::QueryNorm | LayerWeight::KeyNorm => (c.head_dim, 0),
            LayerWeight::Output => (c.hidden, c.heads * c.head_dim),
            LayerWeight::Gate | LayerWeight::Up => (c.ffn, c.hidden),
            LayerWeight::Down => (c.hidden, c.ffn),
        },
    };
    if cols == 0 {
        return checkpoint.weights.vector(role, rows).map_err(|e| e.to_string());
    }
    let matrix = checkpoint.weights.matrix(role, rows, cols).map_err(|e| e.to_string())?;
    let mut numbers = vec![0.0; rows * cols];
    quant::dequantize(matrix.format, &matrix.bytes, &mut numbers).map_err(|e| e.to_string())?;
    Ok(numbers)
}

fn role(name: &str) -> Option<WeightRole> {
    match name {
        "model.embed_tokens.weight" => return Some(WeightRole::Embedding),
        "model.norm.weight" => return Some(WeightRole::FinalNorm),
        "lm_head.weight" => return Some(WeightRole::OutputHead),
        _ => {}
    }
    let (layer, weight) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let weight = match weight {
        "input_layernorm.weight" => LayerWeight::AttentionNorm,
        "self_attn.q_proj.weight" => LayerWeight::Query,
        "self_attn.k_proj.weight" => LayerWeight::Key,
        "self_attn.v_proj.weight" => LayerWeight::Value,
        "self_attn.q_proj.bias" => LayerWeight::QueryBias,
        "self_attn.k_proj.bias" => LayerWeight::KeyBias,
        "self_attn.v_proj.bias" => LayerWeight::ValueBias,
        "self_attn.q_norm.weight" => LayerWeight::QueryNorm,
        "self_attn.k_norm.weight" => LayerWeight::KeyNorm,
        "self_attn.o_proj.weight" => LayerWeight::Output,
        "self_attn.o_proj.bias" => LayerWeight::OutputBias,
        "post_attention_layernorm.weight" => LayerWeight::FfnNorm,
        "mlp.gate_proj.weight" => LayerWeight::Gate,
        "mlp.up_proj.weight" => LayerWeight::Up,
        "mlp.down_proj.weight" => LayerWeight::Down,
        _ => return None,
    };
    Some(WeightRole::Layer(layer.parse().ok()?, weight))
}
