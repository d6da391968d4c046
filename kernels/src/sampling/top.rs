//! The most probable tokens of a row.

use super::{Choice, Sampler, passes};

impl Sampler {
    /// The `count` most probable tokens and their log-probabilities under the model, the most probable first; of equal ones
    /// the lower id. Fewer only where the vocabulary is smaller. NaN logits are left as minus infinity.
    ///
    /// # Panics
    /// When there are no logits.
    pub fn top(&self, logits: &mut [f32], count: usize) -> Vec<Choice> {
        assert!(!logits.is_empty(), "a choice among no tokens");
        let count = count.min(logits.len());
        let greatest = passes::clean(self.isa, logits);
        if greatest == f32::NEG_INFINITY {
            return (0..count as u32).map(|token| Choice { token, logprob: f32::NEG_INFINITY }).collect();
        }
        let all = passes::Weighting { greatest, inverse_temperature: 1.0, cut: f32::NEG_INFINITY };
        let log_total = passes::total(self.isa, logits, all).ln();
        let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
        for (token, &logit) in (0..).zip(&*logits) {
            let is_full = best.len() == count;
            // Ids come in order: of equal logits, the one that is there stays.
            if is_full && best.last().is_none_or(|&(last, _)| logit <= last) {
                continue;
            }
            let place = best.partition_point(|&(other, _)| other >= logit);
            best.insert(place, (logit, token));
            best.truncate(count);
        }
        let logprob = |logit: f32| (f64::from(logit) - f64::from(greatest) - log_total) as f32;
        best.into_iter().map(|(logit, token)| Choice { token, logprob: logprob(logit) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::prelude::*;

    use crate::cpu::Isa;
    use crate::sampling::{Sampler, SamplingRule};

    #[test]
    fn they_are_those_of_a_full_sort() {
        let mut rng = rand::rngs::StdRng::seed_from_u64(5);
        let mut sampler = Sampler::new(Isa::detect()).unwrap();
        for _ in 0..200 {
            let len = rng.random_range(1..600);
            // Few values, so that many are equal.
            let mut logits: Vec<f32> = (0..len).map(|_| rng.random_range(-20..20) as f32 / 4.0).collect();
            let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let mut sorted: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let count = rng.random_range(1..40);
            let top = sampler.top(&mut logits, count);
            assert_eq!(top.len(), count.min(len));
            for (choice, (logit, token)) in top.iter().zip(sorted) {
                let logprob = f64::from(logit) - total.ln();
                assert!(choice.token == token && (f64::from(choice.logprob) - logprob).abs() < 1e-5);
            }
            assert_eq!(top[0], sampler.sample(&mut logits, &SamplingRule::default(), &[], 0, 0.5));
        }
    }

    #[test]
    fn numbers_that_are_none_come_last() {
        let sampler = Sampler::new(Isa::detect()).unwrap();
        let top = sampler.top(&mut [f32::NAN, 1.0, f32::NEG_INFINITY, 0.0], 4);
        assert_eq!(top.iter().map(|choice| choice.token).collect::<Vec<_>>(), [1, 3, 0, 2]);
        assert_eq!(sampler.top(&mut [f32::NAN; 3], 2).len(), 2);
    }
}
