//! What the executors that run a model share: what was loaded, and reading its logits.

use std::borrow::Cow;

use quire_kernels::{Backend, KvDtype, KvShape, SwapDirection};

use crate::model::{MOST_KV_SLOTS, ModelConfig, WeightDtype};
use crate::{EngineError, Executor, KvCopy, KvCopyKind, KvPlacement, ScheduledBatch};

/// How large the KV memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCapacity {
    /// As many tokens as fit in this many bytes.
    Bytes(u64),
    /// This many tokens.
    Slots(usize),
    /// Of a GPU's memory, this percentage is used for weights, buffers and KV together: what the first two leave, as
    /// measured after they are in place, is the KV memory.
    DevicePercent(u8),
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
    /// Where it runs.
    pub device: DeviceName,
}

/// Where a model runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// The CPU.
    Cpu {
        /// Threads in use.
        threads: usize,
        /// Instruction set in use.
        isa: &'static str,
    },
    /// A GPU.
    Gpu {
        /// The vendor's name of it.
        name: String,
        /// Name by which the vendor's tools find it.
        uuid: String,
        /// What it could do.
        peak: GpuPeak,
    },
}

/// What a GPU could do at its highest clocks, which no program reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuPeak {
    /// Operations of bfloat16 in a second, where known.
    pub flops: Option<u64>,
    /// Bytes of memory moved in a second.
    pub bytes: u64,
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu { threads, isa } => write!(f, "{threads} threads, {isa}"),
            Self::Gpu { name, .. } => f.write_str(name),
        }
    }
}

/// An executor of a model, whose logits can be read.
pub trait ModelExecutor: Executor {
    /// What was loaded.
    fn info(&self) -> &ModelInfo;

    /// The logits of the last forward pass: a row of the vocabulary's size for each of its `logit_rows`.
    ///
    /// # Errors
    /// When the device fails.
    fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError>;

    /// The logits after each of `tokens`, computed as one text in one pass. It uses the KV slots from 0 on: it is for
    /// measuring and checking a model, and not while an engine runs over this executor.
    ///
    /// # Errors
    /// When there are no tokens, more than a batch or the KV memory holds, or one that the model does not know.
    fn score(&mut self, tokens: &[u32]) -> Result<Cow<'_, [f32]>, EngineError> {
        let limit = self.max_batch_rows().min(self.kv_slots()).min(self.max_model_len());
        if tokens.is_empty() || tokens.len() > limit {
            return Err(EngineError::Config(format!(
                "{} tokens to score: choose 1 to {limit}",
                tokens.len()
            )));
        }
        let vocab = self.vocab_size();
        if let Some(unknown) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(EngineError::Config(format!(
                "token {unknown} is outside the model's vocabulary of {vocab}"
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
        self.logits()
    }
}

/// KV slots that fit in a number of bytes, or the number asked for, checked.
pub(crate) fn checked_slots(
    config: &ModelConfig,
    kv_dtype: KvDtype,
    capacity: SlotsOrBytes,
) -> Result<usize, EngineError> {
    match capacity {
        SlotsOrBytes::Bytes(bytes) => config.kv_slots(kv_dtype, bytes, "the size of the KV memory"),
        SlotsOrBytes::Slots(slots) if (1..=MOST_KV_SLOTS).contains(&slots) => Ok(slots),
        SlotsOrBytes::Slots(slots) => Err(EngineError::Config(format!(
            "KV memory of {slots} tokens: choose 1 to {MOST_KV_SLOTS}; a token of this model takes {} bytes",
            config.kv_bytes_per_token(kv_dtype)
        ))),
    }
}

/// Takes host memory of so many bytes for K and V of this model, whose cache has this shape, in place of what `host` had; for
/// how many tokens.
pub(crate) fn reserve_host<B: Backend>(
    backend: &B,
    config: &ModelConfig,
    cache: KvShape,
    host: &mut Option<B::KvHost>,
    bytes: u64,
) -> Result<usize, EngineError> {
    *host = None;
    let slots = config.kv_slots(cache.dtype, bytes, "preemption.bytes")?;
    let reserved = backend.kv_host(KvShape { slots, ..cache }).map_err(|error| {
        EngineError::Config(format!(
            "there is no host memory for {bytes} bytes of swap space ({error}): lower preemption.bytes"
        ))
    })?;
    *host = Some(reserved);
    Ok(slots)
}

/// Begins the copies, in order.
pub(crate) fn copy_kv<B: Backend>(
    backend: &B,
    cache: &mut B::KvCache,
    host: &mut Option<B::KvHost>,
    copies: &[KvCopy],
) -> Result<(), EngineError> {
    for KvCopy { kind, slots } in copies {
        let direction = match kind {
            KvCopyKind::Within => {
                backend.copy_within(cache, slots)?;
                continue;
            }
            KvCopyKind::Out => SwapDirection::Out,
            KvCopyKind::In => SwapDirection::In,
        };
        let Some(host) = host else {
            let what = "K and V are to be swapped, and no host memory was reserved";
            return Err(EngineError::Config(what.into()));
        };
        backend.swap(direction, cache, host, slots)?;
    }
    Ok(())
}

/// A capacity that is a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotsOrBytes {
    Slots(usize),
    Bytes(u64),
}
