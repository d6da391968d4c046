//! Whether an engine could start, found out from the model's shape alone: a configuration that cannot is not to be found out
//! after hours of cells.

use quire_engine::model::ModelConfig;
use quire_engine::speculation::DraftModel;
use quire_engine::{
    Engine, EngineError, EngineParts, Executor, KvCopy, KvLayout, SampleRow, Sampled, ScheduledBatch,
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
    let token = config.kv_bytes_per_token(kv_dtype) as u64;
    let slots = usize::try_from(settings.kv_bytes / token.max(1)).unwrap_or(usize::MAX);
    if slots == 0 {
        let bytes = settings.kv_bytes;
        return Err(EngineError::Config(format!(
            "kv_bytes is {bytes}, and the K and V of one token of this model take {token}"
        )));
    }
    if slots >= u32::MAX as usize {
        let (bytes, most) = (settings.kv_bytes, u32::MAX - 1);
        return Err(EngineError::Config(format!(
            "kv_bytes is {bytes}, room for {slots} tokens of {token} bytes: choose 1 to {most} tokens"
        )));
    }
    let mut parts = EngineParts::default();
    if let Some(model) = &engine.draft_model {
        let draft = models.shape(settings, model)?;
        let (asked, most) = (settings.max_model_len as usize, draft.max_positions);
        if asked > most {
            return Err(EngineError::Config(format!(
                "max_model_len is {asked}, and the draft model was made for contexts of up to {most}: lower it, or choose another"
            )));
        }
        parts.drafter = Some(Box::new(DraftModel::new(Box::new(Shape::new(draft, slots, settings)))));
    }
    let executor = Shape::new(config, slots, settings);
    Engine::with_parts(executor, &engine.config(Some(settings.max_model_len)), parts).map(|_| ())
}

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
    fn new(config: ModelConfig, slots: usize, settings: &Settings) -> Self {
        let (rows, logit_rows) = most_rows(settings);
        Self {
            config,
            slots,
            rows,
            logit_rows,
            max_model_len: settings.max_model_len as usize,
            kv_dtype: settings.kv_dtype.into(),
            is_cpu: settings.device.is_cpu(),
        }
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
        let token = self.config.kv_bytes_per_token(self.kv_dtype) as u64;
        match usize::try_from(bytes / token.max(1)).unwrap_or(usize::MAX) {
            0 => Err(EngineError::Config(format!(
                "preemption.bytes is {bytes}, and the K and V of one token take {token}"
            ))),
            slots if slots >= u32::MAX as usize => Err(EngineError::Config(format!(
                "preemption.bytes is {bytes}, room for {slots} tokens of {token} bytes: choose enough for 1 to {}",
                u32::MAX - 1
            ))),
            slots => Ok(slots),
        }
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
