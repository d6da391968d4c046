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

/// Another device's idea of it, to propose by.
const DRAFT: [[f64; 3]; 3] = [[0.5, 0.3, 0.2], [0.3, 0.3, 0.4], [0.2, 0.4, 0.4]];

/// Which of the random numbers of a token's place: each use has its own.
#[derive(Debug, Clone, Copy)]
enum Use {
    /// To draw the token.
    Draw = 0,
    /// To propose one.
    Propose = 1,
    /// To accept a proposal.
    Accept = 2,
    /// To draw another in the place of one refused.
    Replace = 3,
}

/// A function of the request's seed and the token's index.
fn number(seed: u64, index: u32, of: Use) -> f64 {
    StdRng::seed_from_u64(seed * 1000 + u64::from(index) + ((of as u64) << 40)).random()
}

fn draw(weights: &[f64; 3], number: f64) -> u32 {
    let mut rest = number * weights.iter().sum::<f64>();
    let token = weights.iter().position(|weight| {
        rest -= weight;
        rest < 0.0
    });
    token.unwrap_or(weights.len() - 1) as u32
}

/// What the device gives out where a token was proposed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Verifier {
    /// What it would have sampled: this engine's.
    #[default]
    Sampled,
    /// The proposal by its chance, or else one of the rest: the rejection sampling of Leviathan et al., for proposals drawn by
    /// [`DRAFT`].
    Rejection,
    /// Broken: accepts by the square root of the chance.
    AcceptsTooOften,
    /// Broken: replaces what it refuses by a draw from the whole.
    ReplacesByTheWhole,
    /// Broken: accepts by the number that the proposal was drawn with.
    SharesTheNumber,
}

/// Draws tokens by [`NEXT`], each with a random number that is a function of the seed and the token's index.
#[derive(Debug, Default)]
struct Dice {
    verifier: Verifier,
    /// Of each row to sample the last token, and the one proposed to follow.
    last: Vec<(u32, Option<u32>)>,
    queue: SampledQueue,
}

impl Dice {
    fn sample_one(&self, row: &SampleRow, (last, proposed): (u32, Option<u32>)) -> u32 {
        let of = |of| number(row.params.seed, row.output_index, of);
        let (next, draft) = (&NEXT[last as usize], &DRAFT[last as usize]);
        let proposed = proposed.filter(|_| self.verifier != Verifier::Sampled);
        let Some(proposed) = proposed else { return draw(next, of(Use::Draw)) };
        let chance = (next[proposed as usize] / draft[proposed as usize]).min(1.0);
        let is_accepted = match self.verifier {
            Verifier::AcceptsTooOften => of(Use::Accept) < chance.sqrt(),
            Verifier::SharesTheNumber => of(Use::Propose) < chance,
            _ => of(Use::Accept) < chance,
        };
        let rest = [0, 1, 2].map(|token| (next[token] - draft[token]).max(0.0));
        match self.verifier {
            _ if is_accepted => proposed,
            Verifier::ReplacesByTheWhole => draw(next, of(Use::Replace)),
            _ => draw(&rest, of(Use::Replace)),
        }
    }
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
        self.last = batch.logit_rows.iter().map(|&row| (batch.tokens[row as usize], None)).collect();
        for span in &batch.drafts {
            for index in 0..span.drafted {
                let proposed = batch.tokens[(span.row + 1 + index) as usize];
                self.last[(span.sample + index) as usize].1 = Some(proposed);
            }
        }
        Ok(())
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        let sampled = rows.iter().zip(&self.last).map(|(row, &last)| {
            let token = self.sample_one(row, last);
            Sampled { token, logprob: None, top: None }
        });
        self.queue.push(sampled.collect())
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.queue.pop()
    }
}

/// Who proposes.
#[derive(Debug, Clone, Copy)]
enum Proposes {
    /// The likeliest tokens by [`NEXT`].
    Likeliest,
    /// Tokens drawn by [`DRAFT`], with these numbers. With those that the device draws with, it is what draft models do.
    Drawn(Use),
}

impl Drafter for Proposes {
    fn propose(&mut self, context: DraftContext<'_>, most: u32, drafts: &mut Vec<u32>) {
        let mut last = context.tokens[context.tokens.len() - 1];
        // The prompt is one token, and seeds are ids.
        let first = context.tokens.len() as u32 - 1;
        for index in first..first + most {
            last = match *self {
                Self::Likeliest => {
                    let next = &NEXT[last as usize];
                    (0..next.len()).max_by(|&a, &b| next[a].total_cmp(&next[b])).expect("tokens") as u32
                }
                Self::Drawn(of) => draw(&DRAFT[last as usize], number(context.id, index, of)),
            };
            drafts.push(last);
        }
    }
}

/// Outputs of many requests that begin alike, and the share of proposals computed that was accepted.
fn outputs(
    drafter: Option<DrafterConfig>,
    proposes: Option<Proposes>,
    verifier: Verifier,
) -> (Vec<Vec<u32>>, f64) {
    let config = EngineConfig {
        scheduler: SchedulerConfig { token_budget: 4096, max_running: 1024, ..SchedulerConfig::default() },
        speculation: drafter
            .map(|drafter| SpeculationConfig { drafter, length: DraftLength::Fixed { tokens: 3 } }),
        ..EngineConfig::default()
    };
    let drafter = proposes.map(|proposes| Box::new(proposes) as Box<dyn Drafter>);
    let device = Dice { verifier, ..Dice::default() };
    let mut engine = Engine::with_parts(device, &config, EngineParts { policy: None, drafter }).unwrap();
    let mut outputs = vec![Vec::new(); REQUESTS];
    for id in 0..REQUESTS as u64 {
        let sampling = SamplingParams { temperature: 1.0, seed: id, ..SamplingParams::default() };
        let asked = Request { prompt: vec![2], sampling: sampling.into(), ..request(id, 1, OUTPUT as u32) };
        engine.submit(asked, Instant::now());
    }
    let (mut accepted, mut drafted) = (0, 0);
    while engine.has_work() {
        let output = engine.step(Instant::now()).unwrap();
        for event in output.events {
            if let Event::Token { id, sampled } = event {
                outputs[id as usize].push(sampled.token);
            }
        }
        if let quire_engine::Progress::Ran(stats) = output.progress {
            accepted += stats.batch.accepted_tokens;
            drafted += stats.batch.drafted_tokens;
        }
    }
    (outputs, f64::from(accepted) / f64::from(drafted.max(1)))
}

/// The same with proposals from outside.
fn speculated(proposes: Proposes, verifier: Verifier) -> (Vec<Vec<u32>>, f64) {
    outputs(Some(DrafterConfig::External {}), Some(proposes), verifier)
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

// 80 degrees of freedom: the statistic over them has a standard deviation of 0.16.

#[test]
fn the_joint_distribution_is_kept_whatever_proposes() {
    let (plain, _) = outputs(None, None, Verifier::Sampled);
    assert!(chi_square(&plain) < 1.5, "{}", chi_square(&plain));
    let mut shares = Vec::new();
    for proposes in [Proposes::Likeliest, Proposes::Drawn(Use::Propose), Proposes::Drawn(Use::Draw)] {
        let (speculated, share) = speculated(proposes, Verifier::Sampled);
        assert!(chi_square(&speculated) < 1.5, "{proposes:?}: {}", chi_square(&speculated));
        assert!(speculated == plain, "{proposes:?}: token by token, even");
        shares.push(share);
    }
    // Draws with the same numbers agree more often than draws with others.
    assert!(shares[0] > 0.1 && shares[2] > shares[1] + 0.2, "{shares:?}");
}

#[test]
fn a_broken_verifier_is_found() {
    // One that accepts whatever is proposed, or one in ten.
    for (acceptance, least) in [(1.0, 10.0), (0.1, 3.0)] {
        let synthetic = DrafterConfig::Synthetic { acceptance, seed: 0 };
        let (broken, _) = outputs(Some(synthetic), None, Verifier::Sampled);
        assert!(chi_square(&broken) > least, "{acceptance}: {}", chi_square(&broken));
    }
    // Rejection sampling keeps the distribution too, and slips of it do not.
    let drawn = Proposes::Drawn(Use::Propose);
    let (kept, _) = speculated(drawn, Verifier::Rejection);
    assert!(chi_square(&kept) < 1.5, "{}", chi_square(&kept));
    for verifier in [Verifier::AcceptsTooOften, Verifier::ReplacesByTheWhole, Verifier::SharesTheNumber] {
        let (broken, _) = speculated(drawn, verifier);
        assert!(chi_square(&broken) > 3.0, "{verifier:?}: {}", chi_square(&broken));
    }
}
