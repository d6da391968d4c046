//! One model over several devices of this host (tensor parallelism; Shoeybi et al. 2019, Megatron-LM, §3).
//!
//! Each rank is an executor of its share of the model ([`Shard`]), on a thread of its own but the first, which is on the
//! caller's. All get the same calls in the same order, and sum over each other within a forward pass.

#[cfg(all(test, feature = "gpu-tests"))]
mod failing_gpu;
mod rank;

use std::borrow::Cow;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::mpsc::channel;

use quire_kernels::cpu::{CpuGroup, ThreadPool};

pub(crate) use self::rank::Rank;
use self::rank::{Command, Load, PanicGuard, RankGroup, Worker, fail_for};
use crate::cpu_executor::CpuExecutor;
use crate::load::ModelSource;
use crate::model::Shard;
use crate::{
    CpuExecutorOptions, DeviceName, EngineError, Executor, GpuPeak, KvCopy, KvLayout, ModelExecutor,
    ModelInfo, SampleRow, Sampled, ScheduledBatch,
};

/// The most devices of a host.
pub const MAX_RANKS: usize = 64;

/// The executor of all ranks.
pub struct TensorParallel {
    first: Box<dyn ModelExecutor>,
    others: Vec<Worker>,
    group: Arc<dyn RankGroup>,
    info: ModelInfo,
}

impl TensorParallel {
    /// Loads a model on the CPU as `ranks` groups of threads, which share out those of the options. It is no faster than
    /// one: it is there to test with.
    ///
    /// # Errors
    /// As [`CpuExecutor::load`], and when the ranks cannot have equal shares.
    pub fn load_cpu(
        source: &ModelSource,
        options: &CpuExecutorOptions,
        ranks: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        check_ranks(ranks, false, false)?;
        let threads = options.threads.unwrap_or_else(ThreadPool::default_threads).get();
        let options =
            CpuExecutorOptions { threads: NonZeroUsize::new((threads / ranks).max(1)), ..options.clone() };
        let source = source.clone();
        Self::load(
            CpuGroup::new(ranks),
            Arc::new(move |rank: &Rank<CpuGroup>, progress: &mut dyn FnMut(usize, usize)| {
                Ok(Box::new(CpuExecutor::load_rank(&source, &options, Some(rank), progress)?) as _)
            }),
            progress,
        )
    }

    /// Loads a model on `ranks` GPUs, from that of the options on.
    ///
    /// # Errors
    /// As [`CudaExecutor::load`](crate::CudaExecutor::load), and when NCCL is not there, the ranks cannot have equal shares,
    /// it is to compute in float16, or the batch-invariant mode is wanted of more than two: NCCL sums more in an order that depends on how much there is to sum.
    #[cfg(feature = "cuda")]
    pub fn load_cuda(
        source: &ModelSource,
        options: &crate::CudaExecutorOptions,
        ranks: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        use quire_kernels::cuda::NcclGroup;
        check_ranks(ranks, options.batch_invariant, options.dtype == crate::model::WeightDtype::F16)?;
        // What any machine can say comes before what this one lacks.
        Shard { rank: 0, ranks }.config(&source.open(options.dtype, options.threads)?.config)?;
        let (source, options) = (source.clone(), options.clone());
        Self::load(
            NcclGroup::new(ranks)?,
            Arc::new(move |rank: &Rank<NcclGroup>, progress: &mut dyn FnMut(usize, usize)| {
                let device = options.device + rank.shard.rank;
                let options = crate::CudaExecutorOptions { device, ..options.clone() };
                match crate::CudaExecutor::load_rank(&source, &options, Some(rank), progress) {
                    Ok(executor) => Ok(Box::new(executor) as _),
                    // Another rank's, which names its own.
                    Err(error) if rank.group.group().failure().is_some() => Err(error),
                    Err(error) => Err(EngineError::Config(format!("GPU {device}: {error}"))),
                }
            }),
            progress,
        )
    }

    fn load<G: RankGroup>(
        group: Arc<G>,
        load: Arc<Load<G>>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        let ranks = group.group().ranks();
        let rank = |rank| Rank { group: group.clone(), shard: Shard { rank, ranks } };
        let (loaded, infos) = channel();
        let others = (1..ranks).map(|index| {
            Worker::start(rank(index), load.clone(), loaded.clone()).map_err(|e| {
                let why = format!("a thread for rank {index} cannot be had: {e}");
                // Before those that have one are waited for.
                group.fail(&why);
                EngineError::Config(why)
            })
        });
        let others = others.collect::<Result<Vec<Worker>, EngineError>>()?;
        let watched = group.clone();
        let _guard = PanicGuard(&*watched);
        drop(loaded);
        // A rank that waits for one that failed has that one's reason too.
        let first = load(&rank(0), progress).inspect_err(|e| group.fail(&e.to_string()));
        let infos: Vec<Result<ModelInfo, EngineError>> = infos.iter().collect();
        let first = first?;
        let mut info = first.info().clone();
        // A thread that panicked has sent nothing.
        if infos.len() + 1 != ranks {
            let why = group.group().failure().unwrap_or_else(|| "a rank's thread has ended".into());
            return Err(EngineError::Config(why));
        }
        for other in infos {
            info.weight_bytes += other?.weight_bytes;
        }
        info.device = together(&info.device, ranks);
        Ok(Self { first, others, group, info })
    }

    /// Has every rank do what `command` says, the first by `own`.
    fn all<R>(
        &mut self,
        command: Command,
        own: impl FnOnce(&mut dyn ModelExecutor) -> Result<R, EngineError>,
    ) -> Result<R, EngineError> {
        self.others.iter().for_each(|other| other.send(command.clone()));
        let _guard = PanicGuard(&*self.group);
        let result = own(&mut *self.first).inspect_err(|e| fail_for(e, &*self.group));
        // All of them answer, or the next call would read this one's answers.
        let others: Vec<Result<(), EngineError>> = self.others.iter().map(Worker::wait).collect();
        let result = result?;
        others.into_iter().collect::<Result<(), EngineError>>().map(|()| result)
    }
}

/// An executor on the CPU: of one group of threads, or of `ranks`.
///
/// # Errors
/// As [`CpuExecutor::load`] and [`TensorParallel::load_cpu`].
pub fn executor_on_cpu(
    source: &ModelSource,
    options: &CpuExecutorOptions,
    ranks: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn ModelExecutor>, EngineError> {
    Ok(match ranks {
        1 => Box::new(CpuExecutor::load_with_progress(source, options, progress)?),
        _ => Box::new(TensorParallel::load_cpu(source, options, ranks, progress)?),
    })
}

/// An executor on one GPU, or on `ranks` from that of the options on.
///
/// # Errors
/// As [`CudaExecutor::load`](crate::CudaExecutor::load) and [`TensorParallel::load_cuda`].
#[cfg(feature = "cuda")]
pub fn executor_on_gpus(
    source: &ModelSource,
    options: &crate::CudaExecutorOptions,
    ranks: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn ModelExecutor>, EngineError> {
    Ok(match ranks {
        1 => Box::new(crate::CudaExecutor::load_with_progress(source, options, progress)?),
        _ => Box::new(TensorParallel::load_cuda(source, options, ranks, progress)?),
    })
}

/// Whether a model can be divided over so many devices, whatever its shape; `batch_invariant` and `float16` say whether GPUs
/// would compute so.
///
/// # Errors
/// When they are none or too many, more than the batch-invariant mode of GPUs allows, or several GPUs of float16: one rank's
/// part of a sum may be infinite where the sum is not, and infinities of both signs make no number.
pub fn check_ranks(ranks: usize, batch_invariant: bool, float16: bool) -> Result<(), EngineError> {
    let why = match ranks {
        3.. if batch_invariant => format!(
            "batch_invariant over {ranks} GPUs: NCCL's sums of more than two depend on the batch's size; choose a \
             tensor_parallel of 1 or 2"
        ),
        2.. if float16 => {
            "float16 over several GPUs: a GPU's part of a sum may be beyond 65,504; choose bf16 (--dtype bf16, weights = \
             \"bf16\"), or one GPU"
                .into()
        }
        1..=MAX_RANKS => return Ok(()),
        _ => format!("tensor_parallel is {ranks}: choose 1 to {MAX_RANKS}"),
    };
    Err(EngineError::Config(why))
}

/// So many devices like this one.
fn together(device: &DeviceName, ranks: usize) -> DeviceName {
    match device {
        DeviceName::Cpu { threads, isa } => DeviceName::Cpu { threads: threads * ranks, isa },
        DeviceName::Gpu { name, uuid, peak } => DeviceName::Gpu {
            name: format!("{ranks} x {name}"),
            uuid: uuid.clone(),
            peak: GpuPeak {
                flops: peak.flops.map(|flops| flops * ranks as u64),
                bytes: peak.bytes * ranks as u64,
            },
        },
    }
}

impl ModelExecutor for TensorParallel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError> {
        self.first.logits()
    }
}

impl Executor for TensorParallel {
    fn runs_beside_host(&self) -> bool {
        self.first.runs_beside_host()
    }

    fn kv_slots(&self) -> usize {
        self.first.kv_slots()
    }

    fn max_model_len(&self) -> usize {
        self.first.max_model_len()
    }

    fn vocab_size(&self) -> usize {
        self.first.vocab_size()
    }

    fn max_batch_rows(&self) -> usize {
        self.first.max_batch_rows()
    }

    fn max_sequences(&self) -> usize {
        self.first.max_sequences()
    }

    fn max_logit_rows(&self) -> usize {
        self.first.max_logit_rows()
    }

    fn layers(&self) -> Option<usize> {
        self.first.layers()
    }

    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        self.all(Command::ReserveHost(bytes), |first| first.reserve_host(bytes))
    }

    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        self.all(Command::CopyKv(copies.into()), |first| first.copy_kv(copies))
    }

    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        self.all(Command::Prepare(layout), |first| first.prepare(layout, progress))
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        self.all(Command::Forward(Arc::new(batch.clone()), None), |first| first.forward(batch))
    }

    fn forward_layers(&mut self, batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        let command = Command::Forward(Arc::new(batch.clone()), Some(layers));
        self.all(command, |first| first.forward_layers(batch, layers))
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        self.all(Command::Sample(rows.into()), |first| first.sample(rows))
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.all(Command::Collect, |first| first.collect())
    }
}

impl std::fmt::Debug for TensorParallel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorParallel").field("info", &self.info).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use quire_kernels::KernelError;

    use super::*;
    use crate::dummy::DummyShape;
    use crate::model::WeightDtype;

    /// A rank that meets the others in every forward pass, and fails in one of them if it is to.
    struct Meets {
        rank: usize,
        group: Arc<CpuGroup>,
        fails: Option<Failure>,
        info: ModelInfo,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Failure {
        Error,
        Refusal,
        Panic,
    }

    impl Executor for Meets {
        fn kv_slots(&self) -> usize {
            64
        }
        fn max_model_len(&self) -> usize {
            64
        }
        fn vocab_size(&self) -> usize {
            8
        }
        fn max_batch_rows(&self) -> usize {
            64
        }
        fn copy_kv(&mut self, _: &[KvCopy]) -> Result<(), EngineError> {
            Ok(())
        }
        fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
            Ok(())
        }
        fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
            match self.fails {
                Some(Failure::Error) => return Err(KernelError::Device("out of order".into()).into()),
                Some(Failure::Refusal) if batch.rows() > 0 => {
                    return Err(EngineError::Config("too large".into()));
                }
                Some(Failure::Panic) => panic!("a test's panic"),
                Some(Failure::Refusal) | None => {}
            }
            Ok(CpuGroup::group(&self.group).exchange(self.rank, 0).map(drop)?)
        }
        fn sample(&mut self, _: &[SampleRow]) -> Result<(), EngineError> {
            Ok(())
        }
        fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
            Ok(Vec::new())
        }
    }

    impl ModelExecutor for Meets {
        fn info(&self) -> &ModelInfo {
            &self.info
        }
        fn logits(&mut self) -> Result<Cow<'_, [f32]>, EngineError> {
            Ok(Cow::Borrowed(&[]))
        }
    }

    impl Meets {
        fn new(rank: &Rank<CpuGroup>, fails: Option<Failure>) -> Self {
            let info = ModelInfo {
                name: "test".into(),
                dummy: true,
                parameters: 0,
                weight_bytes: 10,
                dtype: WeightDtype::F32,
                kv_bytes: 0,
                device: DeviceName::Cpu { threads: 1, isa: "none" },
                config: DummyShape::Smollm2_135m.config(),
            };
            Self { rank: rank.shard.rank, group: rank.group.clone(), fails, info }
        }
    }

    /// Three ranks of which one fails so, or all refuse.
    fn three(failing: usize, how: Option<Failure>) -> TensorParallel {
        let load = move |rank: &Rank<CpuGroup>, _: &mut dyn FnMut(usize, usize)| {
            let fails = how.filter(|&how| rank.shard.rank == failing || how == Failure::Refusal);
            Ok(Box::new(Meets::new(rank, fails)) as _)
        };
        TensorParallel::load(CpuGroup::new(3), Arc::new(load), &mut |_, _| {}).unwrap()
    }

    fn batch() -> ScheduledBatch {
        ScheduledBatch::new(crate::KvPlacement::Contiguous { start: Vec::new() })
    }

    #[test]
    fn a_rank_that_fails_in_a_step_ends_it_for_all() {
        for failing in 0..3 {
            let mut ranks = three(failing, Some(Failure::Error));
            assert_eq!(ranks.info().weight_bytes, 30);
            let error = ranks.forward(&batch()).unwrap_err().to_string();
            assert!(error.contains("out of order"), "{error}");
            // Nor does anybody wait in the next one.
            assert!(ranks.forward(&batch()).is_err());
        }
        assert!(three(0, None).forward(&batch()).is_ok());
    }

    #[test]
    fn what_no_shape_can_have_is_told_apart() {
        for (ranks, batch_invariant, float16, why) in [
            (0, false, false, Some("choose 1 to 64")),
            (65, false, false, Some("choose 1 to 64")),
            (3, true, false, Some("of more than two")),
            (2, false, true, Some("float16 over several GPUs")),
            (1, true, true, None),
            (2, true, false, None),
            (64, false, false, None),
        ] {
            let said = check_ranks(ranks, batch_invariant, float16).map_err(|e| e.to_string());
            assert_eq!(said.is_err(), why.is_some(), "{ranks}: {said:?}");
            assert!(why.is_none_or(|why| said.unwrap_err().contains(why)), "{ranks}, {why:?}");
        }
    }

    /// As a batch is that is too large: the next one's answers are its own.
    #[test]
    fn what_all_ranks_refuse_ends_nothing() {
        let mut ranks = three(0, Some(Failure::Refusal));
        let mut refused = batch();
        refused.pad(1);
        for _ in 0..2 {
            assert_eq!(ranks.forward(&refused).unwrap_err().to_string(), "too large");
            ranks.forward(&batch()).unwrap();
            ranks.sample(&[]).unwrap();
        }
        assert!(ranks.group.group().failure().is_none());
    }

    #[test]
    fn a_rank_that_panics_while_it_is_loaded_is_missed() {
        let load = |rank: &Rank<CpuGroup>,
                    _: &mut dyn FnMut(usize, usize)|
         -> Result<Box<dyn ModelExecutor>, EngineError> {
            match rank.shard.rank {
                2 => panic!("a test's panic"),
                _ => Ok(Box::new(Meets::new(rank, None)) as _),
            }
        };
        let error = TensorParallel::load(CpuGroup::new(3), Arc::new(load), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("panicked"), "{error}");
    }

    #[test]
    fn nor_does_anybody_wait_for_one_that_panics() {
        let mut ranks = three(2, Some(Failure::Panic));
        let error = ranks.forward(&batch()).unwrap_err().to_string();
        assert!(error.contains("panicked"), "{error}");
        assert!(ranks.sample(&[]).unwrap_err().to_string().contains("ended"));
    }
}
