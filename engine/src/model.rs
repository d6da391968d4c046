//! The models, each family written once over `quire_kernels::Backend`.

pub(crate) mod architecture;
mod config;
mod dtype;
mod llama;
mod rope;
mod shard;
mod weights;

use quire_kernels::{Backend, StepInput};

use crate::EngineError;

pub use architecture::Architecture;
pub(crate) use config::MOST_KV_SLOTS;
pub use config::ModelConfig;
pub use dtype::WeightDtype;
pub(crate) use dtype::{convert, encode_rows};
pub use llama::LlamaModel;
pub use rope::{Rope, RopeScaling};
pub use shard::Shard;
pub(crate) use shard::ShardedWeights;
pub use weights::{HostMatrix, LayerWeight, WeightRole, WeightSource};

/// How a model is to be loaded.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Format to hold the weight matrices in.
    pub dtype: WeightDtype,
    /// Rows of the largest batch.
    pub max_rows: usize,
    /// Tokens of the longest sequence.
    pub positions: usize,
    /// Threads that convert weights.
    pub threads: usize,
    /// Which part of the model.
    pub shard: Shard,
}

/// Prepares the part of the weights of `source`, a model of this `config`, that the options name for `backend`, by the family that
/// the architecture belongs to. `progress` hears the layers done and their number.
///
/// # Errors
/// When a tensor is missing or wrong, it cannot be divided so, or memory cannot be had.
pub fn load<B: Backend + 'static>(
    backend: &B,
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: LoadOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn Model<B>>, EngineError> {
    config.validate().map_err(EngineError::Config)?;
    let config = &options.shard.config(config)?;
    let sharded = ShardedWeights { whole: source, shard: options.shard };
    let source = if options.shard == Shard::WHOLE { source } else { &sharded };
    Ok(match config.architecture {
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => {
            Box::new(LlamaModel::load(backend, config, source, options, progress)?)
        }
    })
}

/// A model on a device, with the buffers of its forward pass: what an executor runs.
pub trait Model<B: Backend>: Send {
    /// Shape and constants.
    fn config(&self) -> &ModelConfig;

    /// Bytes of the weights as they were handed to the device.
    fn weight_bytes(&self) -> u64;

    /// Computes a step that was begun, of so many rows and rows of logits: stores K and V of every row that has a slot and
    /// leaves the logits of `logit_rows` in [`Self::logits`]. With fewer `layers` than it has, the output of the last of
    /// them is taken for the model's. In the last one only the rows of logits need go through what follows attention: two
    /// layers have a product of every shape, enough for a backend to settle on its algorithms.
    ///
    /// # Errors
    /// When memory for the logits cannot be had, or the device failed.
    fn run_layers(
        &mut self,
        backend: &B,
        step: &B::Step<'_>,
        rows: [usize; 2],
        cache: &mut B::KvCache,
        layers: usize,
    ) -> Result<(), EngineError>;

    /// The logits of the last step, a row of `vocab` for each wanted row.
    fn logits(&self) -> &B::Buffer;

    /// The same, for sampling to work on in place.
    fn logits_mut(&mut self) -> &mut B::Buffer;

    /// Begins a step and computes it.
    ///
    /// # Errors
    /// As [`Self::run_layers`].
    fn forward(
        &mut self,
        backend: &B,
        input: StepInput<'_>,
        cache: &mut B::KvCache,
        layers: usize,
    ) -> Result<(), EngineError> {
        let rows = [input.tokens.len(), input.logit_rows.len()];
        let step = backend.begin_step(input)?;
        self.run_layers(backend, &step, rows, cache, layers)
    }
}
