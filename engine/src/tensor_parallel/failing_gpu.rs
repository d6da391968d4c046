//! A GPU whose step fails while another's waits for it on the device. Needs two GPUs: `scripts/gpu-check --two`.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use quire_kernels::KernelError;
use quire_kernels::cuda::NcclGroup;

use super::{Rank, TensorParallel};
use crate::load::ModelSource;
use crate::{
    CudaExecutor, CudaExecutorOptions, EngineError, Executor, KvCapacity, KvCopy, KvLayout, KvPlacement,
    ModelExecutor, ModelInfo, SampleRow, Sampled, ScheduledBatch,
};

/// One rank that does not do the forward pass after so many.
struct Fails {
    inner: CudaExecutor,
    after: usize,
}

impl Executor for Fails {
    fn runs_beside_host(&self) -> bool {
        self.inner.runs_beside_host()
    }
    fn kv_slots(&self) -> usize {
        self.inner.kv_slots()
    }
    fn max_model_len(&self) -> usize {
        self.inner.max_model_len()
    }
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }
    fn max_batch_rows(&self) -> usize {
        self.inner.max_batch_rows()
    }
    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        self.inner.copy_kv(copies)
    }
    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        self.inner.prepare(layout, progress)
    }
    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        match self.after.checked_sub(1) {
            Some(after) => self.after = after,
            None => return Err(KernelError::Device("out of order".into()).into()),
        }
        self.inner.forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        self.inner.sample(rows)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.inner.collect()
    }
}

impl ModelExecutor for Fails {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }
    fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError> {
        self.inner.logits()
    }
}

/// Two ranks of which this one fails after so many forward passes.
fn two(failing: usize, after: usize) -> TensorParallel {
    let source = ModelSource::parse("dummy:qwen3-0.6b").unwrap();
    let options = CudaExecutorOptions {
        kv: KvCapacity::Slots(1024),
        max_model_len: Some(256),
        max_batch_rows: 128,
        max_sequences: 4,
        ..CudaExecutorOptions::default()
    };
    let load = move |rank: &Rank<NcclGroup>, progress: &mut dyn FnMut(usize, usize)| {
        let options = CudaExecutorOptions { device: rank.shard.rank, ..options.clone() };
        let inner = CudaExecutor::load_rank(&source, &options, Some(rank), progress)?;
        let after = if rank.shard.rank == failing { after } else { usize::MAX };
        Ok(Box::new(Fails { inner, after }) as _)
    };
    TensorParallel::load(NcclGroup::new(2).unwrap(), Arc::new(load), &mut |_, _| {}).unwrap()
}

/// The tokens from `from` to `to` of one sequence.
fn step(from: u32, to: u32) -> ScheduledBatch {
    let kv =
        KvPlacement::Paged { block_size: 16, tables: (0..to.div_ceil(16)).collect(), table_start: vec![0] };
    let mut batch = ScheduledBatch::new(kv.clone());
    batch.kv = kv;
    batch.tokens = (from..to).collect();
    batch.positions = batch.tokens.clone();
    batch.slots = batch.tokens.clone();
    batch.query_start.push(to - from);
    batch.context_len.push(to);
    batch.logit_rows.push(to - from - 1);
    batch
}

/// The error names what failed, in no long time; nor does the other rank's device wait for ever, which would show when the
/// executors go. A prompt's step is queued, a decode's is a graph, and either is the first or not.
#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_of_which_one_fails_in_a_step_end() {
    for failing in [1, 0] {
        for after in [0, 1, 2, 3] {
            let (done, ended) = channel();
            std::thread::spawn(move || {
                let mut ranks = two(failing, after);
                ranks.prepare(KvLayout::Paged { block_size: 16 }, &mut |_, _| {}).unwrap();
                let steps = [step(0, 100), step(100, 101), step(101, 140), step(140, 141)];
                let mut errors = Vec::new();
                for (index, step) in steps.iter().enumerate() {
                    let computed =
                        ranks.forward(step).and_then(|()| ranks.logits().map(|logits| logits.to_vec()));
                    match computed {
                        Ok(logits) => {
                            assert!(index < after && logits.iter().all(|logit| logit.is_finite()));
                        }
                        Err(error) => errors.push(error.to_string()),
                    }
                }
                drop(ranks);
                let _ = done.send(errors);
            });
            let errors = ended.recv_timeout(Duration::from_secs(60));
            let errors = errors.unwrap_or_else(|e| panic!("rank {failing} after {after} steps: {e}"));
            println!("rank {failing} after {after} steps: {errors:?}");
            assert_eq!(errors.len(), 4 - after);
            assert!(errors[0].contains("out of order"), "{errors:?}");
        }
    }
}
