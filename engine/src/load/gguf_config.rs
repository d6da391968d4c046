//! A model's configuration from GGUF metadata.

use quire_kernels::WeightFormat;

use crate::load::GgufHeader;
use crate::model::{Architecture, ModelConfig, Rope, RopeScaling};

/// The configuration stated by `header`, whose file has the bytes `file`.
///
/// # Errors
/// When something is missing, contradictory, or not supported.
pub fn config_from_gguf(header: &GgufHeader, file: &[u8]) -> Result<ModelConfig, String> {
    let name =
        header.text("general.architecture")?.ok_or("there is no metadata key 'general.architecture'")?;
    let architecture = Architecture::of_gguf(name)?;
    let keys = Keys { header, architecture: name };
    if keys.size("expert_count")?.unwrap_or(0) > 0 {
        return Err("mixture-of-experts models are not supported".into());
    }
    if keys.size("attention.sliding_window")?.unwrap_or(0) > 0 {
        return Err(
            "sliding-window attention of GGUF files is not supported; use the Hugging Face folder".into()
        );
    }
    let hidden = keys.needed("embedding_length")?;
    let heads = keys.needed("attention.head_count")?;
    if heads == 0 {
        return Err(format!("metadata key '{name}.attention.head_count' is 0"));
    }
    let head_dim = keys.size("attention.key_length")?.unwrap_or(hidden / heads);
    for (key, what) in [("attention.value_length", "values"), ("rope.dimension_count", "the rotated part")] {
        if let Some(other) = keys.size(key)?.filter(|&other| other != head_dim) {
            return Err(format!("heads have {head_dim} elements, but {what} {other}: that is not supported"));
        }
    }
    let embedding = header.tensors.get("token_embd.weight").ok_or("tensor 'token_embd.weight' is missing")?;
    let config = ModelConfig {
        architecture,
        hidden,
        ffn: keys.needed("feed_forward_length")?,
        layers: keys.needed("block_count")?,
        heads,
        kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab: embedding.rows,
        max_positions: keys.needed("context_length")?,
        rms_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| format!("there is no metadata key '{name}.attention.layer_norm_rms_epsilon'"))?,
        rope: Rope {
            theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            scaling: rope_scaling(&keys, file)?,
        },
        tied: !header.tensors.contains_key("output.weight"),
        qkv_bias: header.tensors.contains_key("blk.0.attn_q.bias"),
        output_bias: header.tensors.contains_key("blk.0.attn_output.bias"),
        qk_norm: header.tensors.contains_key("blk.0.attn_q_norm.weight"),
        window: None,
    };
    if header.tensors.contains_key("blk.0.ffn_gate.bias") {
        return Err("biases in the feed-forward layer are not supported".into());
    }
    config.validate()?;
    Ok(config)
}

fn rope_scaling(keys: &Keys<'_>, file: &[u8]) -> Result<RopeScaling, String> {
    // As llama.cpp reads it: linear where no type is stated, by the older key's factor where the newer one is not there, and not
    // at all by a factor of 0.
    let kind = keys.header.text(&keys.key("rope.scaling.type"))?.unwrap_or("linear");
    let factor = match keys.float("rope.scaling.factor")? {
        None => keys.float("rope.scale_linear")?,
        newer => newer,
    };
    let scaling = match (kind, factor) {
        ("none", _) | ("linear", None | Some(0.0 | 1.0)) => RopeScaling::Default,
        ("linear", Some(factor)) => RopeScaling::Linear { factor },
        _ => {
            return Err(format!(
                "rope scaling '{kind}' is not supported; none and linear are (Llama 3's is tensor 'rope_freqs.weight')"
            ));
        }
    };
    let Some(tensor) = keys.header.tensors.get("rope_freqs.weight") else { return Ok(scaling) };
    if scaling != RopeScaling::Default {
        return Err("rope scaling is stated twice: as linear and by tensor 'rope_freqs.weight'".into());
    }
    if tensor.format != WeightFormat::F32 || tensor.rows != 1 {
        return Err("tensor 'rope_freqs.weight' is not a vector of F32".into());
    }
    let bytes = &file[tensor.bytes.clone()];
    let factors = bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().expect("chunks are of four")))
        .collect();
    Ok(RopeScaling::Factors(factors))
}

/// Metadata under the architecture's prefix.
struct Keys<'a> {
    header: &'a GgufHeader,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn size(&self, name: &str) -> Result<Option<usize>, String> {
        let value = self.header.unsigned(&self.key(name))?;
        Ok(value.map(|n| usize::try_from(n).unwrap_or(usize::MAX)))
    }

    fn needed(&self, name: &str) -> Result<usize, String> {
        self.size(name)?.ok_or_else(|| format!("there is no metadata key '{}'", self.key(name)))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, String> {
        Ok(self.header.float(&self.key(name))?.map(|value| value as f32))
    }
}
