//! Random numbers whose values are part of a result.
//!
//! ChaCha12 gives the bits; the shapes are written out here on `libm`, because a library's sampling algorithm may
//! change between versions and the platform's logarithm between machines, and either would change a workload's bytes.

use rand::rngs::ChaCha12Rng;
use rand::{Rng, SeedableRng};

/// What a stream of random numbers is for. Each use has its own stream, so that changing one part of a workload
/// (the rate, say) leaves the others as they were.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Use {
    Arrivals = 1,
    Lengths = 2,
    Prompt = 3,
    PromptBlock = 4,
    Ticks = 5,
    Window = 6,
    SharedPrefix = 7,
    Class = 8,
    Conversation = 9,
    Sample = 10,
}

/// A reproducible stream of random numbers.
#[derive(Debug)]
pub(crate) struct Stream(ChaCha12Rng);

impl Stream {
    /// The stream of one use and index under a seed. The three make the cipher's key, so streams are unrelated.
    pub(crate) fn new(seed: u64, purpose: Use, index: u64) -> Self {
        let mut key = [0_u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
        key[16..24].copy_from_slice(&index.to_le_bytes());
        Self(ChaCha12Rng::from_seed(key))
    }

    /// Uniform in the open interval (0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        ((self.0.next_u64() >> 12) as f64 + 0.5) * (0.5_f64).powi(52)
    }

    /// Uniform in `0..bound`, `bound` above zero; off from uniform by less than 2^-32.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        ((u128::from(self.0.next_u64()) * u128::from(bound)) >> 64) as u32
    }

    /// Exponential of mean 1.
    pub(crate) fn exponential(&mut self) -> f64 {
        -libm::log(self.unit())
    }

    /// Standard normal (Box and Muller's cosine half).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = libm::sqrt(2.0 * self.exponential());
        radius * libm::cos(std::f64::consts::TAU * self.unit())
    }

    /// Gamma of the given shape and mean 1 (Marsaglia and Tsang, 2000; shapes below 1 by their boost).
    pub(crate) fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            // gamma(a) = gamma(a + 1) u^(1/a); both scaled to the same rate, hence the ratio of the means.
            let boosted = self.gamma(shape + 1.0) * (shape + 1.0);
            return boosted * libm::pow(self.unit(), 1.0 / shape) / shape;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / libm::sqrt(9.0 * d);
        loop {
            let x = self.normal();
            let v = 1.0 + c * x;
            if v <= 0.0 {
                continue;
            }
            let v = v * v * v;
            if libm::log(self.unit()) < 0.5 * x * x + d - d * v + d * libm::log(v) {
                return d * v / shape;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(mut draw: impl FnMut() -> f64) -> (f64, f64) {
        let n = 200_000;
        let values: Vec<f64> = (0..n).map(|_| draw()).collect();
        let mean = values.iter().sum::<f64>() / f64::from(n);
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
        (mean, variance)
    }

    #[test]
    fn shapes_have_their_moments() {
        let mut s = Stream::new(1, Use::Lengths, 0);
        let (mean, variance) = moments(|| s.unit());
        assert!((mean - 0.5).abs() < 0.005 && (variance - 1.0 / 12.0).abs() < 0.002, "{mean} {variance}");
        let (mean, variance) = moments(|| s.exponential());
        assert!((mean - 1.0).abs() < 0.02 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
        let (mean, variance) = moments(|| s.normal());
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
        for shape in [0.25, 0.84, 1.0, 4.0] {
            let (mean, variance) = moments(|| s.gamma(shape));
            assert!((mean - 1.0).abs() < 0.03, "shape {shape}: mean {mean}");
            assert!((variance * shape - 1.0).abs() < 0.06, "shape {shape}: variance {variance}");
        }
    }

    #[test]
    fn streams_differ_by_seed_use_and_index() {
        let first = |seed, purpose, index| Stream::new(seed, purpose, index).0.next_u64();
        let base = first(1, Use::Prompt, 0);
        assert_eq!(base, first(1, Use::Prompt, 0));
        assert_ne!(base, first(2, Use::Prompt, 0));
        assert_ne!(base, first(1, Use::Lengths, 0));
        assert_ne!(base, first(1, Use::Prompt, 1));
    }

    #[test]
    fn below_stays_below_and_reaches_all() {
        let mut s = Stream::new(3, Use::Prompt, 0);
        let mut seen = [false; 7];
        for _ in 0..1000 {
            seen[s.below(7) as usize] = true;
        }
        assert_eq!(seen, [true; 7]);
    }
}
