//! What a start goes through beside loading: options checked, memory measured, the KV cache sized.

use quire_kernels::cuda::{CudaBackend, CudaKvCache, DeviceInfo};
use quire_kernels::{Backend, KvDtype, KvShape, NO_SLOT};

use super::{CudaExecutorOptions, KvCapacity};
use crate::EngineError;
use crate::executor::{KvPlacement, ScheduledBatch};
use crate::model::{Model, ModelConfig};
use crate::model_executor::{DeviceName, GpuPeak, SlotsOrBytes};

/// Memory left free beside what is planned, for the driver's and cuBLAS's own needs while serving.
const SPARE_BYTES: u64 = 512 << 20;
/// The least of that without which graphs cannot be captured: a size that was asked for is taken at its word down to this.
const GRAPH_BYTES: u64 = 64 << 20;

pub(super) fn check(options: &CudaExecutorOptions) -> Result<(), EngineError> {
    let refuse = |what: String| Err(EngineError::Config(what));
    if options.kv_dtype == KvDtype::F32 {
        return refuse("KV memory of f32 is for CPUs: choose kv_dtype bf16, f16 or fp8".into());
    }
    if options.max_batch_rows == 0 || options.max_sequences == 0 {
        return refuse("a batch needs at least one row and one sequence".into());
    }
    // Rows are the second dimension of some kernels' grids.
    if options.max_batch_rows > 65_535 {
        return refuse(format!(
            "a token budget of {}: choose at most 65535 on a GPU",
            options.max_batch_rows
        ));
    }
    if let KvCapacity::DevicePercent(percent) = options.kv
        && !(1..=99).contains(&percent)
    {
        return refuse(format!("{percent} % of the GPU's memory: choose 1 to 99"));
    }
    Ok(())
}

pub(super) fn device_name(info: &DeviceInfo) -> DeviceName {
    DeviceName::Gpu {
        name: info.name.clone(),
        uuid: info.uuid.clone(),
        peak: GpuPeak { flops: info.peak_flops, bytes: info.peak_bytes },
    }
}

/// A step of padding rows alone: `rows` of them, `logits` of whose logits are wanted.
pub(super) fn padding_step(rows: usize, logits: usize, block_size: Option<u32>) -> ScheduledBatch {
    let mut batch = ScheduledBatch::new(match block_size {
        Some(block_size) => KvPlacement::Paged { block_size, tables: Vec::new(), table_start: Vec::new() },
        None => KvPlacement::Contiguous { start: Vec::new() },
    });
    batch.pad(rows as u32);
    debug_assert!(batch.slots.iter().all(|&slot| slot == NO_SLOT));
    batch.logit_rows = (0..logits as u32).collect();
    batch
}

/// Runs the largest step once, so that all memory that serving will take is taken when the rest is given to the KV
/// cache.
pub(super) fn profile(
    backend: &CudaBackend,
    model: &mut dyn Model<CudaBackend>,
    options: &CudaExecutorOptions,
) -> Result<(), EngineError> {
    let config = model.config().clone();
    let mut cache = kv_cache(backend, &config, options.kv_dtype, 1)?;
    let batch = padding_step(options.max_batch_rows, options.max_sequences.min(options.max_batch_rows), None);
    model.forward(backend, batch.input(config.window), &mut cache, config.layers)?;
    Ok(backend.end_timing()?)
}

/// What was asked for, or the share of each of `ranks` GPUs that is left, together.
pub(super) fn capacity(
    backend: &CudaBackend,
    options: &CudaExecutorOptions,
    ranks: usize,
) -> Result<SlotsOrBytes, EngineError> {
    let percent = match options.kv {
        KvCapacity::Slots(slots) => return Ok(SlotsOrBytes::Slots(slots)),
        KvCapacity::Bytes(bytes) => return Ok(SlotsOrBytes::Bytes(bytes)),
        KvCapacity::DevicePercent(percent) => u64::from(percent),
    };
    let (total, free) = (backend.device().info().memory, backend.device().free_memory()?);
    let wanted = total / 100 * percent;
    let bytes = wanted.saturating_sub(total - free).min(free.saturating_sub(SPARE_BYTES));
    if bytes == 0 {
        return Err(EngineError::Config(format!(
            "weights, buffers and what other programs hold take {:.1} of the GPU's {:.1} GB and leave no KV memory within \
             {percent} %: raise the share, or lower the token budget or the number of sequences, or end other programs, or \
             choose a smaller model",
            (total - free) as f64 / 1e9,
            total as f64 / 1e9
        )));
    }
    Ok(SlotsOrBytes::Bytes(bytes * ranks as u64))
}

/// Refuses KV memory beside which what comes after it at the start finds no room.
pub(super) fn check_room(
    backend: &CudaBackend,
    config: &ModelConfig,
    options: &CudaExecutorOptions,
    slots: usize,
) -> Result<(), EngineError> {
    let bytes = slots as u64 * config.kv_bytes_per_token(options.kv_dtype) as u64;
    let (total, free) = (backend.device().info().memory, backend.device().free_memory()?);
    let graphs = if options.graphs && !options.batch_invariant { GRAPH_BYTES } else { 0 };
    if bytes.saturating_add(graphs) <= free {
        return Ok(());
    }
    let and_graphs =
        if graphs > 0 { format!(" and {graphs} for graphs (--no-graphs)") } else { String::new() };
    Err(EngineError::Config(format!(
        "KV memory takes {bytes} bytes{and_graphs}, and {free} of the GPU's {total} are free: give it less memory, or lower the \
         token budget or the number of sequences, or end other programs on the GPU"
    )))
}

pub(super) fn kv_cache(
    backend: &CudaBackend,
    config: &ModelConfig,
    dtype: KvDtype,
    slots: usize,
) -> Result<CudaKvCache, EngineError> {
    let ModelConfig { layers, kv_heads, head_dim, .. } = *config;
    Ok(backend.kv_cache(KvShape { layers, slots, kv_heads, head_dim, dtype })?)
}
