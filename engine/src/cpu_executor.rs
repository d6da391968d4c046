//! The executor of the CPU.

use std::borrow::Cow;
use std::num::NonZeroUsize;

use quire_kernels::cpu::{CpuBackend, CpuOptions, Isa, KvCache};
use quire_kernels::sampling::{Sampler, SamplingRule};
use quire_kernels::{AttentionBatch, Backend, KernelError, KvDtype, KvIndex, KvShape};

use crate::dummy::mix;
use crate::load::ModelSource;
use crate::model::{LlamaModel, LoadOptions, ModelConfig, StepInput, WeightDtype};
use crate::{EngineError, Executor, KvPlacement, SampleRow, Sampled, SamplingParams, ScheduledBatch};

/// How large the KV memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCapacity {
    /// As many tokens as fit in this many bytes.
    Bytes(u64),
    /// This many tokens.
    Slots(usize),
}

/// How to set a [`CpuExecutor`] up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuExecutorOptions {
    /// Format to hold the weights in.
    pub dtype: WeightDtype,
    /// Size of the KV memory.
    pub kv: KvCapacity,
    /// Element type of the KV memory.
    pub kv_dtype: KvDtype,
    /// The longest sequence; by default the model's limit, or the KV memory's size if that is less.
    pub max_model_len: Option<usize>,
    /// Rows of the largest batch.
    pub max_batch_rows: usize,
    /// Threads; by default as many as suit the machine.
    pub threads: Option<NonZeroUsize>,
    /// Instruction set; by default the best that the machine supports.
    pub isa: Option<Isa>,
}

impl Default for CpuExecutorOptions {
    fn default() -> Self {
        Self {
            dtype: WeightDtype::Keep,
            kv: KvCapacity::Bytes(1 << 30),
            kv_dtype: KvDtype::Bf16,
            max_model_len: None,
            max_batch_rows: 2048,
            threads: None,
            isa: None,
        }
    }
}

/// What was loaded, for a person and for records.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// Name of the folder or file, or `dummy:` and the shape.
    pub name: String,
    /// Whether the weights are random.
    pub dummy: bool,
    /// Shape and constants.
    pub config: ModelConfig,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Format asked for.
    pub dtype: WeightDtype,
    /// Bytes of the KV memory.
    pub kv_bytes: u64,
    /// Threads in use.
    pub threads: usize,
    /// Instruction set in use.
    pub isa: &'static str,
}

/// Runs batches on the CPU.
pub struct CpuExecutor {
    backend: CpuBackend,
    model: LlamaModel<CpuBackend>,
    cache: KvCache,
    sampler: Sampler,
    info: ModelInfo,
    kv_slots: usize,
    max_model_len: usize,
    max_batch_rows: usize,
}

impl CpuExecutor {
    /// Loads a model.
    ///
    /// # Errors
    /// When its files are wrong, the options ask for more than the model allows, or memory cannot be had.
    pub fn load(source: &ModelSource, options: &CpuExecutorOptions) -> Result<Self, EngineError> {
        Self::load_with_progress(source, options, &mut |_, _| {})
    }

    /// As [`Self::load`]; `progress` hears the layers loaded and their number.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_progress(
        source: &ModelSource,
        options: &CpuExecutorOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        let backend = CpuBackend::new(CpuOptions { threads: options.threads, isa: options.isa })?;
        let checkpoint = source.open(options.dtype, backend.threads())?;
        let config = checkpoint.config;
        let kv_slots = kv_slots(&config, options)?;
        let max_model_len = max_model_len(&config, options, kv_slots)?;
        if options.max_batch_rows == 0 {
            return Err(EngineError::Config("max_batch_rows is 0: a batch needs at least one row".into()));
        }
        let load = LoadOptions {
            dtype: options.dtype,
            max_rows: options.max_batch_rows,
            positions: max_model_len,
            threads: backend.threads(),
        };
        let model = LlamaModel::load(&backend, &config, &*checkpoint.weights, load, progress)?;
        let cache = kv_cache(&backend, &config, options, kv_slots)?;
        let info = ModelInfo {
            name: checkpoint.name,
            dummy: checkpoint.dummy,
            parameters: config.parameters(),
            weight_bytes: model.weight_bytes(),
            dtype: options.dtype,
            kv_bytes: kv_slots as u64 * config.kv_bytes_per_token(options.kv_dtype) as u64,
            threads: backend.threads(),
            isa: backend.isa().name(),
            config,
        };
        let sampler = Sampler::new(backend.isa())?;
        let max_batch_rows = options.max_batch_rows;
        Ok(Self { backend, model, cache, sampler, info, kv_slots, max_model_len, max_batch_rows })
    }

    /// What was loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The logits after each of `tokens`, computed as one text in one pass. It uses the KV slots from 0 on: it is for
    /// measuring and checking a model, and not while an engine runs over this executor.
    ///
    /// # Errors
    /// When there are no tokens, more than a batch or the KV memory holds, or one that the model does not know.
    pub fn score(&mut self, tokens: &[u32]) -> Result<Cow<'_, [f32]>, EngineError> {
        let limit = self.max_batch_rows.min(self.kv_slots).min(self.max_model_len);
        if tokens.is_empty() || tokens.len() > limit {
            return Err(EngineError::Config(format!(
                "{} tokens to score: choose 1 to {limit}",
                tokens.len()
            )));
        }
        if let Some(unknown) = tokens.iter().find(|&&token| token as usize >= self.info.config.vocab) {
            return Err(EngineError::Config(format!(
                "token {unknown} is outside the model's vocabulary of {}",
                self.info.config.vocab
            )));
        }
        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        let mut batch = ScheduledBatch::new(KvPlacement::Contiguous { start: Vec::new() });
        batch.tokens = tokens.to_vec();
        batch.positions = rows.clone();
        batch.slots = rows.clone();
        batch.query_start = vec![0, tokens.len() as u32];
        batch.context_len = vec![tokens.len() as u32];
        batch.kv = KvPlacement::Contiguous { start: vec![0] };
        batch.logit_rows = rows;
        self.forward(&batch)?;
        Ok(self.logits())
    }

    /// The logits of the last forward pass: a row of the vocabulary's size for each of its `logit_rows`.
    pub fn logits(&self) -> Cow<'_, [f32]> {
        self.backend.to_host(self.model.logits())
    }
}

impl Executor for CpuExecutor {
    fn kv_slots(&self) -> usize {
        self.kv_slots
    }

    fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    fn vocab_size(&self) -> usize {
        self.info.config.vocab
    }

    fn max_batch_rows(&self) -> usize {
        self.max_batch_rows
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        if batch.tokens.len() > self.max_batch_rows {
            return Err(EngineError::Config(format!(
                "a batch of {} rows for an executor of {}",
                batch.tokens.len(),
                self.max_batch_rows
            )));
        }
        let input = StepInput {
            tokens: &batch.tokens,
            batch: AttentionBatch {
                positions: &batch.positions,
                slots: &batch.slots,
                query_start: &batch.query_start,
                context_len: &batch.context_len,
                kv: kv_index(&batch.kv),
            },
            logit_rows: &batch.logit_rows,
        };
        self.model.forward(&self.backend, input, &mut self.cache)
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<Vec<Sampled>, EngineError> {
        let vocab = self.info.config.vocab;
        let logits = self.model.logits_mut().values_mut();
        if logits.len() != rows.len() * vocab {
            return Err(EngineError::Config(format!(
                "{} rows to sample, but the last step left {} rows of logits",
                rows.len(),
                logits.len() / vocab
            )));
        }
        let sampler = &mut self.sampler;
        let sampled = rows.iter().zip(logits.chunks_exact_mut(vocab)).map(|(row, logits)| {
            let params = &row.params;
            let uniform = uniform(params.seed, row.output_index);
            let choice =
                sampler.sample(logits, &rule(params), &row.history, row.prompt_len as usize, uniform);
            Sampled { token: choice.token, logprob: params.logprobs.then_some(choice.logprob) }
        });
        Ok(sampled.collect())
    }
}

fn rule(params: &SamplingParams) -> SamplingRule {
    SamplingRule {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
    }
}

/// The uniform number in [0, 1) that draws output token `index` of a request with this seed: a function of the two
/// alone, so that the draw does not depend on what else is in the batch.
fn uniform(seed: u64, index: u32) -> f64 {
    let bits = mix(mix(seed).wrapping_add(u64::from(index)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

impl std::fmt::Debug for CpuExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuExecutor").field("info", &self.info).finish_non_exhaustive()
    }
}

fn kv_index(placement: &KvPlacement) -> KvIndex<'_> {
    match placement {
        KvPlacement::Paged { block_size, tables, table_start } => {
            KvIndex::Paged { block_size: *block_size, tables, table_start }
        }
        KvPlacement::Contiguous { start } => KvIndex::Contiguous { start },
    }
}

fn kv_slots(config: &ModelConfig, options: &CpuExecutorOptions) -> Result<usize, EngineError> {
    let token = config.kv_bytes_per_token(options.kv_dtype);
    let slots = match options.kv {
        KvCapacity::Slots(slots) => slots,
        KvCapacity::Bytes(bytes) => usize::try_from(bytes / token as u64).unwrap_or(usize::MAX),
    };
    // Slots are numbered in 32 bits, and the last number means none.
    if slots == 0 || slots >= u32::MAX as usize {
        return Err(EngineError::Config(format!(
            "KV memory of {slots} tokens: choose 1 to {}; a token of this model takes {token} bytes",
            u32::MAX - 1
        )));
    }
    Ok(slots)
}

fn max_model_len(
    config: &ModelConfig,
    options: &CpuExecutorOptions,
    kv_slots: usize,
) -> Result<usize, EngineError> {
    match options.max_model_len {
        None => Ok(config.max_positions.min(kv_slots)),
        Some(len) if len == 0 || len > config.max_positions => Err(EngineError::Config(format!(
            "max_model_len is {len}: choose 1 to {}, the context that the model was made for",
            config.max_positions
        ))),
        Some(len) => Ok(len),
    }
}

fn kv_cache(
    backend: &CpuBackend,
    config: &ModelConfig,
    options: &CpuExecutorOptions,
    slots: usize,
) -> Result<KvCache, EngineError> {
    let shape = KvShape {
        layers: config.layers,
        slots,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        dtype: options.kv_dtype,
    };
    backend.kv_cache(shape).map_err(|error| match error {
        KernelError::OutOfMemory { bytes, .. } => EngineError::Config(format!(
            "there is no memory for {bytes} bytes of KV ({slots} tokens): choose a smaller KV size"
        )),
        other => other.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_are_uniform_and_a_function_of_seed_and_index() {
        assert_eq!(uniform(7, 3), uniform(7, 3));
        let draws: Vec<f64> =
            (0..100).flat_map(|seed| (0..100).map(move |index| uniform(seed, index))).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        for tenth in 0..10 {
            let low = f64::from(tenth) / 10.0;
            let count = draws.iter().filter(|&&u| u >= low && u < low + 0.1).count();
            assert!((900..1100).contains(&count), "{count} of 10,000 in tenth {tenth}");
        }
    }
}
