//! `quire generate`: text that follows a prompt.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use quire_engine::{
    ChatMessage, Engine, EngineConfig, EngineParts, EngineService, Event, Executor, FinishReason, KvCapacity,
    KvLayout, ModelExecutor, Request, SamplingParams, SchedulerConfig, StepStats, TimedEvent, Tokenizer,
};

use crate::draft_args::{DraftArgs, Drafts, Speculation};
use crate::interrupt;
use crate::model_args::ModelArgs;
use crate::outputs::OutputArgs;
use crate::stop_text::StopText;

/// Rows of a prefill chunk: large enough for the matrix products to be at their best.
const CHUNK: usize = 512;
/// Between looks for an interrupt while no token comes.
const INTERRUPT: Duration = Duration::from_millis(100);

#[derive(Args)]
#[command(after_help = "Examples:
  quire generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf \"Why is the sky blue?\"
  quire generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf --raw \"The capital of France is\" --max-tokens 20
  quire generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf --outputs 3 --best-of 8 --temperature 0.8 \"A title?\"
  quire generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf --beam-width 4 --raw \"The capital of France is\"
  quire generate --model models/SmolLM2-135M-Instruct.Q4_1.gguf --drafter n-gram --stats \"Repeat: a cat, a dog, a bird\"
  echo \"Tell a joke\" | quire generate --model models/my-model --temperature 0.7 --seed 1 --stats -")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What to say to the model; - reads it from standard input.
    prompt: String,
    /// Give the model the prompt as it is, without its chat template.
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// What to tell the model before the prompt [default: what its chat template says].
    #[arg(long)]
    system: Option<String>,
    /// The most tokens to generate.
    #[arg(long, short = 'n', default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// End the output before this text; may be given more than once.
    #[arg(long, conflicts_with = "beam_width")]
    stop: Vec<String>,
    /// KV memory, MiB, of all devices together: it bounds the prompt and the output together.
    #[arg(long, default_value_t = 512)]
    kv_mib: u64,
    /// Write tokens per second to standard error at the end.
    #[arg(long, conflicts_with_all = ["outputs", "best_of", "beam_width"])]
    stats: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    outputs: OutputArgs,
    #[command(flatten)]
    draft: DraftArgs,
}

#[derive(Args)]
struct SamplingArgs {
    /// Randomness; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Choose among this many of the most probable tokens; 0 is all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Choose among the most probable tokens up to this mass.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Leave out tokens below this share of the most probable one's probability.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Seed of the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Multiplicative penalty on tokens seen before; 1 is none.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted for each time that a token is in the output.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
}

impl SamplingArgs {
    fn params(&self) -> anyhow::Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            ..SamplingParams::default()
        };
        params.validate().map_err(anyhow::Error::msg)?;
        Ok(params)
    }
}

pub(crate) fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let sampling = args.sampling.params()?;
    let outputs = args.outputs.outputs()?;
    let source = args.model.source()?;
    if source.is_dummy() {
        bail!(
            "random weights write no text and have no tokenizer: try `quire bench --model {}`",
            args.model.model
        );
    }
    let tokenizer = source.tokenizer()?;
    let prompt = prompt_tokens(&args, &tokenizer)?;
    let started = Instant::now();
    let kv_bytes = args.kv_mib.checked_mul(1 << 20).context("--kv-mib is too large")?;
    let sequences =
        outputs.as_ref().map_or(1 + args.draft.most() as usize, |outputs| outputs.sequences() as usize);
    let mut executor = args.model.load(&source, KvCapacity::Bytes(kv_bytes), CHUNK, sequences)?;
    let loaded = started.elapsed();
    let room = executor.max_model_len();
    if prompt.len() >= room {
        bail!("the prompt has {} tokens, and prompt and output together may have {room}", prompt.len());
    }
    // Before the engine does it without a word. The layout is that of the engines below, the default.
    ModelArgs::prepare(&mut *executor, KvLayout::default())?;
    let prompt_len = prompt.len();
    let request = Request {
        id: 0,
        prompt,
        max_tokens: args.max_tokens,
        true_output_len: None,
        stop_tokens: tokenizer.stop_tokens().into(),
        sampling: Arc::new(sampling),
        fork_of: None,
        beam: None,
        priority: 0,
        cache_salt: 0,
    };
    interrupt::listen()?;
    if let Some(outputs) = outputs {
        return outputs.write(executor, CHUNK as u32, request, &tokenizer, &args.stop);
    }
    let speculation = args.draft.speculation(&args.model, &*executor, CHUNK)?;
    let timing = stream(executor, speculation, request, &tokenizer, args.stop)?;
    if timing.reason == Some(FinishReason::KvExhausted) {
        eprintln!("quire: the KV memory is full after {} tokens: raise --kv-mib for more", timing.tokens);
    }
    if args.stats {
        timing.print(loaded, prompt_len);
    }
    Ok(())
}

fn prompt_tokens(args: &GenerateArgs, tokenizer: &Tokenizer) -> anyhow::Result<Vec<u32>> {
    let mut text = args.prompt.clone();
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
        // The line end that `echo` and editors add is not part of what is asked.
        text.truncate(text.trim_end_matches(['\r', '\n']).len());
    }
    if text.is_empty() {
        bail!("the prompt is empty");
    }
    let tokens = if args.raw {
        tokenizer.encode(&text)?
    } else {
        let system = args.system.iter().map(|system| ChatMessage::new("system", system));
        let messages: Vec<_> = system.chain([ChatMessage::new("user", text)]).collect();
        tokenizer.encode_chat(&messages).context("(--raw gives the model the prompt as it is)")?
    };
    if tokens.is_empty() {
        bail!("the tokenizer makes no token of the prompt");
    }
    Ok(tokens)
}

/// When things happened.
struct Timing {
    started: Instant,
    first: Option<Instant>,
    last: Instant,
    tokens: u32,
    drafts: Drafts,
    reason: Option<FinishReason>,
}

/// Runs the request and writes its text as it comes.
fn stream(
    executor: Box<dyn ModelExecutor>,
    speculation: Speculation,
    request: Request,
    tokenizer: &Tokenizer,
    stops: Vec<String>,
) -> anyhow::Result<Timing> {
    let scheduler =
        SchedulerConfig { token_budget: CHUNK as u32, max_running: 1, ..SchedulerConfig::default() };
    let Speculation { config: speculation, drafter } = speculation;
    let config = EngineConfig { scheduler, speculation, ..EngineConfig::default() };
    let engine = Engine::with_parts(executor, &config, EngineParts { policy: None, drafter })?;
    // Text is made and written here while the engine's thread computes the next token.
    let mut engine = EngineService::spawn(engine)?;
    let (mut text, mut stops, mut out) = (tokenizer.stream(), StopText::new(stops), std::io::stdout().lock());
    let stop_tokens = request.stop_tokens.clone();
    let started = Instant::now();
    let mut timing =
        Timing { started, first: None, last: started, tokens: 0, drafts: Drafts::default(), reason: None };
    engine.submit(request)?;
    while timing.reason.is_none() && !interrupt::requested() {
        let Some(TimedEvent { at, event }) = engine.next_event(Instant::now() + INTERRUPT)? else { continue };
        match event {
            Event::Token { sampled, .. } => {
                timing.last = at;
                timing.first.get_or_insert(at);
                timing.tokens += 1;
                if stop_tokens.contains(&sampled.token) {
                    continue;
                }
                let shown = stops.push(&text.push(sampled.token)?);
                out.write_all(shown.text.as_bytes()).and_then(|()| out.flush())?;
                if shown.ended {
                    timing.reason = Some(FinishReason::Stop);
                    writeln!(out)?;
                    return Ok(timing.with_steps(&engine.take_steps()));
                }
            }
            Event::Finished { reason, .. } => timing.reason = Some(reason),
            Event::Rejected { reason, .. } => bail!("the request cannot run: {reason}"),
            Event::Cancelled { .. } | Event::Hypotheses { .. } => {}
        }
    }
    let rest = stops.push(&text.finish()?).text + &stops.finish();
    writeln!(out, "{rest}")?;
    Ok(timing.with_steps(&engine.take_steps()))
}

impl Timing {
    /// With what was proposed in these steps. (The engine may be some tokens ahead where a text ends the output.)
    fn with_steps(mut self, steps: &[StepStats]) -> Self {
        steps.iter().for_each(|step| self.drafts.count(&step.batch));
        self
    }

    fn print(&self, loaded: Duration, prompt: usize) {
        let prefill = self.first.map_or(Duration::ZERO, |first| first - self.started);
        let decode = self.first.map_or(Duration::ZERO, |first| self.last - first);
        let rate = |tokens: f64, time: Duration| match time.as_secs_f64() {
            0.0 => "-".to_owned(),
            seconds => format!("{:.1} tokens/s", tokens / seconds),
        };
        let end = match self.reason {
            Some(FinishReason::Stop) => "the model ended it",
            Some(FinishReason::Length) => "length limit",
            Some(FinishReason::KvExhausted) => "KV memory full",
            None => "interrupted",
        };
        eprintln!("load     {:.2} s", loaded.as_secs_f64());
        eprintln!(
            "prefill  {prompt} tokens in {:.3} s: {}",
            prefill.as_secs_f64(),
            rate(prompt as f64, prefill)
        );
        let later = self.tokens.saturating_sub(1);
        eprintln!("decode   {later} tokens in {:.3} s: {}", decode.as_secs_f64(), rate(later.into(), decode));
        if let Some(line) = self.drafts.line(later) {
            eprintln!("{line}");
        }
        eprintln!("end      after {} tokens: {end}", self.tokens);
    }
}
