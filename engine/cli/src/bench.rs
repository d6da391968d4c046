//! `quire bench`: tokens per second, with the executor driven directly.

mod batch;

use std::borrow::Cow;
use std::io::Write;
use std::str::FromStr;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use quire_engine::{DeviceName, FED, KvCapacity, KvLayout, ModelExecutor, SamplingParams, ScheduledBatch};
use serde::Serialize;

use crate::gpu::{Clocks, Gpu, Pass, Work, percent};
use crate::interrupt;
use crate::model_args::ModelArgs;
use batch::BenchBatch;

/// Tokens of the prompt whose first token ends the start.
const FIRST_PROMPT: u32 = 16;

#[derive(Args)]
#[command(after_help = "Examples:
  quire bench --model models/SmolLM2-135M-Instruct.Q4_1.gguf
  quire bench --model dummy:smollm2-135m --dtype q8_0 --prefill 512,2048 --decode 1x512,64x256 --json
  quire bench --model dummy:llama-3.1-8b --device cuda --prefill 32x2048 --decode 1x512,256x512

Prefill is prompts in passes of up to --token-budget tokens, first tokens included. Decode is steps of BATCH sequences, each of which has CONTEXT
tokens before the first step, sampling (greedy) included. Figures are medians over --repeats, after one run unmeasured.

On a GPU, MFU and MBU are what the passes need in arithmetic and memory traffic (weights once a pass, K and V once a sequence) over what the card could
do at its highest clocks. Clocks and power are means over the repeats, read by nvidia-smi.")]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompts to prefill, as LENGTH or PROMPTSxLENGTH.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    prefill: Vec<PrefillShape>,
    /// Tokens of a prefill pass at most; a prompt longer than that is a pass of its own.
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..=65536))]
    token_budget: u32,
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

/// The largest number in a shape.
const MOST: u32 = 65536;
/// Tokens of all prompts of a prefill: a gigabyte with their positions and slots.
const MOST_PROMPT_TOKENS: u64 = 1 << 26;

/// Prompts and the length of each.
#[derive(Debug, Clone, Copy, PartialEq)]
struct PrefillShape {
    prompts: u32,
    length: u32,
}

impl FromStr for PrefillShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.parse().ok().filter(|n| (1..=MOST).contains(n));
        let numbers: Option<Vec<u32>> = text.split('x').map(number).collect();
        match numbers.as_deref() {
            Some(&[length]) => Ok(Self { prompts: 1, length }),
            Some(&[prompts, length]) if u64::from(prompts) * u64::from(length) > MOST_PROMPT_TOKENS => {
                Err(format!(
                    "'{text}' is more than {MOST_PROMPT_TOKENS} tokens, which are held in memory at once"
                ))
            }
            Some(&[prompts, length]) => Ok(Self { prompts, length }),
            _ => Err(format!(
                "'{text}' is not LENGTH or PROMPTSxLENGTH, like 512 or 32x2048, with numbers of 1 to {MOST}"
            )),
        }
    }
}

impl PrefillShape {
    /// Prompts in a pass.
    fn at_once(self, args: &BenchArgs) -> u32 {
        (args.token_budget / self.length).clamp(1, self.prompts)
    }
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
        let number = |part: &str| part.parse().ok().filter(|n| (1..=MOST).contains(n));
        let numbers: Option<Vec<u32>> = text.split('x').map(number).collect();
        match numbers.as_deref() {
            Some(&[batch, context]) => Ok(DecodeShape { batch, context, steps: None }),
            Some(&[batch, context, steps]) => Ok(DecodeShape { batch, context, steps: Some(steps) }),
            _ => Err(format!(
                "'{text}' is not BATCHxCONTEXT or BATCHxCONTEXTxSTEPS, like 8x128x32, with numbers of 1 to {MOST}"
            )),
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
    /// Milliseconds of a pass: a decode step, or a prefill pass.
    pass_ms: f64,
    /// The slowest and the fastest repeat.
    range: [f64; 2],
    repeats: u32,
    /// Share of the GPU's arithmetic that the passes need.
    #[serde(skip_serializing_if = "Option::is_none")]
    mfu: Option<f64>,
    /// Share of the GPU's memory bandwidth that they need.
    #[serde(skip_serializing_if = "Option::is_none")]
    mbu: Option<f64>,
    /// Of the GPU during the repeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    clocks: Option<Clocks>,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    dummy: bool,
    dtype: String,
    weight_bytes: u64,
    /// Threads, on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    /// Instruction set, on a CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    isa: Option<&'static str>,
    /// Where it ran.
    device: String,
    /// Seconds from the start until the weights were in place, until the first step could run, and until a prompt of
    /// 16 tokens had its first.
    start_s: [f64; 3],
    /// Operations of bfloat16 a second that MFU is a share of.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_flops: Option<u64>,
    /// Bytes a second that MBU is a share of.
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_bytes: Option<u64>,
    figures: Vec<Figure>,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let source = args.model.source()?;
    let longest = args.prefill.iter().map(|shape| shape.at_once(args) * shape.length).max().unwrap_or(1);
    let most = args.decode.iter().map(|shape| shape.batch);
    let most = most.chain(args.prefill.iter().map(|shape| shape.at_once(args))).max().unwrap_or(1);
    let decode_slots = args.decode.iter().map(|shape| slots_needed(*shape, args));
    let prefill_slots = args.prefill.iter().map(|shape| {
        u64::from(shape.at_once(args)) * u64::from(shape.length.next_multiple_of(args.block_size))
    });
    let slots = decode_slots
        .chain(prefill_slots)
        .max()
        .unwrap_or(1)
        .max(FIRST_PROMPT.next_multiple_of(args.block_size).into());
    let rows = longest.max(most).max(batch::CHUNK) as usize;
    let kv = KvCapacity::Slots(usize::try_from(slots)?);
    let started = Instant::now();
    let mut executor = args.model.load(&source, kv, rows, most as usize)?;
    let loaded = started.elapsed().as_secs_f64();
    check_lengths(args, executor.max_model_len())?;
    ModelArgs::prepare(&mut *executor, KvLayout::Paged { block_size: args.block_size })?;
    let ready = started.elapsed().as_secs_f64();
    let first =
        BenchBatch::new(1, FIRST_PROMPT, args.block_size, executor.vocab_size()).prompts(0, 1, FIRST_PROMPT);
    run_in_turn(&mut *executor, std::iter::once(Cow::Owned(first)))?;
    let start_s = [loaded, ready, started.elapsed().as_secs_f64()];
    interrupt::listen()?;
    let gpu = Gpu::of(&executor.info().device);
    let mut figures = Vec::new();
    for &shape in &args.prefill {
        figures.extend(prefill(&mut *executor, args, gpu.as_ref(), shape)?);
    }
    for &shape in &args.decode {
        figures.extend(decode(&mut *executor, args, gpu.as_ref(), shape)?);
    }
    print(args, &*executor, start_s, figures)
}

fn slots_needed(shape: DecodeShape, args: &BenchArgs) -> u64 {
    let length = u64::from(shape.context) + u64::from(shape.steps(args));
    u64::from(shape.batch) * length.next_multiple_of(args.block_size.into())
}

fn check_lengths(args: &BenchArgs, limit: usize) -> anyhow::Result<()> {
    let prompts = args.prefill.iter().map(|shape| u64::from(shape.length));
    let decodes = args.decode.iter().map(|shape| u64::from(shape.context) + u64::from(shape.steps(args)));
    match prompts.chain(decodes).max() {
        Some(longest) if longest > limit as u64 => {
            bail!("{longest} tokens are more than this model's {limit}: lower --prefill, --decode or --steps")
        }
        _ => Ok(()),
    }
}

fn prefill(
    executor: &mut dyn ModelExecutor,
    args: &BenchArgs,
    gpu: Option<&Gpu>,
    shape: PrefillShape,
) -> anyhow::Result<Option<Figure>> {
    let vocab = executor.vocab_size();
    let PrefillShape { prompts, length } = shape;
    let at_once = shape.at_once(args);
    let batch = BenchBatch::new(at_once, length, args.block_size, vocab);
    let tokens = f64::from(prompts) * f64::from(length);
    let mut work = Work::NONE;
    for first in (0..prompts).step_by(at_once as usize) {
        let sequences = at_once.min(prompts - first);
        work += Work::of(executor, Pass { sequences, context: 0, tokens: length });
    }
    let passes = f64::from(prompts.div_ceil(at_once));
    let run = Run { kind: "prefill", sequences: prompts, context: length, tokens, passes, work };
    repeat(run, args.repeats, gpu, || {
        let passes = (0..prompts).step_by(at_once as usize);
        let passes: Vec<_> =
            passes.map(|first| batch.prompts(first, at_once.min(prompts - first), length)).collect();
        run_in_turn(executor, passes.iter().map(Cow::Borrowed))
    })
}

/// Runs passes as an engine does, each begun while the one before it runs where the executor can; the seconds it took.
fn run_in_turn<'a>(
    executor: &mut dyn ModelExecutor,
    passes: impl Iterator<Item = Cow<'a, ScheduledBatch>>,
) -> anyhow::Result<f64> {
    let started = Instant::now();
    let mut under_way = false;
    for pass in passes {
        executor.forward(&pass)?;
        executor.sample(&pass.sampling)?;
        if std::mem::replace(&mut under_way, true) {
            executor.collect()?;
        }
    }
    if under_way {
        executor.collect()?;
    }
    Ok(started.elapsed().as_secs_f64())
}

fn decode(
    executor: &mut dyn ModelExecutor,
    args: &BenchArgs,
    gpu: Option<&Gpu>,
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
    let mut work = Work::NONE;
    for step in 0..steps {
        work += Work::of(executor, Pass { sequences, context: context + step, tokens: 1 });
    }
    let run = Run { kind: "decode", sequences, context, tokens, passes: f64::from(steps), work };
    repeat(run, args.repeats, gpu, || {
        let passes = (0..steps).map(|step| {
            // After the first step, the token that the step before samples for the same row.
            let tokens: Vec<u32> =
                (0..sequences).map(|row| if step == 0 { row } else { FED + row }).collect();
            Cow::Owned(batch.decode(&tokens, context + step, &greedy))
        });
        run_in_turn(executor, passes)
    })
}

/// What is run once to be timed.
struct Run {
    kind: &'static str,
    sequences: u32,
    context: u32,
    tokens: f64,
    passes: f64,
    work: Work,
}

/// Runs `once`, which gives the seconds that it took, once unmeasured and then `repeats` times. `None` when interrupted.
fn repeat(
    run: Run,
    repeats: u32,
    gpu: Option<&Gpu>,
    mut once: impl FnMut() -> anyhow::Result<f64>,
) -> anyhow::Result<Option<Figure>> {
    let Run { kind, sequences, context, tokens, passes, work } = run;
    if interrupt::requested() {
        return Ok(None);
    }
    once()?;
    let begin = Instant::now();
    let mut rates = Vec::new();
    for _ in 0..repeats {
        if interrupt::requested() {
            return Ok(None);
        }
        rates.push(tokens / once()?);
    }
    let clocks = gpu.and_then(|gpu| gpu.clocks_since(begin));
    rates.sort_by(f64::total_cmp);
    let middle = rates.len() / 2;
    let median = if rates.len() % 2 == 1 { rates[middle] } else { (rates[middle - 1] + rates[middle]) / 2.0 };
    let range = [rates[0], rates[rates.len() - 1]];
    let pass_ms = tokens / passes / median * 1e3;
    let shares = gpu.map(|gpu| work.shares(&gpu.peak, tokens / median));
    Ok(Some(Figure {
        kind,
        sequences,
        context,
        tokens_per_second: median,
        pass_ms,
        range,
        repeats,
        mfu: shares.and_then(|(mfu, _)| mfu),
        mbu: shares.map(|(_, mbu)| mbu),
        clocks,
    }))
}

fn print(
    args: &BenchArgs,
    executor: &dyn ModelExecutor,
    start_s: [f64; 3],
    figures: Vec<Figure>,
) -> anyhow::Result<()> {
    let info = executor.info();
    let (threads, isa, peak) = match info.device {
        DeviceName::Cpu { threads, isa } => (Some(threads), Some(isa), None),
        DeviceName::Gpu { peak, .. } => (None, None, Some(peak)),
    };
    let report = Report {
        model: info.name.clone(),
        dummy: info.dummy,
        dtype: info.dtype.to_string(),
        weight_bytes: info.weight_bytes,
        threads,
        isa,
        device: info.device.to_string(),
        start_s,
        peak_flops: peak.and_then(|peak| peak.flops),
        peak_bytes: peak.map(|peak| peak.bytes),
        figures,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{} ({}, {:.0} MB), {}; weights in place after {:.2} s, ready after {:.2} s, first token after {:.2} s",
        report.model,
        report.dtype,
        report.weight_bytes as f64 / 1e6,
        report.device,
        start_s[0],
        start_s[1],
        start_s[2]
    )?;
    write!(
        out,
        "{:<8} {:>9} {:>8} {:>10} {:>23} {:>10}",
        "", "sequences", "context", "tokens/s", "slowest to fastest", "ms a pass"
    )?;
    let on_gpu = peak.is_some();
    writeln!(out, "{}", if on_gpu { "   MFU   MBU  SM MHz (lowest)     W" } else { "" })?;
    for figure in &report.figures {
        write!(
            out,
            "{:<8} {:>9} {:>8} {:>10.1} {:>10.1} to {:>9.1} {:>10.3}",
            figure.kind,
            figure.sequences,
            figure.context,
            figure.tokens_per_second,
            figure.range[0],
            figure.range[1],
            figure.pass_ms
        )?;
        writeln!(out, "{}", if on_gpu { of_gpu(figure) } else { String::new() })?;
    }
    Ok(())
}

/// The columns of a figure that only a GPU has.
fn of_gpu(figure: &Figure) -> String {
    let clocks = figure.clocks.map_or(["-".into(), "-".into()], |clocks| {
        [format!("{:.0} ({:.0})", clocks.sm_mhz, clocks.lowest_sm_mhz), format!("{:.0}", clocks.watts)]
    });
    format!(" {:>5} {:>5} {:>16} {:>5}", percent(figure.mfu), percent(figure.mbu), clocks[0], clocks[1])
}

#[cfg(test)]
mod tests {
    use super::{DecodeShape, PrefillShape};

    #[test]
    fn prompts_are_one_or_two_numbers() {
        assert_eq!("512".parse(), Ok(PrefillShape { prompts: 1, length: 512 }));
        assert_eq!("32x2048".parse(), Ok(PrefillShape { prompts: 32, length: 2048 }));
        for wrong in ["", "0", "8x", "8x8x8", "70000"] {
            assert!(wrong.parse::<PrefillShape>().is_err(), "{wrong}");
        }
        assert!("99999".parse::<PrefillShape>().unwrap_err().contains("1 to 65536"));
        assert!("65536x65536".parse::<PrefillShape>().unwrap_err().contains("held in memory"));
    }

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
