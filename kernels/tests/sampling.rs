//! Sampling by hand at the edges, on a CPU. `devices/sampling.rs` has what holds on every device: draws against the
//! float64 distribution, and the greedy choice.

use proptest::prelude::*;
use quire_kernels::cpu::Isa;
use quire_kernels::reference;
use quire_kernels::sampling::{Choice, Sampler, SamplingRule};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn random() -> SamplingRule {
    SamplingRule { temperature: 1.0, ..SamplingRule::default() }
}

fn sampler(isa: Isa) -> Sampler {
    Sampler::new(isa).expect("available")
}

fn sample(logits: &[f32], rule: &SamplingRule, uniform: f64) -> Choice {
    sampler(Isa::detect()).sample(&mut logits.to_vec(), rule, &[], 0, uniform)
}

/// Every token that 1,000 evenly spaced draws give.
fn support(logits: &[f32], rule: &SamplingRule) -> Vec<u32> {
    let mut tokens: Vec<u32> =
        (0..1000).map(|i| sample(logits, rule, f64::from(i) / 1000.0 + 0.0005).token).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

#[test]
fn logprob_is_of_the_unmodified_logits() {
    let logits = [1.0f32, 3.0, 2.0, -1.0];
    let log_total = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
    let rule = SamplingRule { repetition_penalty: 4.0, ..SamplingRule::default() };
    let choice = sampler(Isa::detect()).sample(&mut logits.to_vec(), &rule, &[1], 1, 0.0);
    assert_eq!(choice.token, 2);
    assert!((f64::from(choice.logprob) - (2.0 - log_total)).abs() < 1e-6);
    let rule = SamplingRule { temperature: 1e-3, presence_penalty: -9.0, ..SamplingRule::default() };
    let choice = sampler(Isa::detect()).sample(&mut logits.to_vec(), &rule, &[1, 3], 1, 0.5);
    assert_eq!(choice.token, 3);
    assert!((f64::from(choice.logprob) - (-1.0 - log_total)).abs() < 1e-6);
}

#[test]
fn penalties_by_hand() {
    // Prompt [0, 1], output [1, 2, 2]; token 9 is outside the vocabulary.
    let mut logits = [2.0, 2.0, -2.0, 2.0];
    let rule = SamplingRule {
        repetition_penalty: 2.0,
        presence_penalty: 0.25,
        frequency_penalty: 0.5,
        ..SamplingRule::default()
    };
    let choice = sampler(Isa::detect()).sample(&mut logits, &rule, &[0, 1, 1, 2, 2, 9], 2, 0.0);
    assert_eq!(choice.token, 3);
    assert_eq!(logits, [1.0, 1.0 - 0.75, -4.0 - 1.25, 2.0]);
}

#[test]
fn top_k_keeps_exactly_k() {
    let logits = [1.0, 2.0, 2.0, 2.0, 0.0];
    assert_eq!(support(&logits, &SamplingRule { top_k: 1, ..random() }), [1]);
    assert_eq!(support(&logits, &SamplingRule { top_k: 2, ..random() }), [1, 2]);
    assert_eq!(support(&logits, &SamplingRule { top_k: 4, ..random() }), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &SamplingRule { top_k: 0, ..random() }), [0, 1, 2, 3, 4]);
    assert_eq!(support(&logits, &SamplingRule { top_k: 100, ..random() }), [0, 1, 2, 3, 4]);
}

#[test]
fn top_p_keeps_the_fewest_that_reach_it() {
    // Probabilities 0.1, 0.5, 0.25, 0.15.
    let logits = [0.1f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.15f32.ln()];
    let rule = |top_p| SamplingRule { top_p, ..random() };
    assert_eq!(support(&logits, &rule(0.0)), [1]);
    assert_eq!(support(&logits, &rule(0.49)), [1]);
    assert_eq!(support(&logits, &rule(0.51)), [1, 2]);
    assert_eq!(support(&logits, &rule(0.76)), [1, 2, 3]);
    assert_eq!(support(&logits, &rule(0.95)), [0, 1, 2, 3]);
    // After top-k the mass is that of what is left: 0.5 / 0.75 = 0.67.
    assert_eq!(support(&logits, &SamplingRule { top_k: 2, ..rule(0.66) }), [1]);
    assert_eq!(support(&logits, &SamplingRule { top_k: 2, ..rule(0.68) }), [1, 2]);
}

#[test]
fn min_p_is_a_share_of_the_most_probable() {
    let logits = [0.1f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.15f32.ln()];
    let rule = |min_p| SamplingRule { min_p, ..random() };
    assert_eq!(support(&logits, &rule(0.0)), [0, 1, 2, 3]);
    assert_eq!(support(&logits, &rule(0.25)), [1, 2, 3]);
    assert_eq!(support(&logits, &rule(0.45)), [1, 2]);
    assert_eq!(support(&logits, &rule(1.0)), [1]);
    assert_eq!(support(&logits, &rule(7.0)), [1]);
    // The temperature comes first: at 2 the shares are square roots.
    assert_eq!(support(&logits, &SamplingRule { temperature: 2.0, ..rule(0.45) }), [1, 2, 3]);
    // And the mass of top-p is that of what min-p leaves: 0.5 / 0.9 = 0.56.
    assert_eq!(support(&logits, &SamplingRule { top_p: 0.54, ..rule(0.25) }), [1]);
}

#[test]
fn a_flat_distribution_needs_many_candidates() {
    let logits = vec![0.0; 10_000];
    let rule = SamplingRule { top_p: 0.9, ..random() };
    assert_eq!(sample(&logits, &rule, 0.0).token, 0);
    assert_eq!(sample(&logits, &rule, 0.999_999).token, 8999);
    assert_eq!(sample(&logits, &random(), 0.999_99).token, 9999);
}

#[test]
fn strange_numbers_are_harmless() {
    let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -1.0, 1e30, 1e-40];
    for isa in Isa::available() {
        let nothing = sampler(isa).sample(&mut [f32::NAN; 40], &random(), &[], 0, 0.5);
        assert_eq!(nothing, Choice { token: 0, logprob: f32::NEG_INFINITY });
        let only = sampler(isa).sample(&mut [f32::NAN, f32::NEG_INFINITY, -3.0], &random(), &[], 0, 0.9);
        assert_eq!(only.token, 2);
        let infinite = sampler(isa).sample(&mut [0.0, f32::INFINITY, f32::NAN], &random(), &[], 0, 0.9);
        assert_eq!(infinite.token, 1);
        for (i, &temperature) in strange.iter().enumerate() {
            for &x in &strange {
                let rule = SamplingRule {
                    temperature,
                    top_p: x,
                    min_p: strange[(i + 3) % 7],
                    repetition_penalty: strange[(i + 1) % 7],
                    presence_penalty: x,
                    frequency_penalty: strange[(i + 2) % 7],
                    top_k: i as u32,
                };
                let mut logits = [1.0, x, -2.0, strange[i], 0.5, 0.0];
                let choice = sampler(isa).sample(&mut logits, &rule, &[0, 1, 9], 1, 0.3);
                assert!(choice.token < 6);
            }
        }
    }
}

proptest! {
    /// Whatever the rule and the vocabulary, draws stay in the support and the quantiles are the reference's.
    #[test]
    fn draws_stay_in_the_support(
        size in 1usize..3000,
        spread in 0.0f32..20.0,
        temperature in 0.2f32..3.0,
        top_k in prop::option::of(1u32..400),
        top_p in prop::option::of(0.01f32..1.0),
        min_p in prop::option::of(0.0001f32..0.9),
        uniform in 0.0f64..1.0,
        seed in any::<u64>(),
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let logits: Vec<f32> = (0..size).map(|_| spread * rng.random::<f32>()).collect();
        let rule = SamplingRule {
            temperature,
            top_k: top_k.unwrap_or(0),
            top_p: top_p.unwrap_or(1.0),
            min_p: min_p.unwrap_or(0.0),
            ..SamplingRule::default()
        };
        let expected = reference::distribution(&logits, &rule, &[], 0);
        let mut order: Vec<usize> = (0..size).collect();
        if top_k.is_some_and(|k| (k as usize) < size) || top_p.is_some() {
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        }
        for isa in Isa::available() {
            let choice = sampler(isa).sample(&mut logits.clone(), &rule, &[], 0, uniform);
            let before: f64 = order.iter().take_while(|t| **t != choice.token as usize).map(|&t| expected[t]).sum();
            let slack = 1e-4;
            prop_assert!(uniform > before - slack, "{isa:?}: {uniform} at {before}");
            prop_assert!(uniform < before + expected[choice.token as usize] + slack, "{isa:?}: {uniform} at {before}");
        }
    }
}
