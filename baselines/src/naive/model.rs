//! The model: embedding, layers, norm, output matrix.

use std::path::Path;

use candle_core::{Device, Module, Result as CandleResult, Tensor};
use candle_nn::{Embedding, Linear, RmsNorm};

use super::NaiveConfig;
use super::layer::{Layer, LayerKv, Pass};
use super::rotary::Rotary;
use super::weights::{Weights, open_folder};
use crate::BaselineError;

/// Added to the score of a key that must not be seen. Finite, as in Transformers: a padding query sees no key at
/// all, and infinities would make its row, and through its value every other, not a number.
const MASKED: f32 = f32::MIN / 2.0;

/// A Llama-family model in f32, its weights in candle tensors.
pub struct NaiveModel {
    config: NaiveConfig,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rotary: Rotary,
}

/// The K and V of a batch, one pair of tensors a layer, grown by concatenation.
#[derive(Default)]
pub struct KvCache {
    layers: Vec<LayerKv>,
}

impl NaiveModel {
    /// Builds the model from a function that gives each weight by its Hugging Face name
    /// (`model.layers.0.self_attn.q_proj.weight`), row-major, `[outputs, inputs]` for matrices. With tied embeddings
    /// `lm_head.weight` is not asked for.
    ///
    /// # Errors
    /// When the configuration is inconsistent or a weight has the wrong number of elements.
    pub fn from_tensors(
        config: NaiveConfig,
        tensors: impl FnMut(&str) -> Vec<f32>,
    ) -> Result<Self, BaselineError> {
        Self::load(config, &mut Weights::from_fn(tensors))
    }

    /// Loads `config.json` and the safetensors of a Hugging Face folder, widened to f32.
    ///
    /// # Errors
    /// When a file is missing, unreadable, or holds other shapes than the configuration says.
    pub fn from_hf_folder(folder: impl AsRef<Path>) -> Result<Self, BaselineError> {
        let folder = folder.as_ref();
        let config = NaiveConfig::from_hf_file(&folder.join("config.json"))?;
        let files = open_folder(folder)?;
        Self::load(config, &mut Weights::from_safetensors(&files))
    }

    fn load(config: NaiveConfig, weights: &mut Weights<'_>) -> Result<Self, BaselineError> {
        config.validate()?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let table = weights.tensor("model.embed_tokens.weight", &[vocab, hidden])?;
        let layers =
            (0..config.num_layers).map(|i| Layer::load(&config, i, weights)).collect::<Result<_, _>>()?;
        let norm = weights.norm("model.norm", hidden, config.rms_norm_eps)?;
        let head = if config.tie_word_embeddings {
            Linear::new(table.clone(), None)
        } else {
            weights.linear("lm_head", vocab, hidden, false)?
        };
        let rotary = Rotary::new(&config);
        Ok(Self { embedding: Embedding::new(table, hidden), layers, norm, head, rotary, config })
    }

    /// The model's shape.
    pub fn config(&self) -> &NaiveConfig {
        &self.config
    }

    /// Computes `ids` (`[batch, tokens]`), which follow what `cache` holds, and returns the logits of the last
    /// column, `[batch, vocab]`. The first `padding[i]` columns of row `i`, counted from the start of the cache, are
    /// padding: no real token sees them, and positions are counted behind them.
    ///
    /// # Errors
    /// When the batch is empty or shapes do not fit.
    pub fn forward(&self, ids: &Tensor, padding: &[usize], cache: &mut KvCache) -> CandleResult<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        if batch != padding.len() || batch == 0 || tokens == 0 {
            candle_core::bail!("{batch} rows of {tokens} tokens, {} padding counts", padding.len());
        }
        let past = cache.len();
        let (cos, sin) = self.rotary.at(&position_ids(padding, past, tokens), batch)?;
        let mask = attention_mask(padding, past, tokens)?;
        let pass = Pass { cos: &cos, sin: &sin, mask: &mask };
        cache.layers.resize_with(self.layers.len(), || None);
        let mut x = self.embedding.forward(ids)?;
        for (layer, kv) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.forward(&x, &pass, kv)?;
        }
        let last = x.narrow(1, tokens - 1, 1)?.squeeze(1)?.contiguous()?;
        self.head.forward(&self.norm.forward(&last)?)
    }
}

impl KvCache {
    /// Columns held, padding included.
    pub fn len(&self) -> usize {
        match self.layers.first() {
            Some(Some((k, _))) => k.dims()[2],
            _ => 0,
        }
    }

    /// Whether nothing was computed yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Position of each token in its own sequence; 0 for padding.
fn position_ids(padding: &[usize], past: usize, tokens: usize) -> Vec<u32> {
    padding
        .iter()
        .flat_map(|pad| (past..past + tokens).map(move |column| column.saturating_sub(*pad) as u32))
        .collect()
}

/// What is added to the scores, `[batch, 1, tokens, past + tokens]`: 0 where a query sees a key.
fn attention_mask(padding: &[usize], past: usize, tokens: usize) -> CandleResult<Tensor> {
    let context = past + tokens;
    let mut mask = Vec::with_capacity(padding.len() * tokens * context);
    for pad in padding {
        for query in past..context {
            mask.extend((0..context).map(|key| if key >= *pad && key <= query { 0.0 } else { MASKED }));
        }
    }
    Tensor::from_vec(mask, (padding.len(), 1, tokens, context), &Device::Cpu)
}
