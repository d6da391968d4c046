//! The distribution of what speculation gives out, over a device whose distribution is known.

use std::time::Instant;

use quire_engine::speculation::{DraftContext, Drafter};
use quire_engine::{
    DraftLength, DrafterConfig, Engine, EngineConfig, EngineError, EngineParts, Event, Executor, KvCopy,
    KvLayout, Request, SampleRow, Sampled, SampledQueue, SamplingParams, ScheduledBatch, SchedulerConfig,
    SpeculationConfig,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::fake::request;

/// Probability of the next token (column) by the last one (row).
const NEXT: [[f64; 3]; 3] = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.5, 0.25]];
/// Tokens of an output.
const OUTPUT: usize = 4;
const REQUESTS: usize = 20_000;

/// Draws tokens by [`NEXT`], each with a random number that is a function of the seed and the token's index.
#[derive(Debug, Default)]
struct Dice {
    last: Vec<u32>,
    queue: SampledQueue,
}

impl Executor for Dice {
    fn kv_slots(&self) -> usize {
        1 << 16
    }
    fn max_model_len(&self) -> usize {
        64
    }
    fn vocab_size(&self) -> usize {
        NEXT.len()
    }
    fn max_batch_rows(&self) -> usize {
        1 << 12
    }
    fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
        Ok(())
    }
    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        unreachable!("no K and V here: {copies:?}")
    }
    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        self.last = batch.logit_rows.iter().map(|&row| batch.tokens[row as usize]).collect();
        Ok(())
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        let sampled = rows.iter().zip(&self.last).map(|(row, &last)| {
            let seed = row.params.seed * 1000 + u64::from(row.output_index);
            let mut rest: f64 = StdRng::seed_from_u64(seed).random();
            let token = NEXT[last as usize].iter().position(|p| {
                rest -= p;
                rest < 0.0
            });
            Sampled { token: token.unwrap_or(NEXT.len() - 1) as u32, logprob: None, top: None }
        });
        self.queue.push(sampled.collect())
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.queue.pop()
    }
}

/// Proposes the likeliest tokens.
struct Likeliest;

impl Drafter for Likeliest {
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let mut last = context.tokens[context.tokens.len() - 1];
        for _ in 0..most {
            let next = &NEXT[last as usize];
            last = (0..next.len()).max_by(|&a, &b| next[a].total_cmp(&next[b])).expect("tokens") as u32;
            drafts.push(last);
        }
    }
}

/// Outputs of many requests that begin alike, and how many proposals were accepted.
fn outputs(drafter: Option<DrafterConfig>) -> (Vec<Vec<u32>>, u32) {
    let external = drafter == Some(DrafterConfig::External {});
    let config = EngineConfig {
        scheduler: SchedulerConfig { token_budget: 4096, max_running: 1024, ..SchedulerConfig::default() },
        speculation: drafter
            .map(|drafter| SpeculationConfig { drafter, length: DraftLength::Fixed { tokens: 3 } }),
        ..EngineConfig::default()
    };
    let parts =
        EngineParts { policy: None, drafter: external.then(|| Box::new(Likeliest) as Box<dyn Drafter>) };
    let mut engine = Engine::with_parts(Dice::default(), &config, parts).unwrap();
    let mut outputs = vec![Vec::new(); REQUESTS];
    for id in 0..REQUESTS as u64 {
        let sampling = SamplingParams { temperature: 1.0, seed: id, ..SamplingParams::default() };
        let asked = Request { prompt: vec![2], sampling: sampling.into(), ..request(id, 1, OUTPUT as u32) };
        engine.submit(asked, Instant::now());
    }
    let mut accepted = 0;
    while engine.has_work() {
        let output = engine.step(Instant::now()).unwrap();
        for event in output.events {
            if let Event::Token { id, sampled } = event {
                outputs[id as usize].push(sampled.token);
            }
        }
        if let quire_engine::Progress::Ran(stats) = output.progress {
            accepted += stats.batch.accepted_tokens;
        }
    }
    (outputs, accepted)
}

/// Pearson's statistic of whole outputs, all positions together, over its degrees of freedom.
fn chi_square(outputs: &[Vec<u32>]) -> f64 {
    let cells = NEXT.len().pow(OUTPUT as u32);
    let mut counts = vec![0.0; cells];
    for output in outputs {
        counts[output.iter().fold(0, |cell, &token| cell * NEXT.len() + token as usize)] += 1.0;
    }
    let probability = |mut cell: usize| {
        let mut tokens = [0; OUTPUT];
        for token in tokens.iter_mut().rev() {
            *token = cell % NEXT.len();
            cell /= NEXT.len();
        }
        tokens.iter().fold((1.0, 2), |(p, last), &token| (p * NEXT[last][token], token)).0
    };
    let terms = counts.iter().enumerate().map(|(cell, count)| {
        let expected = probability(cell) * outputs.len() as f64;
        (count - expected).powi(2) / expected
    });
    terms.sum::<f64>() / (cells - 1) as f64
}

#[test]
fn the_joint_distribution_is_kept_and_a_broken_verifier_is_found() {
    // 80 degrees of freedom: the statistic over them has a standard deviation of 0.16.
    let (plain, _) = outputs(None);
    assert!(chi_square(&plain) < 1.5, "{}", chi_square(&plain));
    let (speculated, accepted) = outputs(Some(DrafterConfig::External {}));
    assert!(chi_square(&speculated) < 1.5, "{}", chi_square(&speculated));
    assert!(accepted as usize > REQUESTS / 2);
    assert!(speculated == plain, "token by token, even");
    // A verifier that accepts whatever is proposed.
    let (broken, _) = outputs(Some(DrafterConfig::Synthetic { acceptance: 1.0, seed: 0 }));
    assert!(chi_square(&broken) > 10.0, "{}", chi_square(&broken));
}
