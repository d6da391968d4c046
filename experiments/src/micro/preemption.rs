//! What brings a preempted sequence's K and V back: a forward pass over its tokens, or copies out and in.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::{Result, bail};
use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, EngineError, KvCapacity, KvCopy, KvCopyKind, KvLayout, KvPlacement,
    ModelExecutor, ScheduledBatch,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::blocks::{Contexts, Places};
use super::{Plan, Subject};
use crate::config::{Device, KvPrecision};

/// Sequences that the KV memory and the swap space have room for. A sample copies all of them: one alone is short, and would
/// be found in a cache the second time.
const SEQUENCES: usize = 8;

/// A model with KV memory and swap space.
pub(super) struct Preemption {
    executor: Box<dyn ModelExecutor>,
    tokens: Vec<u32>,
    /// By block size.
    places: HashMap<u32, Places>,
    block_sizes: Vec<u32>,
    /// Names of the plan's lines.
    lines: Vec<String>,
    /// The block size that the executor was made ready for.
    ready: Option<u32>,
}

/// How a model is loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load<'a> {
    pub(super) model: &'a str,
    pub(super) weights: WeightDtype,
    pub(super) kv_dtype: KvPrecision,
    pub(super) device: Device,
    pub(super) threads: u16,
}

impl Preemption {
    pub(super) fn new(plan: &Plan, load: Load<'_>) -> Result<Self> {
        let longest = plan.panels.iter().map(|panel| panel.value).max().unwrap_or(1) as usize;
        let largest = plan.xs.iter().copied().max().unwrap_or(1) as usize;
        let slots = SEQUENCES * longest.next_multiple_of(largest);
        let mut executor = open(load, slots, longest)?;
        let host = executor.info().config.kv_bytes_per_token(load.kv_dtype.into()) * longest * SEQUENCES;
        executor.reserve_host(host as u64)?;
        Ok(Self {
            executor,
            tokens: vec![0; longest],
            places: HashMap::new(),
            block_sizes: plan.xs.clone(),
            lines: plan.lines.iter().map(|line| line.name.clone()).collect(),
            ready: None,
        })
    }

    /// Where a sequence of `len` tokens lies: the slot of each, and its blocks.
    fn place(&mut self, len: u32, block_size: u32) -> (Vec<u32>, KvPlacement) {
        let places = self.places.get_mut(&block_size).expect("every block size of the plan has places");
        let Contexts::Paged { block_size, tables, start } = places.contexts(1, len) else {
            unreachable!("blocks at random places are a paged layout")
        };
        let slot = |p: u32| tables[(p / block_size) as usize] * block_size + p % block_size;
        ((0..len).map(slot).collect(), KvPlacement::Paged { block_size, tables, table_start: start })
    }

    /// Computes `len` tokens, and waits.
    fn recompute(&mut self, len: u32, (slots, kv): (Vec<u32>, KvPlacement)) -> Result<f64, EngineError> {
        let mut batch = ScheduledBatch::new(KvPlacement::Contiguous { start: Vec::new() });
        batch.tokens = self.tokens[..len as usize].to_vec();
        batch.positions = (0..len).collect();
        batch.slots = slots;
        batch.query_start = vec![0, len];
        batch.context_len = vec![len];
        batch.kv = kv;
        batch.logit_rows = vec![len - 1];
        let start = Instant::now();
        self.executor.forward(&batch)?;
        self.executor.logits()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Copies K and V of sequences of `len` tokens, and waits; seconds for one. A device runs in order, so that what is read
    /// after the copies waits for them.
    fn copy(&mut self, kinds: &[KvCopyKind], len: u32, block_size: u32) -> Result<f64, EngineError> {
        let mut sequence = |index: u32| {
            let (slots, _) = self.place(len, block_size);
            let pairs: Vec<[u32; 2]> = slots.into_iter().zip(index * len..).map(Into::into).collect();
            kinds.iter().map(|&kind| KvCopy { kind, slots: pairs.clone() }).collect()
        };
        let sequences: Vec<Vec<KvCopy>> = (0..SEQUENCES as u32).map(&mut sequence).collect();
        let start = Instant::now();
        for copies in &sequences {
            self.executor.copy_kv(copies)?;
        }
        self.executor.logits()?;
        Ok(start.elapsed().as_secs_f64() / SEQUENCES as f64)
    }
}

impl Subject for Preemption {
    fn renew(&mut self, seed: u64) -> Result<()> {
        let vocab = u32::try_from(self.executor.vocab_size()).unwrap_or(u32::MAX);
        let mut random = StdRng::seed_from_u64(seed);
        self.tokens.fill_with(|| random.random_range(0..vocab));
        let slots = self.executor.kv_slots();
        self.places =
            self.block_sizes.iter().map(|&size| (size, Places::shuffled(slots, size, seed))).collect();
        Ok(())
    }

    fn time(&mut self, panel: u32, x: u32, line: usize) -> Result<f64> {
        if self.ready != Some(x) {
            self.executor.prepare(KvLayout::Paged { block_size: x }, &mut |_, _| {})?;
            let place = self.place(panel, x);
            // The first pass of a shape is not like the others; and there are logits to wait for.
            self.recompute(panel, place)?;
            self.ready = Some(x);
        }
        let seconds = match &*self.lines[line] {
            "recompute" => {
                let place = self.place(panel, x);
                self.recompute(panel, place)?
            }
            "swap" => self.copy(&[KvCopyKind::Out, KvCopyKind::In], panel, x)?,
            "swap_out" => self.copy(&[KvCopyKind::Out], panel, x)?,
            "swap_in" => self.copy(&[KvCopyKind::In], panel, x)?,
            other => bail!("no line {other}"),
        };
        Ok(seconds)
    }
}

fn open(load: Load<'_>, slots: usize, rows: usize) -> Result<Box<dyn ModelExecutor>> {
    let source = ModelSource::parse(load.model)?;
    match load.device {
        Device::Cpu => {
            let options = CpuExecutorOptions {
                dtype: load.weights,
                kv: KvCapacity::Slots(slots),
                kv_dtype: load.kv_dtype.into(),
                max_model_len: Some(rows),
                max_batch_rows: rows,
                threads: NonZeroUsize::new(usize::from(load.threads)),
                isa: None,
            };
            Ok(Box::new(CpuExecutor::load(&source, &options)?))
        }
        Device::Cuda => open_on_gpu(load, &source, slots, rows),
    }
}

#[cfg(feature = "cuda")]
fn open_on_gpu(
    load: Load<'_>,
    source: &ModelSource,
    slots: usize,
    rows: usize,
) -> Result<Box<dyn ModelExecutor>> {
    let options = quire_engine::CudaExecutorOptions {
        dtype: load.weights,
        kv: KvCapacity::Slots(slots),
        kv_dtype: load.kv_dtype.into(),
        max_model_len: Some(rows),
        max_batch_rows: rows,
        max_sequences: 1,
        threads: usize::from(load.threads),
        ..quire_engine::CudaExecutorOptions::default()
    };
    Ok(Box::new(quire_engine::CudaExecutor::load(source, &options)?))
}

#[cfg(not(feature = "cuda"))]
fn open_on_gpu(_: Load<'_>, _: &ModelSource, _: usize, _: usize) -> Result<Box<dyn ModelExecutor>> {
    bail!(super::NO_GPU)
}
