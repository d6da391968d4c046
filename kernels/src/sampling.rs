//! From logits to a token.
//!
//! The order is the one vLLM documents: repetition penalty, then frequency and presence penalties; greedy choice; else
//! temperature, min-p, top-k, top-p, and a draw. Top-p counts the mass that is left after min-p and top-k. Where
//! equal logits lie on both sides of an edge, the lowest ids stay, so that top-k keeps exactly k.
//!
//! The choice is a function of the logits, the rule, the tokens so far and one uniform number, whatever the machine's
//! number of threads. NaN logits count as minus infinity.

mod candidates;
mod passes;
mod penalties;
mod top;

use crate::KernelError;
use crate::cpu::Isa;
use candidates::Candidates;
use penalties::Penalties;

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingRule {
    /// Divides the logits; 0 (or anything that is no positive number) is the greedy choice.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest of the most probable tokens whose probabilities sum to this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this share of the most probable one's probability; 0 drops none.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens in prompt or output (Keskar et al. 2019);
    /// 1 is none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 is none.
    pub presence_penalty: f32,
    /// Subtracted for each occurrence in the output; 0 is none.
    pub frequency_penalty: f32,
}

impl Default for SamplingRule {
    /// Greedy, without penalties.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
        }
    }
}

/// A token and its log-probability under the model: the log-softmax of the logits before penalties and temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Chooses tokens on the CPU; keeps its memory from call to call.
#[derive(Debug)]
pub struct Sampler {
    isa: Isa,
    penalties: Penalties,
    candidates: Candidates,
    weights: Vec<f32>,
    sums: Vec<f64>,
}

impl Sampler {
    /// A sampler that uses the instructions of `isa`.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] when this machine lacks them.
    pub fn new(isa: Isa) -> Result<Self, KernelError> {
        Ok(Self {
            isa: isa.require()?,
            penalties: Penalties::default(),
            candidates: Candidates::default(),
            weights: Vec::new(),
            sums: Vec::new(),
        })
    }

    /// Chooses the token that follows `history`, of which the first `prompt_len` tokens are the prompt. `uniform` in
    /// [0, 1) decides the draw. The logits are left with the penalties applied.
    ///
    /// # Panics
    /// When there are no logits.
    pub fn sample(
        &mut self,
        logits: &mut [f32],
        rule: &SamplingRule,
        history: &[u32],
        prompt_len: usize,
        uniform: f64,
    ) -> Choice {
        assert!(!logits.is_empty(), "a choice among no tokens");
        let greatest = passes::clean(self.isa, logits);
        if greatest == f32::NEG_INFINITY {
            return Choice { token: 0, logprob: f32::NEG_INFINITY };
        }
        let all = passes::Weighting { greatest, inverse_temperature: 1.0, cut: f32::NEG_INFINITY };
        let log_total = passes::total(self.isa, logits, all).ln();
        let penalized = self.penalties.apply(logits, rule, history, prompt_len);
        let greatest = if penalized { passes::clean(self.isa, logits) } else { greatest };
        let token = if rule.temperature > 0.0 && greatest > f32::NEG_INFINITY {
            self.draw(logits, rule, greatest, uniform)
        } else {
            first_of(logits, greatest)
        };
        let original = self.penalties.original(token).unwrap_or(logits[token]);
        let logprob = f64::from(original) - f64::from(all.greatest) - log_total;
        Choice { token: token as u32, logprob: logprob as f32 }
    }

    /// Draws from what the rule leaves. `greatest` is the greatest logit, and finite.
    fn draw(&mut self, logits: &[f32], rule: &SamplingRule, greatest: f32, uniform: f64) -> usize {
        // Bounded, so that no difference of logits, zero or infinite, becomes NaN.
        let inverse_temperature = (1.0 / rule.temperature).clamp(1e-30, 1e30);
        // The most probable token stays under every min-p.
        let cut = match rule.min_p {
            p if p > 0.0 => (greatest + rule.temperature * p.ln()).min(greatest),
            _ => f32::NEG_INFINITY,
        };
        let weighting = passes::Weighting { greatest, inverse_temperature, cut };
        let top_k = if rule.top_k == 0 { logits.len() } else { (rule.top_k as usize).min(logits.len()) };
        if top_k < logits.len() {
            self.candidates.select(self.isa, logits, top_k, weighting);
            let total = self.candidates.total();
            self.candidates.keep_mass(f64::from(rule.top_p) * total);
            return self.candidates.draw(uniform);
        }
        if rule.top_p < 1.0 {
            let total = passes::total(self.isa, logits, weighting);
            let mass = f64::from(rule.top_p) * total;
            let mut count = 64;
            loop {
                self.candidates.select(self.isa, logits, count, weighting);
                if self.candidates.keep_mass(mass) || count >= logits.len() {
                    return self.candidates.draw(uniform);
                }
                count *= 8;
            }
        }
        passes::weigh(self.isa, logits, weighting, &mut self.weights, &mut self.sums);
        draw_by_id(&self.weights, &self.sums, uniform)
    }
}

/// The first token with logit `greatest`.
fn first_of(logits: &[f32], greatest: f32) -> usize {
    const RUN: usize = 256;
    // A run is tested whole, which vectorizes, before it is searched.
    let hit = |run: &&[f32]| run.iter().fold(false, |hit, &x| hit | (x == greatest));
    let skipped = logits.chunks(RUN).take_while(|run| !hit(run)).count() * RUN;
    let rest = logits.get(skipped..).unwrap_or_default();
    rest.iter().position(|&x| x == greatest).map_or(0, |i| skipped + i)
}

/// Inverts the cumulative distribution in the order of ids; `sums` are those of runs of [`passes::RUN`] weights.
fn draw_by_id(weights: &[f32], sums: &[f64], uniform: f64) -> usize {
    let mut left = uniform * sums.iter().sum::<f64>();
    let mut chosen = 0;
    for (run, (weights, sum)) in weights.chunks(passes::RUN).zip(sums).enumerate() {
        if left >= *sum {
            left -= sum;
        } else {
            for (i, &weight) in weights.iter().enumerate() {
                if weight > 0.0 {
                    chosen = run * passes::RUN + i;
                    left -= f64::from(weight);
                    if left < 0.0 {
                        return chosen;
                    }
                }
            }
            return chosen;
        }
    }
    // Rounding left a remainder past the end: the last token that has any weight.
    weights.iter().rposition(|&weight| weight > 0.0).unwrap_or(chosen)
}
