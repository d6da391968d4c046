//! One static batch: padded, computed, grown a token a row a pass.

use std::time::Instant;

use candle_core::{D, Device, Result, Tensor};

use super::{KvCache, NaiveModel};

/// The id that fills padding. Which one does not matter: no real token sees it.
const PAD: u32 = 0;

/// Prompts that are computed together from beginning to end. Greedy.
pub struct StaticBatch<'m> {
    model: &'m NaiveModel,
    cache: KvCache,
    /// What the next pass computes, `[rows][tokens]`: the padded prompts, then one token a row.
    input: Vec<u32>,
    padding: Vec<usize>,
}

/// What one pass gave.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// The next token of every row.
    pub tokens: Vec<u32>,
    /// How long it took.
    pub times: StepTimes,
}

/// Where the time of a pass went, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTimes {
    /// The forward pass.
    pub execute_s: f64,
    /// The `argmax` over the batch's logits.
    pub sample_s: f64,
}

impl<'m> StaticBatch<'m> {
    /// Pads the prompts on the left to the longest. Nothing is computed yet.
    pub fn new<P: AsRef<[u32]>>(model: &'m NaiveModel, prompts: &[P]) -> Self {
        let width = prompts.iter().map(|p| p.as_ref().len()).max().unwrap_or(0);
        let mut input = Vec::with_capacity(prompts.len() * width);
        let mut padding = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let pad = width - prompt.as_ref().len();
            input.extend(std::iter::repeat_n(PAD, pad));
            input.extend_from_slice(prompt.as_ref());
            padding.push(pad);
        }
        Self { model, cache: KvCache::default(), input, padding }
    }

    /// One forward pass over the whole batch, and the next token of every row: the prompts first, then the token
    /// that each row got last, whether anyone still wants it or not.
    ///
    /// # Errors
    /// When candle refuses: an empty batch, an empty longest prompt, an id outside the vocabulary.
    pub fn step(&mut self) -> Result<StepOutput> {
        let rows = self.padding.len();
        let begun = Instant::now();
        let shape = (rows, self.input.len() / rows.max(1));
        let ids = Tensor::from_slice(&self.input, shape, &Device::Cpu)?;
        let logits = self.model.forward(&ids, &self.padding, &mut self.cache)?;
        let executed = Instant::now();
        let tokens = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
        let times = StepTimes {
            execute_s: (executed - begun).as_secs_f64(),
            sample_s: executed.elapsed().as_secs_f64(),
        };
        self.input.clone_from(&tokens);
        Ok(StepOutput { tokens, times })
    }

    /// Columns of KV held for each row, padding included.
    pub fn kv_columns(&self) -> usize {
        self.cache.len()
    }
}
