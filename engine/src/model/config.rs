//! What a model is: the numbers that its files state, checked before anything is built from them.

use quire_kernels::KvDtype;

use crate::EngineError;
use crate::model::{Architecture, Rope};

/// Slots are numbered in 32 bits, and the last number means none.
pub(crate) const MOST_KV_SLOTS: usize = u32::MAX as usize - 1;

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which of the family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements in a head; not always `hidden / heads`.
    pub head_dim: usize,
    /// Rows of the embedding: token ids are below it.
    pub vocab: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Epsilon of the norms.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// The output projection is the embedding.
    pub tied: bool,
    /// Q, K and V have biases.
    pub qkv_bias: bool,
    /// The attention's output projection has one.
    pub output_bias: bool,
    /// RMSNorm on each head of Q and K.
    pub qk_norm: bool,
    /// Tokens that attention sees, the row's own included, in every layer (sliding-window attention, as in Mistral 7B v0.1);
    /// none for the whole context. K and V of what a window has left behind keep their place in memory.
    pub window: Option<u32>,
}

impl ModelConfig {
    /// Checks every number against bounds that no model of the family comes near: what is computed from them then
    /// neither overflows nor surprises.
    ///
    /// # Errors
    /// What is wrong, naming the number.
    pub fn validate(&self) -> Result<(), String> {
        for (name, value, limit) in [
            ("hidden size", self.hidden, 1 << 17),
            ("feed-forward size", self.ffn, 1 << 20),
            ("layers", self.layers, 1 << 10),
            ("attention heads", self.heads, 1 << 10),
            ("key/value heads", self.kv_heads, 1 << 10),
            ("head size", self.head_dim, 1 << 10),
            ("vocabulary size", self.vocab, 1 << 22),
            ("context length", self.max_positions, 1 << 24),
        ] {
            if value == 0 || value > limit {
                return Err(format!("{name} is {value}; this engine takes 1 to {limit}"));
            }
        }
        // Their product says how wide rows of queries are, and how much memory each takes.
        let width = self.heads.max(self.kv_heads) * self.head_dim;
        if width > 1 << 17 {
            return Err(format!("heads of {width} elements together; this engine takes up to {}", 1 << 17));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} attention heads cannot share {} key/value heads evenly",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head size {} is odd: rotary embedding needs pairs", self.head_dim));
        }
        if self.window == Some(0) {
            return Err("a sliding window of 0 tokens sees nothing".into());
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(format!("the norms' epsilon is {}", self.rms_eps));
        }
        self.rope.validate(self.head_dim)
    }

    /// Columns of the fused query, key and value projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Parameters, embedding counted once when tied.
    pub fn parameters(&self) -> u64 {
        let wide = |n: usize| n as u64;
        let (hidden, attention) = (wide(self.hidden), wide(self.heads * self.head_dim));
        let mut layer = hidden * wide(self.qkv_width()) + attention * hidden + 3 * hidden * wide(self.ffn);
        layer += 2 * hidden;
        layer += if self.qkv_bias { wide(self.qkv_width()) } else { 0 };
        layer += if self.output_bias { hidden } else { 0 };
        layer += if self.qk_norm { 2 * wide(self.head_dim) } else { 0 };
        let embeddings = if self.tied { 1 } else { 2 };
        embeddings * wide(self.vocab) * hidden + wide(self.layers) * layer + hidden
    }

    /// Bytes of K and V that one token takes in all layers.
    pub fn kv_bytes_per_token(&self, dtype: KvDtype) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * dtype.bytes()
    }

    /// For how many tokens' K and V there is room in so many bytes, which an error calls `setting`.
    ///
    /// # Errors
    /// When that is no token, or more than can be numbered.
    pub fn kv_slots(&self, dtype: KvDtype, bytes: u64, setting: &str) -> Result<usize, EngineError> {
        let token = self.kv_bytes_per_token(dtype);
        let slots = usize::try_from(bytes / token as u64).unwrap_or(usize::MAX);
        if (1..=MOST_KV_SLOTS).contains(&slots) {
            return Ok(slots);
        }
        Err(EngineError::Config(format!(
            "{setting} is {bytes}, room for {slots} tokens: choose enough for 1 to {MOST_KV_SLOTS}; a token of this model takes {token} bytes"
        )))
    }

    /// The longest sequence: what was asked for, or by default what the model and its KV memory of `kv_slots` tokens allow.
    ///
    /// # Errors
    /// When none was asked for, or more than the model was made for.
    pub fn model_len(&self, asked: Option<usize>, kv_slots: usize) -> Result<usize, EngineError> {
        match asked {
            None => Ok(self.max_positions.min(kv_slots)),
            Some(len) if len == 0 || len > self.max_positions => Err(EngineError::Config(format!(
                "max_model_len is {len}: choose 1 to {}, the context that the model was made for",
                self.max_positions
            ))),
            Some(len) => Ok(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::dummy::DummyShape;

    #[test]
    fn parameters_of_known_shapes() {
        // The counts that the models' own pages state.
        assert_eq!(DummyShape::Smollm2_135m.config().parameters(), 134_515_008);
        assert_eq!(DummyShape::Llama32_1b.config().parameters(), 1_235_814_400);
        assert_eq!(DummyShape::Llama31_8b.config().parameters(), 8_030_261_248);
        assert_eq!(DummyShape::Llama31_70b.config().parameters(), 70_553_706_496);
        assert_eq!(DummyShape::Qwen3_06b.config().parameters(), 596_049_920);
    }

    #[test]
    fn kv_bytes_count_both_halves_of_all_layers() {
        let config = DummyShape::Smollm2_135m.config();
        assert_eq!(config.kv_bytes_per_token(quire_kernels::KvDtype::Bf16), 2 * 30 * 3 * 64 * 2);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let good = DummyShape::Smollm2_135m.config();
        let mut config = good.clone();
        config.kv_heads = 2;
        assert!(config.validate().unwrap_err().contains("evenly"));
        let mut config = good.clone();
        config.vocab = usize::MAX;
        assert!(config.validate().unwrap_err().contains("vocabulary"));
        let mut config = good.clone();
        (config.heads, config.kv_heads, config.head_dim) = (1024, 1024, 1024);
        assert!(
            config.validate().unwrap_err().contains("together"),
            "rows of gigabytes from a file of megabytes"
        );
        let mut config = good;
        config.head_dim = 63;
        assert!(config.validate().unwrap_err().contains("odd"));
    }
}
