//! Several outputs of one prompt: samples, or what a beam search finds.

use std::io::Write;
use std::time::Instant;

use anyhow::bail;
use clap::{Args, ValueEnum};
use quire_engine::{
    BeamSearch, EarlyStopping, Engine, EngineConfig, Event, FinishReason, MAX_BEAM_WIDTH, MAX_SAMPLES,
    ModelExecutor, Parallel, ParallelSamples, Request, SchedulerConfig, Tokenizer,
};

use crate::interrupt;
use crate::stop_text::StopText;

#[derive(Args)]
pub(crate) struct OutputArgs {
    /// Write this many outputs, at the end; needs a temperature to differ.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_SAMPLES as i64))]
    outputs: u32,
    /// Generate this many and write those of the highest mean log-probability a token [default: as many as are written].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_SAMPLES as i64))]
    best_of: Option<u32>,
    /// Search with this many beams, and write what they find.
    #[arg(long, conflicts_with_all = ["outputs", "best_of", "temperature"],
        value_parser = clap::value_parser!(u32).range(1..=MAX_BEAM_WIDTH as i64))]
    beam_width: Option<u32>,
    /// Rank beams by the sum of log-probabilities over the length to this power: more favours long outputs.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, requires = "beam_width")]
    length_penalty: f32,
    /// When a beam search with enough outputs ends.
    #[arg(long, value_enum, default_value_t = Early::Unlikely, requires = "beam_width")]
    early_stopping: Early,
}

#[derive(Clone, Copy, ValueEnum)]
enum Early {
    /// At once.
    Always,
    /// When the best beam would rank below them at its present length.
    Unlikely,
    /// When no beam can rank above them at any length.
    Impossible,
}

/// What is asked for beside one stream of tokens.
pub(crate) enum Outputs {
    Samples(Parallel),
    Beams(BeamSearch),
}

/// Outputs, their log-probabilities where known, and why the engine refused, if it did.
struct Found {
    tokens: Vec<u32>,
    logprob: Option<f64>,
    reason: Option<FinishReason>,
}

impl OutputArgs {
    /// What they ask for; none of a single sample, which can be streamed.
    pub(crate) fn outputs(&self) -> anyhow::Result<Option<Outputs>> {
        if let Some(width) = self.beam_width {
            let early_stopping = match self.early_stopping {
                Early::Always => EarlyStopping::Always,
                Early::Unlikely => EarlyStopping::Unlikely,
                Early::Impossible => EarlyStopping::Impossible,
            };
            let search = BeamSearch { width, length_penalty: self.length_penalty, early_stopping };
            search.validate().map_err(anyhow::Error::msg)?;
            return Ok(Some(Outputs::Beams(search)));
        }
        let parallel = Parallel { n: self.outputs, best_of: self.best_of.unwrap_or(self.outputs) };
        parallel.validate().map_err(anyhow::Error::msg)?;
        Ok((parallel.best_of > 1).then_some(Outputs::Samples(parallel)))
    }
}

impl Outputs {
    /// Sequences that run together.
    pub(crate) fn sequences(&self) -> u32 {
        match self {
            Self::Samples(parallel) => parallel.best_of,
            Self::Beams(search) => search.width,
        }
    }

    /// Runs the request to its end and writes what came of it.
    pub(crate) fn write(
        self,
        executor: Box<dyn ModelExecutor>,
        token_budget: u32,
        request: Request,
        tokenizer: &Tokenizer,
        stops: &[String],
    ) -> anyhow::Result<()> {
        let max_running = self.sequences();
        let scheduler = SchedulerConfig { token_budget, max_running, ..SchedulerConfig::default() };
        let mut engine = Engine::new(executor, &EngineConfig { scheduler, ..EngineConfig::default() })?;
        let stop_tokens = request.stop_tokens.clone();
        let found = self.run(&mut engine, request, tokenizer, stops)?;
        if found.iter().any(|found| found.reason == Some(FinishReason::KvExhausted)) {
            eprintln!("quire: the KV memory was full before an output's end: raise --kv-mib for more");
        }
        let mut out = std::io::stdout().lock();
        for (number, found) in (1..).zip(found) {
            let mut text = tokenizer.stream();
            let mut whole = String::new();
            for token in found.tokens.iter().filter(|token| !stop_tokens.contains(token)) {
                whole += &text.push(*token)?;
            }
            whole += &text.finish()?;
            let mut stop = StopText::new(stops.to_vec());
            let shown = stop.push(&whole);
            let whole = if shown.ended { shown.text } else { shown.text + &stop.finish() };
            match found.logprob {
                Some(logprob) => {
                    let mean = logprob / found.tokens.len().max(1) as f64;
                    writeln!(out, "--- {number} (log-probability {logprob:.2}, {mean:.3} a token)\n{whole}")?;
                }
                None => writeln!(out, "--- {number}\n{whole}")?,
            }
        }
        Ok(())
    }

    fn run(
        &self,
        engine: &mut Engine<Box<dyn ModelExecutor>>,
        request: Request,
        tokenizer: &Tokenizer,
        stops: &[String],
    ) -> anyhow::Result<Vec<Found>> {
        match *self {
            Self::Beams(search) => {
                engine.submit(Request { beam: Some(search), ..request }, Instant::now());
                let mut found = Vec::new();
                run(engine, |_, event| match event {
                    Event::Hypotheses { hypotheses, .. } => {
                        found = hypotheses;
                        Ok(())
                    }
                    Event::Rejected { reason, .. } => bail!("the request cannot run: {reason}"),
                    _ => Ok(()),
                })?;
                let one = |found: quire_engine::Hypothesis| Found {
                    tokens: found.tokens,
                    logprob: Some(found.logprob),
                    reason: Some(found.reason),
                };
                Ok(found.into_iter().map(one).collect())
            }
            Self::Samples(parallel) => {
                let stop_tokens = request.stop_tokens.clone();
                let mut ids = request.id..;
                ids.next();
                let requests = parallel
                    .requests(request, || ids.next().expect("there are more ids than samples"))
                    .map_err(anyhow::Error::msg)?;
                let mut samples = ParallelSamples::new(parallel, &requests);
                requests.into_iter().for_each(|request| engine.submit(request, Instant::now()));
                // What comes after a stop would count in the ranking, and would be computed for nothing.
                let watch = |_| (tokenizer.stream(), StopText::new(stops.to_vec()));
                let mut watched: Vec<_> = (0..parallel.best_of).map(watch).collect();
                run(engine, |engine, event| {
                    if let (Some(index), Event::Token { id, sampled }) = (samples.observe(&event), &event)
                        && !stops.is_empty()
                        && !stop_tokens.contains(&sampled.token)
                    {
                        let (text, stop) = &mut watched[index];
                        if stop.push(&text.push(sampled.token)?).ended {
                            samples.stop(index);
                            engine.cancel(*id);
                        }
                    }
                    Ok(())
                })?;
                let ranked = parallel.best_of > parallel.n;
                let best =
                    samples.into_best().map_err(|why| anyhow::anyhow!("the request cannot run: {why}"))?;
                let one = |sample: quire_engine::Sample| Found {
                    tokens: sample.tokens,
                    logprob: ranked.then_some(sample.logprob),
                    reason: sample.reason,
                };
                Ok(best.into_iter().map(one).collect())
            }
        }
    }
}

/// Runs what was submitted to its end, or until the user interrupts: then there is nothing whole to show.
fn run(
    engine: &mut Engine<Box<dyn ModelExecutor>>,
    mut take: impl FnMut(&mut Engine<Box<dyn ModelExecutor>>, Event) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    while engine.has_work() {
        if interrupt::requested() {
            bail!("interrupted before the outputs were whole");
        }
        for event in engine.step(Instant::now())?.events {
            take(engine, event)?;
        }
    }
    Ok(())
}
