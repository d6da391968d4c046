//! `quire offline`: how fast an engine works off many requests that are all there at the start.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use quire_engine::{
    Engine, EngineConfig, Event, KvCapacity, KvLayout, PolicyConfig, PreemptionConfig, Progress, Request,
    SamplingParams, SchedulerConfig,
};
use quire_workloads::{
    ArrivalProcess, Decoding, LengthSource, ModelLimits, OverLimit, TraceSource, Workload, WorkloadError,
    WorkloadSpec,
};
use serde::Serialize;

use crate::gpu::{Clocks, Gpu, Work, percent};
use crate::interrupt;
use crate::model_args::ModelArgs;

/// Ids that prompts do not use: in real vocabularies the lowest ones mean something special.
const RESERVED_IDS: u32 = 64;

#[derive(Args)]
#[command(after_help = "Examples:
  quire offline --model dummy:llama-3.1-8b --device cuda --trace traces/azure_llm_2023_conv.csv --requests 1000
  quire offline --model dummy:smollm2-135m --trace traces/azure_llm_2023_conv.csv --requests 20 --max-model-len 4096

The trace gives the requests' lengths; prompts are random tokens, answers end where the trace says. Greedy sampling.")]
pub(crate) struct OfflineArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A trace, for the lengths of its requests (Azure, BurstGPT, Mooncake, ShareGPT).
    #[arg(long)]
    trace: PathBuf,
    /// Its first so many requests.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Begin each step when the one before it has ended, also where they could overlap (on a GPU).
    #[arg(long)]
    no_overlap: bool,
    /// Sequences that run at a time, at most.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_running: u32,
    /// Rows of a step, at most.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=65536))]
    token_budget: u32,
    /// The longest sequence.
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u32).range(2..))]
    max_model_len: u32,
    /// Slots in a KV block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=256))]
    block_size: u32,
    /// KV memory, MiB, of all devices together [default: on a CPU 1024; on a GPU what 90 % of its memory leave].
    #[arg(long)]
    kv_mib: Option<u64>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Default, Serialize)]
struct Report {
    model: String,
    device: String,
    requests: u32,
    rejected: u32,
    preemptions: u32,
    prompt_tokens: u64,
    output_tokens: u64,
    seconds: f64,
    output_tokens_per_second: f64,
    total_tokens_per_second: f64,
    steps: u64,
    /// Steps that computed decodes alone.
    decode_steps: u64,
    /// Seconds by phase of the loop.
    schedule_s: f64,
    execute_s: f64,
    sample_s: f64,
    commit_s: f64,
    /// Share of the GPU's arithmetic that the requests need.
    #[serde(skip_serializing_if = "Option::is_none")]
    mfu: Option<f64>,
    /// Share of the GPU's memory bandwidth that they need: the weights once a step, K and V once a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    mbu: Option<f64>,
    /// Of the GPU meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    clocks: Option<Clocks>,
}

pub(crate) fn run(args: &OfflineArgs) -> anyhow::Result<()> {
    let source = args.model.source()?;
    let kv = match args.kv_mib {
        Some(mib) => KvCapacity::Bytes(mib.checked_mul(1 << 20).context("--kv-mib is too large")?),
        None if args.model.on_gpu() => KvCapacity::DevicePercent(90),
        None => KvCapacity::Bytes(1 << 30),
    };
    let (rows, sequences) = (args.token_budget as usize, args.max_running as usize);
    let mut executor = args.model.load(&source, kv, rows, sequences)?;
    ModelArgs::prepare(&mut *executor, KvLayout::Paged { block_size: args.block_size })?;
    let info = executor.info();
    let mut report =
        Report { model: info.name.clone(), device: info.device.to_string(), ..Report::default() };
    let vocab = info.config.vocab;
    let max_model_len = u32::try_from(executor.max_model_len()).unwrap_or(u32::MAX).min(args.max_model_len);
    let workload = workload(args, vocab, max_model_len)?;
    report.requests = workload.requests.len() as u32;
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            policy: PolicyConfig::default(),
            token_budget: args.token_budget,
            max_running: args.max_running,
            // All of them wait at first.
            max_waiting: args.requests,
            overlap: args.no_overlap.then_some(false),
        },
        kv: KvLayout::Paged { block_size: args.block_size },
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: Some(max_model_len),
    };
    let mut lengths: BTreeMap<u64, (u32, u32)> = workload
        .requests
        .iter()
        .map(|request| {
            let output = request.true_output_len.unwrap_or(request.max_tokens).min(request.max_tokens);
            (request.id, (request.prompt.len() as u32, output))
        })
        .collect();
    let gpu = Gpu::of(&info.device);
    let mut engine = Engine::new(executor, &config)?;
    interrupt::listen()?;
    let started = Instant::now();
    submit(&mut engine, workload, started);
    let bar = ProgressBar::new(report.requests.into()).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} requests, {eta} left")
            .context("the progress bar's template")?,
    );
    while engine.has_work() {
        if interrupt::requested() {
            return Ok(());
        }
        let output = engine.step(Instant::now())?;
        for event in output.events {
            match event {
                Event::Token { .. } => report.output_tokens += 1,
                Event::Finished { preemptions, .. } => {
                    report.preemptions += preemptions;
                    bar.inc(1);
                }
                // Of it nothing is computed.
                Event::Rejected { id, .. } => {
                    report.rejected += 1;
                    lengths.remove(&id);
                }
                Event::Cancelled { .. } | Event::Hypotheses { .. } => {}
            }
        }
        match output.progress {
            Progress::Ran(step) => {
                report.steps += 1;
                report.decode_steps += u64::from(step.batch.prefill_tokens == 0);
                let add = |sum: &mut f64, time: Duration| *sum += time.as_secs_f64();
                add(&mut report.schedule_s, step.schedule);
                add(&mut report.execute_s, step.execute);
                add(&mut report.sample_s, step.sample);
                add(&mut report.commit_s, step.commit);
            }
            Progress::Began => {}
            Progress::Idle { .. } if engine.has_work() => bail!("the engine idles with requests left"),
            Progress::Idle { .. } => {}
        }
    }
    bar.finish_and_clear();
    report.seconds = started.elapsed().as_secs_f64();
    report.prompt_tokens = lengths.values().map(|&(prompt, _)| u64::from(prompt)).sum();
    report.output_tokens_per_second = report.output_tokens as f64 / report.seconds;
    report.total_tokens_per_second = (report.output_tokens + report.prompt_tokens) as f64 / report.seconds;
    if let Some(gpu) = gpu {
        report.clocks = gpu.clocks_since(started);
        let work = Work::of_requests(&*engine.into_executor(), lengths.into_values(), report.steps);
        let (mfu, mbu) = work.shares(&gpu.peak, report.seconds);
        (report.mfu, report.mbu) = (mfu, Some(mbu));
    }
    print(args, &report)
}

/// The trace's first requests, without those that are longer than the model takes.
fn workload(args: &OfflineArgs, vocab: usize, max_model_len: u32) -> anyhow::Result<Workload> {
    let spec = WorkloadSpec {
        requests: args.requests as usize,
        lengths: LengthSource::Trace(TraceSource::new(&args.trace)),
        arrivals: ArrivalProcess::AllAtOnce {},
        length_scale: 1.0,
        over_limit: OverLimit::Drop,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    };
    let vocab_size = u32::try_from(vocab).unwrap_or(u32::MAX);
    let reserved_ids = RESERVED_IDS.min(vocab_size / 2);
    let limits = ModelLimits { vocab_size, reserved_ids, max_model_len };
    Workload::generate(&spec, 0, &limits).map_err(|error| match error {
        WorkloadError::Trace { .. } => {
            anyhow::anyhow!("{error}, of at most {max_model_len} tokens: choose another --requests")
        }
        error => error.into(),
    })
}

fn submit<E: quire_engine::Executor>(engine: &mut Engine<E>, workload: Workload, now: Instant) {
    let (sampling, no_stops): (Arc<SamplingParams>, Arc<[u32]>) = (Arc::default(), Arc::from([]));
    for request in workload.requests {
        let request = Request {
            id: request.id,
            prompt: request.prompt,
            max_tokens: request.max_tokens,
            true_output_len: request.true_output_len,
            stop_tokens: no_stops.clone(),
            sampling: sampling.clone(),
            fork_of: None,
            beam: None,
            priority: 0,
            cache_salt: 0,
        };
        engine.submit(request, now);
    }
}

fn print(args: &OfflineArgs, report: &Report) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
        return Ok(());
    }
    writeln!(out, "{}, {}", report.model, report.device)?;
    writeln!(
        out,
        "{} requests ({} rejected, {} preemptions), {} prompt and {} output tokens in {:.2} s",
        report.requests,
        report.rejected,
        report.preemptions,
        report.prompt_tokens,
        report.output_tokens,
        report.seconds
    )?;
    writeln!(
        out,
        "{:.0} output tokens/s, {:.0} tokens/s with prompts",
        report.output_tokens_per_second, report.total_tokens_per_second
    )?;
    writeln!(
        out,
        "{} steps ({} of decodes alone); schedule {:.2} s, execute {:.2} s, sample {:.2} s, commit {:.2} s",
        report.steps,
        report.decode_steps,
        report.schedule_s,
        report.execute_s,
        report.sample_s,
        report.commit_s
    )?;
    if let Some(clocks) = report.clocks {
        writeln!(
            out,
            "MFU {}, MBU {}, {:.0} MHz ({:.0} at the least), {:.0} W",
            percent(report.mfu),
            percent(report.mbu),
            clocks.sm_mhz,
            clocks.lowest_sm_mhz,
            clocks.watts
        )?;
    }
    Ok(())
}
