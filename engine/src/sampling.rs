//! From a request's sampling parameters to what the kernels' samplers take.

use quire_kernels::generated::mix;
use quire_kernels::sampling::{Choice, SamplingRule};

use crate::{SamplingParams, TokenLogprob};

/// The rule of these parameters.
pub(crate) fn rule(params: &SamplingParams) -> SamplingRule {
    SamplingRule {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
    }
}

/// The most probable tokens of a row, as clients see them.
pub(crate) fn token_logprobs(top: Vec<Choice>) -> Box<[TokenLogprob]> {
    top.into_iter().map(|choice| TokenLogprob { token: choice.token, logprob: choice.logprob }).collect()
}

/// The uniform number in [0, 1) that draws output token `index` of a request with this seed: a function of the two
/// alone, so that the draw does not depend on what else is in the batch.
pub(crate) fn uniform(seed: u64, index: u32) -> f64 {
    let bits = mix(mix(seed).wrapping_add(u64::from(index)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uniform_numbers_are_uniform_and_a_function_of_seed_and_index() {
        assert_eq!(uniform(7, 3), uniform(7, 3));
        let draws: Vec<f64> =
            (0..100).flat_map(|seed| (0..100).map(move |index| uniform(seed, index))).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        for tenth in 0..10 {
            let low = f64::from(tenth) / 10.0;
            let count = draws.iter().filter(|&&u| u >= low && u < low + 0.1).count();
            assert!((900..1100).contains(&count), "{count} of 10,000 in tenth {tenth}");
        }
    }
}
