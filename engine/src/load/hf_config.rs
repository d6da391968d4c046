//! A model's configuration from a Hugging Face `config.json`.

use serde::Deserialize;
use serde_json::Value;

use crate::model::architecture::{Facts, Windows};
use crate::model::{Architecture, ModelConfig, Rope, RopeScaling};

/// The fields of `config.json` that the family uses. Others are the training's, or another family's.
#[derive(Deserialize)]
struct Json {
    architectures: Option<Vec<String>>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<RopeJson>,
    rope_parameters: Option<RopeJson>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<u64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RopeJson {
    rope_type: Option<String>,
    /// The older name of `rope_type`; files that were saved anew have both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
    partial_rotary_factor: Option<f32>,
}

/// The configuration stated by the text of a `config.json`.
///
/// # Errors
/// When something is missing, contradictory, or not supported.
pub fn config_from_json(text: &[u8]) -> Result<ModelConfig, String> {
    let json: Json = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let architecture = architecture(&json)?;
    refuse_unsupported(&json)?;
    if json.num_attention_heads == 0 {
        return Err("num_attention_heads is 0".into());
    }
    let facts = architecture.facts();
    let attention_bias = json.attention_bias.unwrap_or(false);
    let config = ModelConfig {
        architecture,
        hidden: json.hidden_size,
        ffn: json.intermediate_size,
        layers: json.num_hidden_layers,
        heads: json.num_attention_heads,
        kv_heads: json.num_key_value_heads.unwrap_or(json.num_attention_heads),
        head_dim: json.head_dim.unwrap_or(json.hidden_size / json.num_attention_heads),
        vocab: json.vocab_size,
        max_positions: json.max_position_embeddings,
        rms_eps: json.rms_norm_eps,
        rope: rope(&json)?,
        tied: json.tie_word_embeddings.unwrap_or(false),
        qkv_bias: facts.qkv_bias || attention_bias,
        output_bias: !facts.qkv_bias && attention_bias,
        qk_norm: facts.qk_norm,
        window: window(&json, facts)?,
    };
    config.validate()?;
    Ok(config)
}

fn architecture(json: &Json) -> Result<Architecture, String> {
    let names = json.architectures.as_deref().unwrap_or_default();
    match names {
        [name] => Architecture::of_class(name),
        _ => Err(format!("'architectures' must name one architecture; it is {names:?}")),
    }
}

fn window(json: &Json, facts: Facts) -> Result<Option<u32>, String> {
    let used = json.use_sliding_window.unwrap_or(facts.windows != Windows::SomeLayersIfUsed);
    let sliding = |layer: &String| layer == "sliding_attention";
    let layers = json.layer_types.as_deref().unwrap_or_default();
    match json.sliding_window {
        Some(window) if facts.windows == Windows::AllLayers && used && layers.iter().all(sliding) => {
            // A window that no position lies beyond is none.
            let beyond = (window as usize) < json.max_position_embeddings;
            u32::try_from(window)
                .map(|w| Some(w).filter(|_| beyond))
                .map_err(|e| format!("sliding_window: {e}"))
        }
        Some(_) if used => Err(MIXED.into()),
        _ if layers.iter().any(sliding) => Err(MIXED.into()),
        _ => Ok(None),
    }
}

const MIXED: &str =
    "sliding-window attention is supported of MistralForCausalLM, in all layers alike, and not of this model";

fn refuse_unsupported(json: &Json) -> Result<(), String> {
    let known = |kind: &String| ["full_attention", "sliding_attention"].contains(&kind.as_str());
    if let Some(other) = json.layer_types.iter().flatten().find(|kind| !known(kind)) {
        return Err(format!("layers of '{other}' are not supported"));
    }
    if json.mlp_bias == Some(true) {
        return Err("biases in the feed-forward layer ('mlp_bias') are not supported".into());
    }
    if let Some(act) = json.hidden_act.as_deref().filter(|&act| act != "silu") {
        return Err(format!("activation '{act}' is not supported; 'silu' is"));
    }
    // Newer files have it among those of the rotation.
    let ropes = [&json.rope_parameters, &json.rope_scaling].into_iter().flatten();
    let parts = ropes.map(|rope| rope.partial_rotary_factor).chain([json.partial_rotary_factor]);
    if parts.flatten().any(|factor| factor != 1.0) {
        return Err("rotating only a part of each head ('partial_rotary_factor') is not supported".into());
    }
    if json.quantization_config.is_some() {
        return Err(
            "quantized checkpoints ('quantization_config') are not supported; use GGUF for those".into()
        );
    }
    Ok(())
}

/// Rotary embedding, in the older spelling (`rope_theta` beside `rope_scaling`) or the newer (`rope_parameters`).
fn rope(json: &Json) -> Result<Rope, String> {
    let stated = json.rope_parameters.as_ref().or(json.rope_scaling.as_ref());
    let theta = stated.and_then(|r| r.rope_theta).or(json.rope_theta).unwrap_or(10_000.0);
    let Some(rope) = stated else { return Ok(Rope { theta, scaling: RopeScaling::Default }) };
    let need =
        |value: Option<f32>, name: &str| value.ok_or_else(|| format!("rope scaling states no '{name}'"));
    let kind = rope.rope_type.as_deref().or(rope.older_type.as_deref());
    if kind.is_none() && rope.factor.is_some() {
        return Err("rope scaling states a 'factor' and no 'rope_type'".into());
    }
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need(rope.factor, "factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need(rope.factor, "factor")?,
            low_freq_factor: need(rope.low_freq_factor, "low_freq_factor")?,
            high_freq_factor: need(rope.high_freq_factor, "high_freq_factor")?,
            original: need(rope.original_max_position_embeddings, "original_max_position_embeddings")?,
        },
        other => {
            return Err(format!("rope scaling '{other}' is not supported; default, linear and llama3 are"));
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        })
    }

    fn with(key: &str, value: Value) -> Result<ModelConfig, String> {
        let mut json = base();
        json[key] = value;
        config_from_json(json.to_string().as_bytes())
    }

    #[test]
    fn old_and_new_rope_spellings_agree() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let old = with("rope_scaling", scaling.clone()).unwrap();
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(10000.0);
        assert_eq!(with("rope_parameters", parameters).unwrap().rope, old.rope);
        assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { .. }));
    }

    #[test]
    fn both_names_of_the_rope_type_may_be_there() {
        let both = json!({"rope_type": "linear", "type": "linear", "factor": 2.0});
        assert_eq!(with("rope_scaling", both).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
        let older = json!({"type": "linear", "factor": 2.0});
        assert_eq!(with("rope_scaling", older).unwrap().rope.scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (key, value, expected) in [
            ("architectures", json!(["MixtralForCausalLM"]), "MixtralForCausalLM"),
            ("sliding_window", json!(4096), "sliding-window"),
            ("layer_types", json!(["full_attention", "sliding_attention"]), "sliding-window"),
            ("rope_scaling", json!({"type": "yarn", "factor": 2.0}), "'yarn'"),
            ("rope_scaling", json!({"type": "linear"}), "'factor'"),
            ("rope_scaling", json!({"factor": 4.0}), "no 'rope_type'"),
            (
                "rope_parameters",
                json!({"rope_type": "default", "partial_rotary_factor": 0.5}),
                "partial_rotary_factor",
            ),
            ("hidden_act", json!("gelu"), "'gelu'"),
            ("mlp_bias", json!(true), "mlp_bias"),
            ("quantization_config", json!({"bits": 4}), "GGUF"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("hidden_size", json!(1u64 << 40), "hidden size"),
            ("vocab_size", json!(-1), "invalid value"),
        ] {
            let error = with(key, value).unwrap_err();
            assert!(error.contains(expected), "{key}: {error}");
        }
    }

    #[test]
    fn mistrals_layers_have_one_window() {
        let of = |changes: Value| {
            let mut json = base();
            json["architectures"] = json!(["MistralForCausalLM"]);
            changes.as_object().unwrap().iter().for_each(|(key, value)| json[key] = value.clone());
            config_from_json(json.to_string().as_bytes()).map(|config| config.window)
        };
        assert_eq!(of(json!({"sliding_window": 128})), Ok(Some(128)));
        assert_eq!(of(json!({"sliding_window": null})), Ok(None));
        assert_eq!(of(json!({"sliding_window": 512})), Ok(None), "as long as the model's context");
        assert!(of(json!({"sliding_window": 0})).unwrap_err().contains("sees nothing"));
        let layers = json!(["full_attention", "sliding_attention"]);
        assert!(
            of(json!({"sliding_window": 128, "layer_types": layers})).unwrap_err().contains("all layers")
        );
    }

    #[test]
    fn qwen_has_biases_and_an_unused_window() {
        let mut json = base();
        json["architectures"] = json!(["Qwen2ForCausalLM"]);
        json["sliding_window"] = json!(32768);
        json["use_sliding_window"] = json!(false);
        let config = config_from_json(json.to_string().as_bytes()).unwrap();
        assert!(config.qkv_bias && !config.output_bias && !config.qk_norm);
    }
}
