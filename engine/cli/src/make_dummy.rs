//! `quire make-dummy`: a folder with random weights in a known shape.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use quire_engine::load::{ModelSource, write_dummy};

#[derive(Args)]
#[command(after_help = "Examples:
  quire make-dummy --model dummy:llama-3.1-8b --out /tmp/dummy-8b     16 GB; to measure how real files load
  quire bench --model /tmp/dummy-8b --device cuda")]
pub(crate) struct MakeDummyArgs {
    /// dummy:NAME or dummy:NAME:SEED, with NAME one of smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, qwen3-0.6b,
    /// mistral-7b-v0.1.
    #[arg(long, short, value_name = "SHAPE")]
    model: String,
    /// The folder to write; it must not hold a model yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Threads [default: all].
    #[arg(long)]
    threads: Option<NonZeroUsize>,
}

pub(crate) fn run(args: &MakeDummyArgs) -> anyhow::Result<()> {
    let ModelSource::Dummy { shape, seed } = ModelSource::parse(&args.model)? else {
        bail!("'{}' is a real model: make-dummy writes dummy:NAME", args.model);
    };
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok());
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left")
        .context("the progress bar's template")?;
    let bar = ProgressBar::new(0).with_style(style);
    write_dummy(shape, seed, &args.out, threads.map_or(1, NonZeroUsize::get), &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    eprintln!("{} with random weights: {}", shape.name(), args.out.display());
    Ok(())
}
