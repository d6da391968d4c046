//! `quire bench`: tokens per second, with the executor driven directly.

mod batch;

use std::io::Write;
use std::str::FromStr;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use quire_engine::{CpuExecutor, Executor, KvCapacity, SamplingParams};
use serde::Serialize;

use crate::interrupt;
use crate::model_args::ModelArgs;
use batch::BenchBatch;

#[derive(Args)]
#[command(after_help = "Examples:
  quire bench --model models/SmolLM2-135M-Instruct.Q4_1.gguf
  quire bench --model dummy:smollm2-135m --dtype q8_0 --prefill 512,2048 --decode 1x512,64x256 --json

Prefill is one prompt in one pass, first token included. Decode is steps of BATCH sequences, each of which has CONTEXT
tokens before the first step, sampling (greedy) included. Figures are medians over --repeats, after one run unmeasured.")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Lengths of the prompts to prefill.
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = clap::value_parser!(u32).range(1..=65536))]
    prefill: Vec<u32>,
    /// Batches to decode, as BATCHxCONTEXT or BATCHxCONTEXTxSTEPS.
    #[arg(long, value_delimiter = ',', default_value = "1x512x96,8x128x32,32x128x16")]
    decode: Vec<DecodeShape>,
    /// Decode steps that are timed together, where --decode does not say.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=65536))]
    steps: u32,
    /// Times each figure is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Slots in a KV block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256))]
    block_size: u32,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Sequences, the tokens each has before the first step, and steps.
#[derive(Debug, Clone, Copy, PartialEq)]
struct DecodeShape {
    batch: u32,
    context: u32,
    steps: Option<u32>,
}

impl FromStr for DecodeShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse().ok().filter(|n| (1..=65536).contains(n));
        let numbers: Option<Vec<u32>> = text.split('x').map(number).collect();
        match numbers.as_deref() {
            Some(&[batch, context]) => Ok(DecodeShape { batch, context, steps: None }),
            Some(&[batch, context, steps]) => Ok(DecodeShape { batch, context, steps: Some(steps) }),
            _ => Err(format!("'{text}' is not BATCHxCONTEXT or BATCHxCONTEXTxSTEPS, like 8x128x32")),
        }
    }
}

impl DecodeShape {
    fn steps(&self, args: &BenchArgs) -> u32 {
        self.steps.unwrap_or(args.steps)
    }
}

/// One figure.
#[derive(Debug, Serialize)]
struct Figure {
    kind: &'static str,
    sequences: u32,
    /// Tokens of the prompt, or of each context before the first step.
    context: u32,
    tokens_per_second: f64,
    /// The slowest and the fastest repeat.
    range: [f64; 2],
    repeats: u32,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    dummy: bool,
    dtype: String,
    weight_bytes: u64,
    threads: usize,
    isa: &'static str,
    figures: Vec<Figure>,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let source = args.model.source()?;
    let longest = args.prefill.iter().copied().max().unwrap_or(1);
    let most = args.decode.iter().map(|shape| shape.batch).max().unwrap_or(1);
    let slots = args.decode.iter().map(|shape| slots_needed(*shape, args)).max().unwrap_or(0);
    let slots = slots.max(u64::from(longest.next_multiple_of(args.block_size)));
    let rows = longest.max(most).max(batch::CHUNK) as usize;
    let kv = KvCapacity::Slots(usize::try_from(slots)?);
    let mut executor = args.model.load(&source, kv, rows)?;
    check_lengths(args, executor.max_model_len())?;
    interrupt::listen()?;
    let mut figures = Vec::new();
    for &tokens in &args.prefill {
        figures.extend(prefill(&mut executor, args, tokens)?);
    }
    for &shape in &args.decode {
        figures.extend(decode(&mut executor, args, shape)?);
    }
    print(args, &executor, figures)
}

fn slots_needed(shape: DecodeShape, args: &BenchArgs) -> u64 {
    let length = u64::from(shape.context) + u64::from(shape.steps(args));
    u64::from(shape.batch) * length.next_multiple_of(args.block_size.into())
}

fn check_lengths(args: &BenchArgs, limit: usize) -> anyhow::Result<()> {
    let prompts = args.prefill.iter().map(|&tokens| u64::from(tokens));
    let decodes = args.decode.iter().map(|shape| u64::from(shape.context) + u64::from(shape.steps(args)));
    match prompts.chain(decodes).max() {
        Some(longest) if longest > limit as u64 => {
            bail!("{longest} tokens are more than this model's {limit}: lower --prefill, --decode or --steps")
        }
        _ => Ok(()),
    }
}

fn prefill(executor: &mut CpuExecutor, args: &BenchArgs, tokens: u32) -> anyhow::Result<Option<Figure>> {
    let vocab = executor.vocab_size();
    repeat("prefill", 1, tokens, args.repeats, f64::from(tokens), || {
        let batch = BenchBatch::new(1, tokens, args.block_size, vocab);
        let prompt = batch.prompt(0, tokens, true);
        let started = Instant::now();
        executor.forward(&prompt)?;
        executor.sample(&prompt.sampling)?;
        Ok(started.elapsed().as_secs_f64())
    })
}

fn decode(
    executor: &mut CpuExecutor,
    args: &BenchArgs,
    shape: DecodeShape,
) -> anyhow::Result<Option<Figure>> {
    let vocab = executor.vocab_size();
    let DecodeShape { batch: sequences, context, .. } = shape;
    let steps = shape.steps(args);
    let batch = BenchBatch::new(sequences, context + steps, args.block_size, vocab);
    for sequence in 0..sequences {
        for chunk in batch.prompt_chunks(sequence, context) {
            executor.forward(&chunk)?;
        }
        if interrupt::requested() {
            return Ok(None);
        }
    }
    let tokens = f64::from(sequences) * f64::from(steps);
    let greedy = std::sync::Arc::new(SamplingParams::default());
    repeat("decode", sequences, context, args.repeats, tokens, || {
        let mut next: Vec<u32> = (0..sequences).collect();
        let started = Instant::now();
        for step in 0..steps {
            let scheduled = batch.decode(&next, context + step, &greedy);
            executor.forward(&scheduled)?;
            next = executor.sample(&scheduled.sampling)?.into_iter().map(|sampled| sampled.token).collect();
        }
        Ok(started.elapsed().as_secs_f64())
    })
}

/// Runs `once`, which gives the seconds that `tokens` took, once unmeasured and then `repeats` times. `None` when
/// interrupted.
fn repeat(
    kind: &'static str,
    sequences: u32,
    context: u32,
    repeats: u32,
    tokens: f64,
    mut once: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<Option<Figure>> {
    once()?;
    let mut rates = Vec::new();
    for _ in 0..repeats {
        if interrupt::requested() {
            return Ok(None);
        }
        rates.push(tokens / once()?);
    }
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    let median = if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 };
    let range = [rates[0], rates[rates.len() - 1]];
    Ok(Some(Figure { kind, sequences, context, tokens_per_second: median, range, repeats }))
}

fn print(args: &BenchArgs, executor: &CpuExecutor, figures: Vec<Figure>) -> anyhow::Result<()> {
    let info = executor.info();
    let report = Report {
        model: info.name.clone(),
        dummy: info.dummy,
        dtype: info.dtype.to_string(),
        weight_bytes: info.weight_bytes,
        threads: info.threads,
        isa: info.isa,
        figures,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{} ({}, {:.0} MB), {} threads, {}",
        report.model,
        report.dtype,
        report.weight_bytes as f64 / 1e6,
        report.threads,
        report.isa
    )?;
    writeln!(
        out,
        "{:<8} {:>9} {:>8} {:>10} {:>23}",
        "", "sequences", "context", "tokens/s", "slowest to fastest"
    )?;
    for figure in &report.figures {
        writeln!(
            out,
            "{:<8} {:>9} {:>8} {:>10.1} {:>10.1} to {:>9.1}",
            figure.kind,
            figure.sequences,
            figure.context,
            figure.tokens_per_second,
            figure.range[0],
            figure.range[1]
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::DecodeShape;

    #[test]
    fn shapes_are_two_or_three_numbers() {
        let shape = |batch, context, steps| Ok(DecodeShape { batch, context, steps });
        assert_eq!("8x128".parse(), shape(8, 128, None));
        assert_eq!("1x512x96".parse(), shape(1, 512, Some(96)));
        for wrong in ["8", "8x", "x8", "8x0", "8x1x2x3", "8x128x-1"] {
            assert!(wrong.parse::<DecodeShape>().is_err(), "{wrong}");
        }
    }
}
