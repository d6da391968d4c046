//! Rules of a batch of rows, packed as `kernels/cuda/sampling.cu` reads them.

use crate::sampling::SamplingRule;
use crate::{FED, KernelError};

/// Words of a row's rule: `RowRule` in `sampling.cu`.
pub(super) const RULE_WORDS: usize = 16;

/// What one row of logits is sampled with.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// How the token is chosen.
    pub rule: SamplingRule,
    /// Tokens so far, for penalties; without penalties it is not looked at. `FED + row` is what the batch before chose for
    /// that row; it had penalties then too.
    pub history: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Decides the draw; in [0, 1).
    pub uniform: f64,
    /// Whether the log-probability is wanted.
    pub logprob: bool,
    /// How many of the most probable tokens are wanted.
    pub top: usize,
}

/// Whether the rule draws; else it takes the greatest.
pub(super) fn draws(rule: &SamplingRule) -> bool {
    rule.temperature > 0.0
}

/// Whether the rule changes the logits of tokens seen.
pub(super) fn penalizes(rule: &SamplingRule) -> bool {
    let none =
        rule.repetition_penalty == 1.0 && rule.presence_penalty == 0.0 && rule.frequency_penalty == 0.0;
    !none
}

/// Tokens seen that the kernel must know.
fn history<'a>(request: &SampleRequest<'a>) -> &'a [u32] {
    if penalizes(&request.rule) { request.history } else { &[] }
}

/// Words that a batch takes.
pub(super) fn packed_words(requests: &[SampleRequest<'_>]) -> Result<usize, KernelError> {
    let words = requests.iter().map(|request| RULE_WORDS + history(request).len()).sum();
    match u32::try_from(words) {
        Ok(_) => Ok(words),
        Err(_) => Err(KernelError::Shape(format!("{words} tokens in the histories of a batch"))),
    }
}

/// The greatest row of the batch before whose token is in a history; only the last token of one may be unknown.
pub(super) fn newest_fed(requests: &[SampleRequest<'_>]) -> Option<u32> {
    requests.iter().filter_map(|request| history(request).last()?.checked_sub(FED)).max()
}

/// Packs a batch: a rule for each row, then the histories of those with penalties.
pub(super) fn pack(requests: &[SampleRequest<'_>], words: &mut [u32]) {
    let (rules, mut rest) = words.split_at_mut(requests.len() * RULE_WORDS);
    let mut at = rules.len();
    for (request, rule) in requests.iter().zip(rules.chunks_exact_mut(RULE_WORDS)) {
        let seen = history(request);
        rule.copy_from_slice(&rule_words(request, at, seen.len()));
        let (here, behind) = rest.split_at_mut(seen.len());
        here.copy_from_slice(seen);
        (rest, at) = (behind, at + seen.len());
    }
}

/// One row's rule as the kernel reads it; its history is `history_len` words from word `history` on.
fn rule_words(request: &SampleRequest<'_>, history: usize, history_len: usize) -> [u32; RULE_WORDS] {
    let rule = &request.rule;
    let uniform = request.uniform.to_bits();
    let [scale, scale_low] = scale(rule.temperature);
    // As on the CPU: what is less probable than `min_p` of the most probable lies this far below it.
    let min_p_offset = if rule.min_p > 0.0 { rule.temperature * rule.min_p.ln() } else { f32::NEG_INFINITY };
    [
        uniform as u32,
        (uniform >> 32) as u32,
        scale.to_bits(),
        scale_low.to_bits(),
        min_p_offset.to_bits(),
        rule.top_p.to_bits(),
        rule.top_k,
        rule.repetition_penalty.to_bits(),
        rule.presence_penalty.to_bits(),
        rule.frequency_penalty.to_bits(),
        history as u32,
        history_len as u32,
        request.prompt_len.min(history_len) as u32,
        0,
        0,
        0,
    ]
}

/// What turns a difference of logits into an exponent of 2, as the sum of two floats; zero for the greedy choice.
fn scale(temperature: f32) -> [f32; 2] {
    if temperature > 0.0 {
        // Bounded, so that no difference of logits, zero or infinite, becomes NaN.
        let scale = (1.0 / f64::from(temperature)).clamp(1e-30, 1e30) * std::f64::consts::LOG2_E;
        let high = scale as f32;
        [high, (scale - f64::from(high)) as f32]
    } else {
        [0.0; 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(rule: SamplingRule, history: &[u32]) -> SampleRequest<'_> {
        SampleRequest { rule, history, prompt_len: 2, uniform: 0.625, logprob: false, top: 0 }
    }

    fn packed(requests: &[SampleRequest<'_>]) -> Vec<u32> {
        let mut words = vec![u32::MAX; packed_words(requests).unwrap()];
        pack(requests, &mut words);
        words
    }

    #[test]
    fn rules_come_first_and_histories_behind_them() {
        let penalty = |repetition_penalty| SamplingRule { repetition_penalty, ..SamplingRule::default() };
        let words = packed(&[
            request(penalty(1.5), &[7, 8, 9]),
            request(penalty(1.0), &[1, 2, 3, 4]),
            request(penalty(0.5), &[]),
            request(penalty(2.0), &[5]),
        ]);
        assert_eq!(words.len(), 4 * RULE_WORDS + 4);
        assert_eq!(words[4 * RULE_WORDS..], [7, 8, 9, 5]);
        let spans: Vec<&[u32]> =
            words[..4 * RULE_WORDS].chunks(RULE_WORDS).map(|rule| &rule[10..13]).collect();
        // Where a history starts, its length, and how much of it is the prompt.
        assert_eq!(spans, [[64, 3, 2], [67, 0, 0], [67, 0, 0], [67, 1, 1]]);
    }

    #[test]
    fn tokens_of_the_batch_before_are_found_where_histories_count() {
        let penalty = SamplingRule { presence_penalty: 0.5, ..SamplingRule::default() };
        let none = SamplingRule::default();
        assert_eq!(newest_fed(&[request(penalty, &[1, 2]), request(none, &[FED + 9])]), None);
        assert_eq!(newest_fed(&[request(penalty, &[1, FED + 3]), request(penalty, &[FED])]), Some(3));
    }

    #[test]
    fn a_rule_is_packed_as_the_kernel_reads_it() {
        let rule = SamplingRule {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.25,
            repetition_penalty: 1.25,
            presence_penalty: -0.5,
            frequency_penalty: 0.75,
        };
        let words = packed(&[request(rule, &[])]);
        assert_eq!(u64::from(words[1]) << 32 | u64::from(words[0]), 0.625f64.to_bits());
        let float = |i: usize| f32::from_bits(words[i]);
        let scale = f64::from(float(2)) + f64::from(float(3));
        assert!((scale - 2.0 * std::f64::consts::LOG2_E).abs() < 1e-14);
        assert_eq!(float(4), 0.5 * 0.25f32.ln());
        assert_eq!([float(5), float(7), float(8), float(9)], [0.9, 1.25, -0.5, 0.75]);
        assert_eq!(words[6], 40);
        assert_eq!(words[13..], [0, 0, 0]);
    }

    #[test]
    fn what_is_no_positive_temperature_is_greedy() {
        for temperature in [0.0, -0.0, -1.0, f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(scale(temperature), [0.0; 2]);
        }
        for temperature in [1e-40, 1e-30, 1.0, 1e30, f32::INFINITY] {
            assert!(scale(temperature)[0] > 0.0 && scale(temperature)[0].is_finite());
        }
    }

    #[test]
    fn no_min_p_cuts_nothing() {
        for min_p in [0.0, -1.0, f32::NAN] {
            let rule = SamplingRule { temperature: 1.0, min_p, ..SamplingRule::default() };
            assert_eq!(f32::from_bits(packed(&[request(rule, &[])])[4]), f32::NEG_INFINITY);
        }
    }
}
