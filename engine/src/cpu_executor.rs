//! The executor of the CPU.

use std::borrow::Cow;
use std::num::NonZeroUsize;

use quire_kernels::cpu::{CpuBackend, CpuGroup, CpuOptions, Isa, KvCache};
use quire_kernels::sampling::Sampler;
use quire_kernels::{Backend, KernelError, KvDtype, KvShape};

use crate::load::ModelSource;
use crate::model::{self, LoadOptions, Model, ModelConfig, Shard, WeightDtype};
use crate::model_executor::{SlotsOrBytes, checked_slots, copy_kv, reserve_host};
use crate::sampling::{rule, token_logprobs, uniform};
use crate::tensor_parallel::Rank;
use crate::{
    DeviceName, EngineError, Executor, KvCapacity, KvCopy, KvLayout, ModelExecutor, ModelInfo, SampleRow,
    Sampled, SampledQueue, ScheduledBatch,
};

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

/// Runs batches on the CPU.
pub struct CpuExecutor {
    backend: CpuBackend,
    model: Box<dyn Model<CpuBackend>>,
    cache: KvCache,
    /// Where K and V are swapped to.
    host: Option<KvCache>,
    sampler: Sampler,
    sampled: SampledQueue,
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
        Self::load_rank(source, options, None, progress)
    }

    /// Loads a rank's part of a model, or all of it.
    pub(crate) fn load_rank(
        source: &ModelSource,
        options: &CpuExecutorOptions,
        rank: Option<&Rank<CpuGroup>>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        if let KvDtype::F16 | KvDtype::Fp8 = options.kv_dtype {
            let name = options.kv_dtype.name();
            return Err(EngineError::Config(format!(
                "KV memory of {name} is for GPUs: choose kv_dtype f32 or bf16"
            )));
        }
        let mut backend = CpuBackend::new(CpuOptions { threads: options.threads, isa: options.isa })?;
        let checkpoint = source.open(options.dtype, backend.threads())?;
        let config = checkpoint.config;
        let capacity = match options.kv {
            KvCapacity::Slots(slots) => SlotsOrBytes::Slots(slots),
            KvCapacity::Bytes(bytes) => SlotsOrBytes::Bytes(bytes),
            KvCapacity::DevicePercent(_) => {
                return Err(EngineError::Config(
                    "a share of a GPU's memory as KV memory, on a CPU: give a size".into(),
                ));
            }
        };
        let kv_slots = checked_slots(&config, options.kv_dtype, capacity)?;
        let max_model_len = config.model_len(options.max_model_len, kv_slots)?;
        if options.max_batch_rows == 0 {
            return Err(EngineError::Config("max_batch_rows is 0: a batch needs at least one row".into()));
        }
        let load = LoadOptions {
            dtype: options.dtype,
            max_rows: options.max_batch_rows,
            positions: max_model_len,
            threads: backend.threads(),
            shard: rank.map_or(Shard::WHOLE, |rank| rank.shard),
        };
        if let Some(Rank { group, shard }) = rank {
            backend.join(group.clone(), shard.rank);
        }
        let model = model::load(&backend, &config, &*checkpoint.weights, load, progress)?;
        let cache = kv_cache(&backend, model.config(), options, kv_slots)?;
        let info = ModelInfo {
            name: checkpoint.name,
            dummy: checkpoint.dummy,
            parameters: config.parameters(),
            weight_bytes: model.weight_bytes(),
            dtype: options.dtype,
            kv_bytes: kv_slots as u64 * config.kv_bytes_per_token(options.kv_dtype) as u64,
            device: DeviceName::Cpu { threads: backend.threads(), isa: backend.isa().name() },
            config,
        };
        let sampler = Sampler::new(backend.isa())?;
        Ok(Self {
            backend,
            model,
            cache,
            host: None,
            sampler,
            sampled: SampledQueue::default(),
            info,
            kv_slots,
            max_model_len,
            max_batch_rows: options.max_batch_rows,
        })
    }
}

impl ModelExecutor for CpuExecutor {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError> {
        Ok(self.backend.to_host(self.model.logits()))
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

    fn prepare(
        &mut self,
        _layout: KvLayout,
        _progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        self.sampled.clear();
        Ok(())
    }

    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        reserve_host(&self.backend, &self.info.config, self.cache.shape(), &mut self.host, bytes)
    }

    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        copy_kv(&self.backend, &mut self.cache, &mut self.host, copies)
    }

    fn layers(&self) -> Option<usize> {
        Some(self.info.config.layers)
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        self.forward_layers(batch, self.info.config.layers)
    }

    fn forward_layers(&mut self, batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        if batch.tokens.len() > self.max_batch_rows {
            return Err(EngineError::Config(format!(
                "a batch of {} rows for an executor of {}",
                batch.tokens.len(),
                self.max_batch_rows
            )));
        }
        let tokens = self.sampled.resolve(&batch.tokens)?;
        self.model.forward(
            &self.backend,
            batch.input_of(&tokens, self.model.config().window),
            &mut self.cache,
            layers,
        )
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        let vocab = self.info.config.vocab;
        let logits = self.model.logits_mut().values_mut();
        if logits.len() != rows.len() * vocab {
            return Err(EngineError::Config(format!(
                "{} rows to sample, but the last step left {} rows of logits",
                rows.len(),
                logits.len() / vocab
            )));
        }
        let (sampler, before) = (&mut self.sampler, &self.sampled);
        let sampled = rows.iter().zip(logits.chunks_exact_mut(vocab)).map(|(row, logits)| {
            let params = &row.params;
            let uniform = uniform(params.seed, row.output_index);
            let wants_top = params.top_logprobs > 0;
            let top = wants_top.then(|| token_logprobs(sampler.top(logits, params.top_logprobs as usize)));
            let history = before.resolve(&row.history)?;
            let choice = sampler.sample(logits, &rule(params), &history, row.prompt_len as usize, uniform);
            Ok(Sampled { token: choice.token, logprob: params.logprobs.then_some(choice.logprob), top })
        });
        let sampled = sampled.collect::<Result<_, EngineError>>()?;
        self.sampled.push(sampled)
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.sampled.pop()
    }
}

impl std::fmt::Debug for CpuExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CpuExecutor").field("info", &self.info).finish_non_exhaustive()
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
