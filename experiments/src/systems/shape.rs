//! Whether an engine could start, found out from the model's shape alone: a configuration that cannot is not to be found out
//! after hours of cells.

use quire_engine::model::{ModelConfig, Shard, WeightDtype};
use quire_engine::speculation::DraftModel;
use quire_engine::{
    Engine, EngineError, EngineParts, Executor, KvCopy, KvLayout, SampleRow, Sampled, ScheduledBatch,
    check_ranks,
};
use quire_kernels::KvDtype;

use super::engine::EngineSystem;
use super::model::{Models, most_rows};
use crate::settings::Settings;

/// Builds the engine over an executor that has the sizes of the real one and computes nothing.
pub(super) fn check(
    engine: &EngineSystem,
    settings: &Settings,
    models: &mut Models,
) -> Result<(), EngineError> {
    let kv_dtype: KvDtype = settings.kv_dtype.into();
    if settings.device.is_cpu() && matches!(kv_dtype, KvDtype::F16 | KvDtype::Fp8) {
        let name = kv_dtype.name();
        return Err(EngineError::Config(format!(
            "KV memory of {name} is for GPUs: choose kv_dtype f32 or bf16"
        )));
    }
    let config = models.shape(settings, &settings.model)?;
    let ranks = usize::from(settings.tensor_parallel);
    let float16 = !settings.device.is_cpu() && settings.weights == WeightDtype::F16;
    check_ranks(ranks, settings.batch_invariant, float16)?;
    Shard { rank: 0, ranks }.config(&config)?;
    let slots = config.kv_slots(kv_dtype, settings.kv_bytes, "kv_bytes")?;
    let mut parts = EngineParts::default();
    if let Some(model) = &engine.draft_model {
        let draft = Shape::new(models.shape(settings, model)?, slots, settings)
            .map_err(|error| EngineError::Config(format!("its draft model: {error}")))?;
        parts.drafter = Some(Box::new(DraftModel::new(Box::new(draft))));
    }
    let executor = Shape::new(config, slots, settings)?;
    Engine::with_parts(executor, &engine.config(Some(settings.max_model_len)), parts).map(|_| ())
}

/// An engine keeps books of its blocks, which take memory. So many tokens are the longest context that a model may have: no
/// check tells a pool of them from a larger one.
const ENOUGH_SLOTS: usize = 1 << 24;

/// An executor that has sizes and computes nothing.
#[derive(Debug)]
struct Shape {
    config: ModelConfig,
    slots: usize,
    rows: usize,
    logit_rows: usize,
    max_model_len: usize,
    kv_dtype: KvDtype,
    is_cpu: bool,
}

impl Shape {
    fn new(config: ModelConfig, slots: usize, settings: &Settings) -> Result<Self, EngineError> {
        let (rows, logit_rows) = most_rows(settings);
        let max_model_len = config.model_len(Some(settings.max_model_len as usize), slots)?;
        Ok(Self {
            config,
            slots: slots.min(ENOUGH_SLOTS),
            rows,
            logit_rows,
            max_model_len,
            kv_dtype: settings.kv_dtype.into(),
            is_cpu: settings.device.is_cpu(),
        })
    }
}

fn computes_nothing() -> EngineError {
    EngineError::Config("this executor has sizes and computes nothing".into())
}

impl Executor for Shape {
    fn kv_slots(&self) -> usize {
        self.slots
    }
    fn max_model_len(&self) -> usize {
        self.max_model_len
    }
    fn vocab_size(&self) -> usize {
        self.config.vocab
    }
    fn max_batch_rows(&self) -> usize {
        self.rows
    }
    fn max_sequences(&self) -> usize {
        // A CPU takes as many as rows.
        if self.is_cpu { self.rows } else { self.logit_rows }
    }
    fn layers(&self) -> Option<usize> {
        Some(self.config.layers)
    }
    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        let slots = self.config.kv_slots(self.kv_dtype, bytes, "preemption.bytes")?;
        Ok(slots.min(ENOUGH_SLOTS))
    }
    fn copy_kv(&mut self, _: &[KvCopy]) -> Result<(), EngineError> {
        Err(computes_nothing())
    }
    fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
        Ok(())
    }
    fn forward(&mut self, _: &ScheduledBatch) -> Result<(), EngineError> {
        Err(computes_nothing())
    }
    fn sample(&mut self, _: &[SampleRow]) -> Result<(), EngineError> {
        Err(computes_nothing())
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        Err(computes_nothing())
    }
}
