//! The arguments that name a model and say how to load it.

use std::num::NonZeroUsize;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{CpuExecutorOptions, KvCapacity, KvLayout, ModelExecutor, executor_on_cpu};
use quire_kernels::KvDtype;
use quire_kernels::cpu::Isa;

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// A Hugging Face folder, a .gguf file, or dummy:NAME for random weights in a known shape (smollm2-135m,
    /// llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, qwen3-0.6b, mistral-7b-v0.1).
    #[arg(long, short, value_name = "PATH")]
    pub(crate) model: String,
    /// Where to run: cpu, cuda (the first NVIDIA GPU) or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: DeviceArg,
    /// Divide the model over so many GPUs, from that of --device on (tensor parallelism, by NCCL). On a CPU, over groups of
    /// threads, which is no faster. Clocks and power are then those of the first GPU.
    #[arg(long, value_name = "N", default_value_t = 1)]
    tensor_parallel: usize,
    /// Format of the weights in memory: keep, f32, bf16, f16, q8_0, q4_0 or q4_1; a GPU computes in
    /// it, in bf16 or f16.
    #[arg(long, default_value = "keep")]
    dtype: WeightDtype,
    /// Element type of the KV memory; f16 and fp8 (e4m3) on a GPU, f32 on a CPU.
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvDtypeArg,
    /// On a GPU, give every row the same result in any batch, at the cost of the fastest algorithms.
    #[arg(long)]
    batch_invariant: bool,
    /// On a GPU, queue every operation of a decode instead of running captured graphs.
    #[arg(long)]
    no_graphs: bool,
    /// Threads [default: as many as suit the machine].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Instruction set [default: the best that the machine has].
    #[arg(long, value_enum)]
    isa: Option<IsaArg>,
}

/// Where a model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DeviceArg {
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(number))) => Ok(Self::Cuda(number)),
            _ => Err(format!("'{text}' is none of cpu, cuda, cuda:N")),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    F32,
    Bf16,
    F16,
    Fp8,
}

#[derive(Clone, Copy, ValueEnum)]
enum IsaArg {
    Portable,
    Avx2,
    Avx512,
    Neon,
}

impl ModelArgs {
    /// Where the model is.
    pub(crate) fn source(&self) -> anyhow::Result<ModelSource> {
        Ok(ModelSource::parse(&self.model)?)
    }

    /// Whether it is to run on a GPU.
    pub(crate) fn on_gpu(&self) -> bool {
        matches!(self.device, DeviceArg::Cuda(_))
    }

    /// Loads it, with a bar on a terminal's standard error, for batches of up to `max_rows` rows and, on a GPU,
    /// `max_sequences` sequences.
    pub(crate) fn load(
        &self,
        source: &ModelSource,
        kv: KvCapacity,
        max_rows: usize,
        max_sequences: usize,
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        self.load_over(self.tensor_parallel, source, &self.model, kv, [max_rows, max_sequences])
    }

    /// Loads a draft model, which the user called `name`, for one sequence beside it: on one device, since it is small.
    pub(crate) fn load_draft(
        &self,
        source: &ModelSource,
        name: &str,
        kv: KvCapacity,
        max_rows: usize,
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        self.load_over(1, source, name, kv, [max_rows, 1])
    }

    fn load_over(
        &self,
        ranks: usize,
        source: &ModelSource,
        name: &str,
        kv: KvCapacity,
        [max_rows, max_sequences]: [usize; 2],
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        let verb = if source.is_dummy() { "generating" } else { "loading" };
        let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} layers, {eta} left")
            .context("the progress bar's template")?;
        let bar = ProgressBar::new(0).with_style(style).with_message(format!("{verb} {name}"));
        let mut progress = |done: usize, layers: usize| {
            bar.set_length(layers as u64);
            bar.set_position(done as u64);
        };
        let executor = match self.device {
            DeviceArg::Cpu => self.load_cpu(ranks, source, kv, max_rows, &mut progress),
            DeviceArg::Cuda(device) => {
                self.load_cuda([device, ranks], source, kv, [max_rows, max_sequences], &mut progress)
            }
        };
        bar.finish_and_clear();
        executor
    }

    /// Makes an executor ready for KV memory of this layout, with a bar: on a GPU graphs are captured. An engine of the same
    /// layout then has nothing left to do.
    pub(crate) fn prepare(executor: &mut dyn ModelExecutor, layout: KvLayout) -> anyhow::Result<()> {
        let style = ProgressStyle::with_template("capturing graphs {bar:30} {pos}/{len} sizes, {eta} left")
            .context("the progress bar's template")?;
        let bar = ProgressBar::new(0).with_style(style);
        executor.prepare(layout, &mut |done, sizes| {
            bar.set_length(sizes as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        Ok(())
    }

    fn kv_dtype(&self) -> KvDtype {
        match self.kv_dtype {
            KvDtypeArg::F32 => KvDtype::F32,
            KvDtypeArg::Bf16 => KvDtype::Bf16,
            KvDtypeArg::F16 => KvDtype::F16,
            KvDtypeArg::Fp8 => KvDtype::Fp8,
        }
    }

    fn load_cpu(
        &self,
        ranks: usize,
        source: &ModelSource,
        kv: KvCapacity,
        max_batch_rows: usize,
        progress: &mut dyn FnMut(usize, usize),
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        if self.batch_invariant || self.no_graphs {
            bail!(
                "--batch-invariant and --no-graphs are for --device cuda; on a CPU rows never depend on the batch"
            );
        }
        let options = CpuExecutorOptions {
            dtype: self.dtype,
            kv,
            kv_dtype: self.kv_dtype(),
            max_model_len: None,
            max_batch_rows,
            threads: self.threads,
            isa: self.isa.map(|isa| match isa {
                IsaArg::Portable => Isa::Portable,
                IsaArg::Avx2 => Isa::Avx2,
                IsaArg::Avx512 => Isa::Avx512,
                IsaArg::Neon => Isa::Neon,
            }),
        };
        Ok(executor_on_cpu(source, &options, ranks, progress)?)
    }

    #[cfg(feature = "cuda")]
    fn load_cuda(
        &self,
        [device, ranks]: [usize; 2],
        source: &ModelSource,
        kv: KvCapacity,
        [max_batch_rows, max_sequences]: [usize; 2],
        progress: &mut dyn FnMut(usize, usize),
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        if self.isa.is_some() {
            bail!("--isa is for --device cpu");
        }
        let defaults = quire_engine::CudaExecutorOptions::default();
        let options = quire_engine::CudaExecutorOptions {
            device,
            dtype: self.dtype,
            kv,
            kv_dtype: self.kv_dtype(),
            max_model_len: None,
            max_batch_rows,
            max_sequences,
            graphs: !self.no_graphs,
            batch_invariant: self.batch_invariant,
            threads: self.threads.map_or(defaults.threads, NonZeroUsize::get),
        };
        Ok(quire_engine::executor_on_gpus(source, &options, ranks, progress)?)
    }

    #[cfg(not(feature = "cuda"))]
    fn load_cuda(
        &self,
        _: [usize; 2],
        _: &ModelSource,
        _: KvCapacity,
        _: [usize; 2],
        _: &mut dyn FnMut(usize, usize),
    ) -> anyhow::Result<Box<dyn ModelExecutor>> {
        bail!("this program was built without GPUs: build it with `--features cuda` (needs no CUDA to build)")
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceArg;

    #[test]
    fn devices_are_named() {
        assert_eq!("cpu".parse(), Ok(DeviceArg::Cpu));
        assert_eq!("cuda".parse(), Ok(DeviceArg::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceArg::Cuda(3)));
        for wrong in ["gpu", "cuda:", "cuda:x", "cuda3", ""] {
            assert!(wrong.parse::<DeviceArg>().is_err(), "{wrong}");
        }
    }
}
