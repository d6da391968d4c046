//! One transformer layer, written with candle's own operations.

use candle_core::{D, Module, Result as CandleResult, Tensor};
use candle_nn::{Linear, RmsNorm, ops, rotary_emb};

use super::NaiveConfig;
use super::weights::Weights;
use crate::BaselineError;

/// K and V of one layer for the whole batch, `[batch, kv_heads, tokens, head_dim]`; `None` before the first pass.
pub(super) type LayerKv = Option<(Tensor, Tensor)>;

/// What every layer of one forward pass shares.
pub(super) struct Pass<'a> {
    /// Cosines of each token's position, `[batch, tokens, head_dim / 2]`.
    pub(super) cos: &'a Tensor,
    /// Sines, likewise.
    pub(super) sin: &'a Tensor,
    /// Added to the scores: `[batch, 1, tokens, context]`.
    pub(super) mask: &'a Tensor,
}

struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

pub(super) struct Layer {
    input_norm: RmsNorm,
    attention: Attention,
    post_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Attention {
    fn load(config: &NaiveConfig, prefix: &str, weights: &mut Weights<'_>) -> Result<Self, BaselineError> {
        let (hidden, dim) = (config.hidden_size, config.head_dim);
        let (q_rows, kv_rows) = (config.num_heads * dim, config.num_kv_heads * dim);
        let bias = config.attention_bias;
        let name = |part: &str| format!("{prefix}.{part}");
        let mut norm = |part: &str| -> Result<_, BaselineError> {
            config.qk_norm.then(|| weights.norm(&name(part), dim, config.rms_norm_eps)).transpose()
        };
        let (q_norm, k_norm) = (norm("q_norm")?, norm("k_norm")?);
        Ok(Self {
            q: weights.linear(&name("q_proj"), q_rows, hidden, bias)?,
            k: weights.linear(&name("k_proj"), kv_rows, hidden, bias)?,
            v: weights.linear(&name("v_proj"), kv_rows, hidden, bias)?,
            o: weights.linear(&name("o_proj"), hidden, q_rows, config.attention_output_bias)?,
            q_norm,
            k_norm,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: dim,
        })
    }

    /// `[batch, tokens, heads * head_dim]` to `[batch, heads, tokens, head_dim]`.
    fn split(&self, x: Tensor, heads: usize, norm: Option<&RmsNorm>) -> CandleResult<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let x = x.reshape((batch, tokens, heads, self.head_dim))?;
        let x = match norm {
            Some(norm) => norm.forward(&x)?,
            None => x,
        };
        x.transpose(1, 2)?.contiguous()
    }

    fn forward(&self, x: &Tensor, pass: &Pass<'_>, kv: &mut LayerKv) -> CandleResult<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let q = self.split(self.q.forward(x)?, self.heads, self.q_norm.as_ref())?;
        let k = self.split(self.k.forward(x)?, self.kv_heads, self.k_norm.as_ref())?;
        let v = self.split(self.v.forward(x)?, self.kv_heads, None)?;
        let q = rotary_emb::rope(&q, pass.cos, pass.sin)?;
        let k = rotary_emb::rope(&k, pass.cos, pass.sin)?;
        let (k, v) = match kv.take() {
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, &k], 2)?, Tensor::cat(&[&old_v, &v], 2)?),
            None => (k, v),
        };
        *kv = Some((k.clone(), v.clone()));
        let k = repeat_kv(k, self.heads / self.kv_heads)?;
        let v = repeat_kv(v, self.heads / self.kv_heads)?;
        let scores = (q.matmul(&k.t()?)? * (self.head_dim as f64).powf(-0.5))?;
        let weights = ops::softmax_last_dim(&scores.broadcast_add(pass.mask)?)?;
        let out = weights.matmul(&v)?.transpose(1, 2)?.reshape((batch, tokens, ()))?;
        self.o.forward(&out)
    }
}

/// Copies each key and value head for every query head that shares it.
fn repeat_kv(x: Tensor, times: usize) -> CandleResult<Tensor> {
    if times == 1 {
        return Ok(x);
    }
    let (batch, kv_heads, tokens, dim) = x.dims4()?;
    Tensor::cat(&vec![&x; times], D::Minus2)?.reshape((batch, kv_heads * times, tokens, dim))
}

impl Layer {
    pub(super) fn load(
        config: &NaiveConfig,
        index: usize,
        weights: &mut Weights<'_>,
    ) -> Result<Self, BaselineError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, ffn, eps) = (config.hidden_size, config.intermediate_size, config.rms_norm_eps);
        Ok(Self {
            input_norm: weights.norm(&name("input_layernorm"), hidden, eps)?,
            attention: Attention::load(config, &name("self_attn"), weights)?,
            post_norm: weights.norm(&name("post_attention_layernorm"), hidden, eps)?,
            gate: weights.linear(&name("mlp.gate_proj"), ffn, hidden, false)?,
            up: weights.linear(&name("mlp.up_proj"), ffn, hidden, false)?,
            down: weights.linear(&name("mlp.down_proj"), hidden, ffn, false)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>, kv: &mut LayerKv) -> CandleResult<Tensor> {
        let x = (x + self.attention.forward(&self.input_norm.forward(x)?, pass, kv)?)?;
        let h = self.post_norm.forward(&x)?;
        let h = (self.gate.forward(&h)?.silu()? * self.up.forward(&h)?)?;
        &x + self.down.forward(&h)?
    }
}
