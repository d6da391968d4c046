//! The arguments that name a model and say how to load it.

use std::num::NonZeroUsize;

use anyhow::Context;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{CpuExecutor, CpuExecutorOptions, KvCapacity};
use quire_kernels::KvDtype;
use quire_kernels::cpu::Isa;

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// A Hugging Face folder, a .gguf file, or dummy:NAME for random weights in a known shape (smollm2-135m,
    /// llama-3.2-1b, llama-3.1-8b, qwen3-0.6b).
    #[arg(long, short, value_name = "PATH")]
    pub(crate) model: String,
    /// Format of the weights in memory: keep, f32, bf16, q8_0, q4_0 or q4_1.
    #[arg(long, default_value = "keep")]
    dtype: WeightDtype,
    /// Element type of the KV memory.
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvDtypeArg,
    /// Threads [default: as many as suit the machine].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Instruction set [default: the best that the machine has].
    #[arg(long, value_enum)]
    isa: Option<IsaArg>,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    F32,
    Bf16,
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

    /// Loads it, with a bar on a terminal's standard error.
    pub(crate) fn load(
        &self,
        source: &ModelSource,
        kv: KvCapacity,
        max_batch_rows: usize,
    ) -> anyhow::Result<CpuExecutor> {
        let options = CpuExecutorOptions {
            dtype: self.dtype,
            kv,
            kv_dtype: match self.kv_dtype {
                KvDtypeArg::F32 => KvDtype::F32,
                KvDtypeArg::Bf16 => KvDtype::Bf16,
            },
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
        let verb = if source.is_dummy() { "generating" } else { "loading" };
        let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} layers, {eta} left")
            .context("the progress bar's template")?;
        let bar = ProgressBar::new(0).with_style(style).with_message(format!("{verb} {}", self.model));
        let executor = CpuExecutor::load_with_progress(source, &options, &mut |done, layers| {
            bar.set_length(layers as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        Ok(executor?)
    }
}
