//! The shape of a Llama-family model, as the baseline understands it.

use std::path::Path;

use serde::Deserialize;

use crate::BaselineError;

/// How rotary frequencies are stretched beyond the context the model was trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context the model was trained on before.
        original_max_position_embeddings: f64,
    },
}

/// The shape of a model: Llama, and with the switches Qwen2 and Qwen3.
#[derive(Debug, Clone, PartialEq)]
pub struct NaiveConfig {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The longest context the model was made for.
    pub max_position_embeddings: usize,
    /// The output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Query, key and value projections have a bias (Qwen2).
    pub attention_bias: bool,
    /// The output projection of attention has a bias too (Llama with `attention_bias`).
    pub attention_output_bias: bool,
    /// Queries and keys are normalised per head before rotation (Qwen3).
    pub qk_norm: bool,
}

impl NaiveConfig {
    /// Reads the text of a Hugging Face `config.json` of type llama, mistral (without sliding window), qwen2 or
    /// qwen3.
    ///
    /// # Errors
    /// When the text is no such configuration, or its numbers contradict each other.
    pub fn from_hf_json(text: &str) -> Result<Self, BaselineError> {
        let raw: HfConfig = serde_json::from_str(text).map_err(|e| BaselineError::Config(e.to_string()))?;
        raw.resolve()
    }

    /// Reads a Hugging Face `config.json`; see [`Self::from_hf_json`].
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn from_hf_file(path: &Path) -> Result<Self, BaselineError> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| BaselineError::File { path: path.to_owned(), reason: e.to_string() })?;
        Self::from_hf_json(&text)
            .map_err(|e| BaselineError::File { path: path.to_owned(), reason: e.to_string() })
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// When they do not, with the reason.
    pub fn validate(&self) -> Result<(), BaselineError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(BaselineError::Config(format!("{name} is 0")));
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(BaselineError::Config(format!(
                "{} query heads cannot share {} key and value heads evenly",
                self.num_heads, self.num_kv_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(BaselineError::Config(format!("head_dim {} is odd", self.head_dim)));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(BaselineError::Config(format!("rope_theta {} is not positive", self.rope_theta)));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(BaselineError::Config(format!("rms_norm_eps {} is negative", self.rms_norm_eps)));
        }
        Ok(())
    }

    /// Bytes that the K and V of one token take over all layers, in f32.
    pub fn kv_bytes_per_token(&self) -> u64 {
        let row = self.num_kv_heads as u64 * self.head_dim as u64;
        2 * self.num_layers as u64 * row * size_of::<f32>() as u64
    }
}

/// The fields of `config.json` that matter here; the rest is ignored, as Hugging Face does.
#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
}

/// `rope_scaling` of older files, `rope_parameters` of newer ones.
#[derive(Deserialize)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; files that were saved anew have both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl HfRope {
    fn scaling(&self) -> Result<Option<RopeScaling>, BaselineError> {
        let need = |value: Option<f64>, name: &str| match value {
            Some(v) if v.is_finite() && v > 0.0 => Ok(v),
            other => {
                Err(BaselineError::Config(format!("rope scaling needs a positive {name}, found {other:?}")))
            }
        };
        if self.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            return Err(BaselineError::Config("partial_rotary_factor is not supported".into()));
        }
        match self.rope_type.as_deref().or(self.older_type.as_deref()) {
            None if self.factor.is_some() => {
                Err(BaselineError::Config("rope scaling states a factor and no rope_type".into()))
            }
            None | Some("default") => Ok(None),
            Some("linear") => Ok(Some(RopeScaling::Linear { factor: need(self.factor, "factor")? })),
            Some("llama3") => Ok(Some(RopeScaling::Llama3 {
                factor: need(self.factor, "factor")?,
                low_freq_factor: need(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, "high_freq_factor")?,
                original_max_position_embeddings: need(
                    self.original_max_position_embeddings,
                    "original_max_position_embeddings",
                )?,
            })),
            Some(other) => Err(BaselineError::Config(format!("rope type {other:?} is not supported"))),
        }
    }
}

impl HfConfig {
    fn resolve(self) -> Result<NaiveConfig, BaselineError> {
        let (qkv_bias, output_bias, qk_norm) = match self.model_type.as_str() {
            "llama" => (self.attention_bias, self.attention_bias, false),
            "mistral" => (false, false, false),
            "qwen2" => (true, false, false),
            "qwen3" => (self.attention_bias, self.attention_bias, true),
            other => return Err(BaselineError::Config(format!("model_type {other:?} is not supported"))),
        };
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(BaselineError::Config(format!("hidden_act {act:?} is not supported")));
        }
        if self.mlp_bias {
            return Err(BaselineError::Config("mlp_bias is not supported".into()));
        }
        let slides = self.use_sliding_window.unwrap_or(self.model_type == "mistral");
        if let Some(window) = self.sliding_window.filter(|_| slides) {
            return Err(BaselineError::Config(format!("a sliding window ({window}) is not supported")));
        }
        if self.num_attention_heads == 0 {
            return Err(BaselineError::Config("num_attention_heads is 0".into()));
        }
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let config = NaiveConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads),
            rope_theta: rope.and_then(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0),
            rope_scaling: rope.map(HfRope::scaling).transpose()?.flatten(),
            rms_norm_eps: self.rms_norm_eps,
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings,
            attention_bias: qkv_bias,
            attention_output_bias: output_bias,
            qk_norm,
        };
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": true, ROPE}"#;

    #[test]
    fn both_spellings_of_rope_are_read() {
        let old = LLAMA.replace(
            "ROPE",
            r#""rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
        );
        let new = LLAMA.replace(
            "ROPE",
            r#""rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
        );
        let old = NaiveConfig::from_hf_json(&old).unwrap();
        assert_eq!(old, NaiveConfig::from_hf_json(&new).unwrap());
        assert_eq!(old.rope_theta, 5e5);
        let both = LLAMA
            .replace("ROPE", r#""rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}"#);
        let both = NaiveConfig::from_hf_json(&both).unwrap();
        assert!(matches!(both.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 })));
        assert!(matches!(old.rope_scaling, Some(RopeScaling::Llama3 { factor: 32.0, .. })));
        assert_eq!(old.kv_bytes_per_token(), 2 * 2 * 2 * 16 * 4);
    }

    #[test]
    fn what_cannot_be_run_is_refused_with_the_reason() {
        let cases = [
            (r#""rope_scaling": {"type": "yarn", "factor": 2.0}"#, "yarn"),
            (r#""rope_scaling": {"type": "linear"}"#, "factor"),
            (r#""rope_scaling": {"factor": 2.0}"#, "rope_type"),
            (
                r#""rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}"#,
                "partial_rotary_factor",
            ),
            (r#""hidden_act": "gelu""#, "gelu"),
            (r#""head_dim": 7"#, "odd"),
        ];
        for (extra, word) in cases {
            let error = NaiveConfig::from_hf_json(&LLAMA.replace("ROPE", extra)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let gpt = LLAMA.replace("llama", "gpt2").replace(", ROPE", "");
        assert!(NaiveConfig::from_hf_json(&gpt).unwrap_err().to_string().contains("gpt2"));
    }
}
