//! The executor of an NVIDIA GPU.
//!
//! Before the first step the algorithms of products are chosen for all numbers of rows that are computed ("buckets"). A
//! step of decodes alone runs as a CUDA graph, captured then too, from the embedding to the greedy choice; a smaller
//! batch is padded to the next bucket. Other steps are queued operation by operation.

mod activations;
mod start;

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};

use quire_kernels::cuda::{
    ActivationDtype, CudaBackend, CudaKvCache, CudaKvHost, CudaOptions, DeviceSampler, Graph, NcclGroup,
    SampleRequest,
};
use quire_kernels::{Backend, HeadShape, KvDtype};

use self::activations::activations_for;
use self::start::{capacity, check, check_room, device_name, kv_cache, padding_step, profile};
use crate::load::ModelSource;
use crate::model::{self, LoadOptions, Model, Shard, WeightDtype};
use crate::model_executor::{checked_slots, copy_kv, reserve_host};
use crate::sampling::{rule, token_logprobs, uniform};
use crate::tensor_parallel::{Rank, check_ranks};
use crate::{
    EngineError, Executor, KvCapacity, KvCopy, KvLayout, KvPlacement, ModelExecutor, ModelInfo, SampleRow,
    Sampled, ScheduledBatch,
};

/// The smallest block of a paged layout: tables stay small, and a block's keys are whole memory transactions.
const MIN_BLOCK: u32 = 8;

/// How to set a [`CudaExecutor`] up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaExecutorOptions {
    /// Which GPU.
    pub device: usize,
    /// Format of the weights, and what is computed in: `Bf16`, `F16` or `Keep`, which is what the file has of the two.
    pub dtype: WeightDtype,
    /// Size of the KV memory.
    pub kv: KvCapacity,
    /// Element type of the KV memory: bf16, f16 or fp8.
    pub kv_dtype: KvDtype,
    /// The longest sequence; by default the model's limit, or the KV memory's size if that is less.
    pub max_model_len: Option<usize>,
    /// Rows of the largest batch.
    pub max_batch_rows: usize,
    /// Sequences of the largest batch.
    pub max_sequences: usize,
    /// Whether decodes run as CUDA graphs.
    pub graphs: bool,
    /// Every row's result is the same in any batch, at the cost of the fastest algorithms.
    pub batch_invariant: bool,
    /// Host threads that convert weights.
    pub threads: usize,
}

impl Default for CudaExecutorOptions {
    fn default() -> Self {
        Self {
            device: 0,
            dtype: WeightDtype::Bf16,
            kv: KvCapacity::DevicePercent(90),
            kv_dtype: KvDtype::Bf16,
            max_model_len: None,
            max_batch_rows: 2048,
            max_sequences: 256,
            graphs: true,
            batch_invariant: false,
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
        }
    }
}

/// Runs batches on an NVIDIA GPU. A process may have several on one GPU, such as a model and its draft model, each used by one
/// thread at a time; while one of them captures its graphs, others on that GPU wait where they would take or give back memory.
pub struct CudaExecutor {
    // Graphs hold addresses of all that follows, and go first.
    graphs: HashMap<(usize, Option<u32>), Graph>,
    model: Box<dyn Model<CudaBackend>>,
    cache: CudaKvCache,
    /// Where K and V are swapped to.
    host: Option<CudaKvHost>,
    sampler: DeviceSampler,
    backend: CudaBackend,
    info: ModelInfo,
    options: CudaExecutorOptions,
    kv_slots: usize,
    max_model_len: usize,
    /// Whether the algorithms of products are chosen.
    chosen: bool,
    /// Rows of logits that the last step left.
    logit_rows: usize,
    graph_launches: u64,
    /// The bucket of the graph that the last step ran, which ends with the greedy choice.
    captured: Option<usize>,
    /// For each row of each sampling under way, what is wanted beside its token.
    wanted: VecDeque<Vec<Wanted>>,
}

/// What is wanted of a row beside its token.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    logprob: bool,
    top: bool,
}

impl CudaExecutor {
    /// Loads a model.
    ///
    /// # Errors
    /// When there is no usable GPU, files are wrong, the options ask for more than the model allows, or memory cannot
    /// be had; what to lower is said.
    pub fn load(source: &ModelSource, options: &CudaExecutorOptions) -> Result<Self, EngineError> {
        Self::load_with_progress(source, options, &mut |_, _| {})
    }

    /// As [`Self::load`]; `progress` hears the layers loaded and their number.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with_progress(
        source: &ModelSource,
        options: &CudaExecutorOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        Self::load_rank(source, options, None, progress)
    }

    /// Loads a rank's part of a model, or all of it.
    pub(crate) fn load_rank(
        source: &ModelSource,
        options: &CudaExecutorOptions,
        rank: Option<&Rank<NcclGroup>>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        check(options)?;
        let checkpoint = source.open(options.dtype, options.threads)?;
        let config = checkpoint.config;
        let shard = rank.map_or(Shard::WHOLE, |rank| rank.shard);
        let part = shard.config(&config)?;
        let heads = HeadShape { heads: part.heads, kv_heads: part.kv_heads, head_dim: part.head_dim };
        // Until the KV memory is sized, the model's limit stands for the longest context.
        let longest = config.model_len(options.max_model_len, usize::MAX)?;
        let activations = activations_for(options.dtype, &config, &*checkpoint.weights)?;
        // Again, for what the file has is known by now.
        check_ranks(shard.ranks, options.batch_invariant, activations == ActivationDtype::F16)?;
        let mut backend = CudaBackend::new(CudaOptions {
            device: options.device,
            activations,
            heads,
            kv_dtype: options.kv_dtype,
            max_rows: options.max_batch_rows,
            max_sequences: options.max_sequences,
            max_blocks: options.max_sequences * longest.div_ceil(MIN_BLOCK as usize),
            batch_invariant: options.batch_invariant,
        })?;
        let load = LoadOptions {
            // Of files of other formats, `keep` converts to what the GPU computes in, as asking for it does.
            dtype: match activations {
                ActivationDtype::Bf16 => WeightDtype::Bf16,
                ActivationDtype::F16 => WeightDtype::F16,
            },
            max_rows: options.max_batch_rows,
            positions: longest,
            threads: options.threads,
            shard,
        };
        let mut model = model::load(&backend, &config, &*checkpoint.weights, load, progress)?;
        let sampler = DeviceSampler::new(
            backend.device(),
            CudaBackend::bucket_of(options.max_sequences),
            config.vocab,
        )?;
        backend.feed_from(&sampler);
        if let Some(Rank { group, .. }) = rank {
            // Nobody waits in NCCL for one that could not be loaded.
            group.group().exchange(shard.rank, 0)?;
            backend.join(group, shard.rank)?;
        }
        profile(&backend, &mut *model, options)?;
        let capacity = capacity(&backend, options, shard.ranks)?;
        let mut kv_slots = checked_slots(&config, options.kv_dtype, capacity)?;
        if let Some(Rank { group, .. }) = rank {
            let all = group.group().exchange(shard.rank, kv_slots as u64)?;
            kv_slots = all.into_iter().fold(kv_slots, |least, other| least.min(other as usize));
        }
        check_room(&backend, &part, options, kv_slots)?;
        let max_model_len = config.model_len(options.max_model_len, kv_slots)?;
        let cache = kv_cache(&backend, &part, options.kv_dtype, kv_slots)?;
        let info = ModelInfo {
            name: checkpoint.name,
            dummy: checkpoint.dummy,
            parameters: config.parameters(),
            weight_bytes: model.weight_bytes(),
            dtype: options.dtype,
            kv_bytes: kv_slots as u64 * config.kv_bytes_per_token(options.kv_dtype) as u64,
            device: device_name(backend.device().info()),
            config,
        };
        Ok(Self {
            graphs: HashMap::new(),
            model,
            cache,
            host: None,
            sampler,
            backend,
            info,
            options: options.clone(),
            kv_slots,
            max_model_len,
            chosen: false,
            logit_rows: 0,
            graph_launches: 0,
            captured: None,
            wanted: VecDeque::new(),
        })
    }

    /// How many blocks of the GPU's and of pinned memory were taken since it was loaded. Once an engine has started, serving
    /// takes none, but where a step's rows with penalties have more than a million tokens in all.
    pub fn allocations(&self) -> u64 {
        self.backend.device().allocations()
    }

    /// Steps that ran as a graph.
    pub fn graph_launches(&self) -> u64 {
        self.graph_launches
    }

    /// Chooses the algorithms for all numbers of rows, then captures the graphs of a layout; `progress` hears how much of both
    /// is done and how much there is. The batch-invariant mode has one algorithm for all and times none, and
    /// attention's launch depends on the contexts' lengths: it has no graphs, but its plans are made here too and not in
    /// the first steps.
    fn choose_and_capture(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        let block_size = match layout {
            KvLayout::Paged { block_size } => Some(block_size),
            KvLayout::Contiguous { .. } => None,
        };
        let CudaExecutorOptions { graphs, batch_invariant, max_sequences, max_batch_rows, .. } = self.options;
        let graphs = graphs && !batch_invariant;
        let buckets = CudaBackend::buckets(max_batch_rows);
        let largest_graph = CudaBackend::bucket_of(max_sequences.min(max_batch_rows));
        let is_missing = |&bucket: &usize| {
            graphs && bucket <= largest_graph && !self.graphs.contains_key(&(bucket, block_size))
        };
        let missing: Vec<usize> = buckets.iter().copied().filter(is_missing).collect();
        let untimed = if self.chosen { 0 } else { buckets.len() };
        let total = untimed + missing.len();
        // The largest first: the buffers of logits grow once.
        for (done, &bucket) in buckets.iter().rev().take(untimed).enumerate() {
            progress(done, total);
            self.warm(bucket)?;
        }
        // The memory that timing took is there for graphs again.
        self.backend.end_timing()?;
        self.chosen = true;
        for (done, &bucket) in missing.iter().rev().enumerate() {
            progress(untimed + done, total);
            let graph = self.capture_bucket(bucket, block_size)?;
            self.graphs.insert((bucket, block_size), graph);
        }
        progress(total, total);
        Ok(())
    }

    /// Runs two layers of a step of so many rows, so that the algorithms of its products are chosen and their kernels loaded.
    fn warm(&mut self, rows: usize) -> Result<(), EngineError> {
        let rows = rows.min(self.options.max_batch_rows);
        let logit_rows = rows.min(self.options.max_sequences);
        let batch = padding_step(rows, logit_rows, None);
        let step = self.backend.begin_step(batch.input(self.info.config.window))?;
        self.model.run_layers(&self.backend, &step, [rows, logit_rows], &mut self.cache, 2)?;
        Ok(self.backend.device().synchronize()?)
    }

    fn capture_bucket(&mut self, bucket: usize, block_size: Option<u32>) -> Result<Graph, EngineError> {
        let batch = padding_step(bucket, bucket, block_size);
        let step = self.backend.begin_bucket(&batch.input(self.info.config.window), bucket)?;
        // Once outside the capture, where memory is taken.
        let layers = self.info.config.layers;
        self.model.run_layers(&self.backend, &step, [bucket, bucket], &mut self.cache, layers)?;
        self.backend.device().synchronize()?;
        let Self { model, backend, cache, sampler, .. } = self;
        let mut outcome = Ok(());
        let graph = Graph::capture(backend.device(), || {
            outcome = model
                .run_layers(backend, &step, [bucket, bucket], cache, layers)
                .and_then(|()| Ok(sampler.queue_greedy(backend.device(), model.logits(), bucket, true)?));
        })?;
        outcome?;
        Ok(graph)
    }

    /// Checks a batch's shape and makes room for its logits.
    fn take(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        if batch.rows() > self.options.max_batch_rows || batch.sequences() > self.options.max_sequences {
            return Err(EngineError::Config(format!(
                "a batch of {} rows of {} sequences for an executor of {} and {}",
                batch.rows(),
                batch.sequences(),
                self.options.max_batch_rows,
                self.options.max_sequences
            )));
        }
        self.logit_rows = batch.logit_rows.len();
        if self.logit_rows > self.options.max_sequences {
            // Scoring a text: the buffers of logits grow and move, and the graphs would write to the old ones.
            self.graphs.clear();
        }
        Ok(())
    }

    /// The bucket whose graph can run this batch.
    fn bucket(&self, batch: &ScheduledBatch) -> Option<usize> {
        let rows = batch.rows();
        let decodes = batch.padding == 0
            && rows == batch.sequences()
            && rows == batch.logit_rows.len()
            && batch.query_start.windows(2).all(|pair| pair[1] - pair[0] == 1);
        if !decodes || rows == 0 || rows > self.options.max_sequences {
            return None;
        }
        let block_size = match batch.kv {
            KvPlacement::Paged { block_size, .. } => Some(block_size),
            KvPlacement::Contiguous { .. } => None,
        };
        let bucket = CudaBackend::bucket_of(rows);
        self.graphs.contains_key(&(bucket, block_size)).then_some(bucket)
    }
}

impl ModelExecutor for CudaExecutor {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError> {
        let logits = self.model.logits_mut();
        self.backend.set_rows(logits, self.logit_rows);
        let values = self.backend.to_host(logits);
        self.backend.check()?;
        Ok(values)
    }
}

impl Executor for CudaExecutor {
    fn runs_beside_host(&self) -> bool {
        true
    }

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
        self.options.max_batch_rows
    }

    fn max_sequences(&self) -> usize {
        self.options.max_sequences
    }

    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        if let KvLayout::Paged { block_size } = layout
            && block_size < MIN_BLOCK
        {
            return Err(EngineError::Config(format!(
                "kv.block_size is {block_size}: on a GPU choose {MIN_BLOCK} to 256"
            )));
        }
        self.sampler.forget(self.backend.device())?;
        self.wanted.clear();
        self.choose_and_capture(layout, progress)
    }

    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        // Copies of an engine before this one may still use what is given back.
        self.backend.device().synchronize()?;
        reserve_host(&self.backend, &self.info.config, self.cache.shape(), &mut self.host, bytes)
    }

    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        copy_kv(&self.backend, &mut self.cache, &mut self.host, copies)
    }

    fn layers(&self) -> Option<usize> {
        Some(self.info.config.layers)
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        self.take(batch)?;
        self.captured = self.bucket(batch);
        let window = self.info.config.window;
        let Some(bucket) = self.captured else {
            let layers = self.info.config.layers;
            return self.model.forward(&self.backend, batch.input(window), &mut self.cache, layers);
        };
        self.backend.begin_bucket(&batch.input(window), bucket)?;
        let block_size = match batch.kv {
            KvPlacement::Paged { block_size, .. } => Some(block_size),
            KvPlacement::Contiguous { .. } => None,
        };
        self.graph_launches += 1;
        Ok(self.graphs[&(bucket, block_size)].launch()?)
    }

    fn forward_layers(&mut self, batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        self.take(batch)?;
        self.captured = None;
        let input = batch.input(self.info.config.window);
        self.model.forward(&self.backend, input, &mut self.cache, layers)
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        if rows.len() != self.logit_rows {
            return Err(EngineError::Config(format!(
                "{} rows to sample, but the last step left {} rows of logits",
                rows.len(),
                self.logit_rows
            )));
        }
        let requests: Vec<SampleRequest<'_>> = rows
            .iter()
            .map(|row| SampleRequest {
                rule: rule(&row.params),
                history: &row.history,
                prompt_len: row.prompt_len as usize,
                uniform: uniform(row.params.seed, row.output_index),
                logprob: row.params.logprobs,
                top: row.params.top_logprobs as usize,
            })
            .collect();
        let (device, logits) = (self.backend.device(), self.model.logits());
        match self.captured.filter(|_| DeviceSampler::are_greedy(&requests)) {
            Some(bucket) => self.sampler.begin_queued(device, logits, bucket, &requests)?,
            None => self.sampler.begin(device, logits, &requests)?,
        }
        self.backend.share_tokens(&self.sampler, rows.len());
        let wanted = rows.iter().map(|SampleRow { params, .. }| Wanted {
            logprob: params.logprobs,
            top: params.top_logprobs > 0,
        });
        self.wanted.push_back(wanted.collect());
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        let choices = self.sampler.collect(self.backend.device())?;
        // One for each batch that the sampler has.
        let wanted = self.wanted.pop_front().expect("a sampling begun has what was wanted");
        let sampled = choices.into_iter().zip(wanted).map(|(row, wanted)| Sampled {
            token: row.choice.token,
            logprob: wanted.logprob.then_some(row.choice.logprob),
            top: wanted.top.then(|| token_logprobs(row.top)),
        });
        Ok(sampled.collect())
    }
}

impl std::fmt::Debug for CudaExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaExecutor").field("info", &self.info).finish_non_exhaustive()
    }
}
