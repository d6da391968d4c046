//! The model of a run, loaded once for all its cells.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use quire_baselines::naive::NaiveModel;
use quire_engine::load::{Checkpoint, ModelSource};
use quire_engine::model::{ModelConfig, WeightDtype};
use quire_engine::{
    CpuExecutorOptions, DeviceName, EngineError, Executor, KvCapacity, ModelExecutor, executor_on_cpu,
};
use quire_workloads::{ModelLimits, SystemError};

use super::engine::{EngineSystem, SharedExecutor};
use super::{SystemConfig, naive_model, start_error};
use crate::config::Device;
use crate::settings::Settings;

/// Ids that prompts do not use: in real vocabularies the lowest ones mean something special.
const RESERVED_IDS: u32 = 64;

/// An executor of any device, shared by the cells.
pub(super) type SharedModel = SharedExecutor<Box<dyn ModelExecutor>>;

/// Loaded weights, kept between cells. All systems of a run have one model.
#[derive(Default)]
pub struct Models {
    executor: Option<SharedModel>,
    /// Models that propose tokens, by how they are written.
    drafts: HashMap<String, SharedModel>,
    naive: Option<Arc<NaiveModel>>,
    limits: Option<ModelLimits>,
    /// Shapes of models, by how they are written.
    shapes: HashMap<String, ModelConfig>,
    /// Who hears how far the next start is.
    pub(crate) listener: StartListener,
}

/// Hears how far a start is, such as 3 of 32 layers loaded: what is under way, how much of it is done, and of how much.
#[derive(Clone, Default)]
pub(crate) struct StartListener(Option<Arc<Hear>>);

type Hear = dyn Fn(&str, usize, usize) + Send + Sync;

impl StartListener {
    pub(crate) fn new(hear: impl Fn(&str, usize, usize) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hear)))
    }

    pub(super) fn hear(&self, what: &str, done: usize, all: usize) {
        if let Some(hear) = &self.0 {
            hear(what, done, all);
        }
    }
}

impl std::fmt::Debug for StartListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StartListener").field(&self.0.is_some()).finish()
    }
}

impl Models {
    /// What the model admits, for making prompts.
    ///
    /// # Errors
    /// When the model cannot be opened, or is not made for sequences as long as the settings say.
    pub fn limits(&mut self, settings: &Settings) -> Result<ModelLimits, EngineError> {
        if let Some(limits) = self.limits {
            return Ok(limits);
        }
        let config = self.shape(settings, &settings.model)?;
        if settings.max_model_len as usize > config.max_positions {
            return Err(EngineError::Config(format!(
                "max_model_len is {}, but the model was made for {} tokens",
                settings.max_model_len, config.max_positions
            )));
        }
        let vocab_size = u32::try_from(config.vocab).unwrap_or(u32::MAX);
        let reserved_ids = RESERVED_IDS.min(vocab_size / 2);
        let limits = ModelLimits { vocab_size, reserved_ids, max_model_len: settings.max_model_len };
        self.limits = Some(limits);
        Ok(limits)
    }

    /// A model's shape: its weights are not read.
    pub(super) fn shape(&mut self, settings: &Settings, model: &str) -> Result<ModelConfig, EngineError> {
        if let Some(shape) = self.shapes.get(model) {
            return Ok(shape.clone());
        }
        let source = ModelSource::parse(model)?;
        let shape = source.open(settings.weights, usize::from(settings.threads))?.config;
        self.shapes.insert(model.to_string(), shape.clone());
        Ok(shape)
    }

    /// The engine's executor.
    pub(super) fn executor(&mut self, settings: &Settings) -> Result<SharedModel, EngineError> {
        if let Some(executor) = &self.executor {
            return Ok(executor.heard_by(&self.listener));
        }
        let kv = KvCapacity::Bytes(settings.kv_bytes);
        let ranks = usize::from(settings.tensor_parallel);
        let executor = load(settings, &settings.model, kv, ranks, &self.listener)?;
        self.executor = Some(executor.clone());
        Ok(executor)
    }

    /// UUID of the GPU that the engine's model is on, once it is loaded.
    pub(crate) fn gpu_uuid(&self) -> Option<String> {
        match &self.executor.as_ref()?.lock().info().device {
            DeviceName::Gpu { uuid, .. } => Some(uuid.clone()),
            DeviceName::Cpu { .. } => None,
        }
    }

    /// An executor of a model that proposes tokens for the engine's: with as many KV slots, on one device, since it is small.
    pub(super) fn draft_executor(
        &mut self,
        settings: &Settings,
        model: &str,
    ) -> Result<SharedModel, EngineError> {
        if let Some(draft) = self.drafts.get(model) {
            return Ok(draft.heard_by(&self.listener));
        }
        let slots = self.executor(settings)?.kv_slots();
        let draft = load(settings, model, KvCapacity::Slots(slots), 1, &self.listener)?;
        self.drafts.insert(model.to_string(), draft.clone());
        Ok(draft)
    }

    /// The naive server's model: the engine's weights, bit for bit.
    pub(super) fn naive(&mut self, settings: &Settings) -> Result<Arc<NaiveModel>, SystemError> {
        if let Some(model) = &self.naive {
            return Ok(Arc::clone(model));
        }
        let checkpoint = open(settings, WeightDtype::F32).map_err(|e| start_error("naive", e))?;
        let model = Arc::new(naive_model::build(&checkpoint)?);
        self.naive = Some(Arc::clone(&model));
        Ok(model)
    }
}

/// Rows of a batch, and rows of logits, that are enough for every engine of the settings.
pub(super) fn most_rows(settings: &Settings) -> (usize, usize) {
    let engines = || {
        settings.systems.iter().filter_map(|system| match &system.serve {
            SystemConfig::Engine(engine) => Some(engine),
            _ => None,
        })
    };
    let rows = engines().map(|e| e.scheduler.token_budget as usize).max().unwrap_or(1);
    (rows, engines().map(EngineSystem::logit_rows).max().unwrap_or(1))
}

/// An executor of a model, large enough for every engine of the settings.
fn load(
    settings: &Settings,
    model: &str,
    kv: KvCapacity,
    ranks: usize,
    listener: &StartListener,
) -> Result<SharedModel, EngineError> {
    let (rows, sequences) = most_rows(settings);
    let source = ModelSource::parse(model)?;
    let progress = &mut |done, layers| listener.hear("loading layers", done, layers);
    let executor = match settings.device {
        Device::Cpu => cpu_executor(settings, &source, kv, rows, ranks, progress)?,
        Device::Cuda => cuda_executor(settings, &source, kv, [rows, sequences], ranks, progress)?,
    };
    Ok(SharedExecutor::new(executor, listener))
}

fn cpu_executor(
    settings: &Settings,
    source: &ModelSource,
    kv: KvCapacity,
    max_batch_rows: usize,
    ranks: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn ModelExecutor>, EngineError> {
    let options = CpuExecutorOptions {
        dtype: settings.weights,
        kv,
        kv_dtype: settings.kv_dtype.into(),
        max_model_len: Some(settings.max_model_len as usize),
        max_batch_rows,
        threads: NonZeroUsize::new(usize::from(settings.threads)),
        isa: None,
    };
    executor_on_cpu(source, &options, ranks, progress)
}

#[cfg(feature = "cuda")]
fn cuda_executor(
    settings: &Settings,
    source: &ModelSource,
    kv: KvCapacity,
    [max_batch_rows, max_sequences]: [usize; 2],
    ranks: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn ModelExecutor>, EngineError> {
    let options = quire_engine::CudaExecutorOptions {
        dtype: settings.weights,
        kv,
        kv_dtype: settings.kv_dtype.into(),
        max_model_len: Some(settings.max_model_len as usize),
        max_batch_rows,
        max_sequences,
        batch_invariant: settings.batch_invariant,
        threads: usize::from(settings.threads),
        ..quire_engine::CudaExecutorOptions::default()
    };
    quire_engine::executor_on_gpus(source, &options, ranks, progress)
}

#[cfg(not(feature = "cuda"))]
fn cuda_executor(
    _: &Settings,
    _: &ModelSource,
    _: KvCapacity,
    _: [usize; 2],
    _: usize,
    _: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn ModelExecutor>, EngineError> {
    Err(EngineError::Config(
        "this program was built without GPUs: build it with `--features cuda` (needs no CUDA to build)"
            .into(),
    ))
}

/// Opens the model of the settings.
pub(super) fn open(settings: &Settings, dtype: WeightDtype) -> Result<Checkpoint, EngineError> {
    ModelSource::parse(&settings.model)?.open(dtype, usize::from(settings.threads))
}
