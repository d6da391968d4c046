//! Rotary embedding frequencies and their scalings.

/// Rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// How they are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency divided by the factor (position interpolation).
    Linear {
        /// Divides.
        factor: f32,
    },
    /// Llama 3: low frequencies divided by the factor, high ones kept, those between interpolated.
    Llama3 {
        /// Divides low frequencies.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f32,
        /// Context the model was first trained for.
        original: f32,
    },
    /// Every frequency divided by a factor of its own: how GGUF files store Llama 3's scaling.
    Factors(Vec<f32>),
}

impl Rope {
    /// The inverse frequencies of a head of `head_dim` elements: `head_dim / 2` of them.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let half = head_dim / 2;
        let plain = (0..half).map(|i| 1.0 / f64::from(self.theta).powf(2.0 * i as f64 / head_dim as f64));
        match &self.scaling {
            RopeScaling::Default => plain.map(|f| f as f32).collect(),
            RopeScaling::Linear { factor } => plain.map(|f| (f / f64::from(*factor)) as f32).collect(),
            RopeScaling::Factors(factors) => {
                plain.zip(factors).map(|(f, factor)| (f / f64::from(*factor)) as f32).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let [factor, low, high, original] =
                    [factor, low_freq_factor, high_freq_factor, original].map(|&v| f64::from(v));
                plain.map(|f| llama3_frequency(f, factor, low, high, original) as f32).collect()
            }
        }
    }

    /// Checks that the frequencies are numbers.
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), String> {
        let positive = |name: &str, value: f32| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(format!("rope {name} is {value}; it must be positive"))
            }
        };
        positive("theta", self.theta)?;
        match &self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("scaling factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                positive("scaling factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                positive("original_max_position_embeddings", *original)?;
                if high_freq_factor <= low_freq_factor {
                    return Err(format!(
                        "rope high_freq_factor {high_freq_factor} must be above low_freq_factor {low_freq_factor}"
                    ));
                }
                Ok(())
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != head_dim / 2 {
                    return Err(format!(
                        "{} rope factors for a head of {head_dim} elements; {} are needed",
                        factors.len(),
                        head_dim / 2
                    ));
                }
                factors.iter().try_for_each(|&f| positive("factor", f))
            }
        }
    }
}

fn llama3_frequency(frequency: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * std::f64::consts::PI / frequency;
    if wavelength < original / high {
        frequency
    } else if wavelength > original / low {
        frequency / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * frequency / factor + smooth * frequency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_frequencies_fall_from_one() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
        let f = rope.inverse_frequencies(8);
        let expected = [1.0, 0.1, 0.01, 0.001];
        assert!(f.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-8), "{f:?}");
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: 8192.0,
        };
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.inverse_frequencies(128);
        let scaled = Rope { theta: 500_000.0, scaling }.inverse_frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[63] * 8.0 - plain[63]).abs() < 1e-12);
        assert!(scaled.iter().zip(&plain).any(|(s, p)| *s < *p && *s > *p / 8.0));
        assert!(scaled.windows(2).all(|w| w[1] < w[0]));
    }

    #[test]
    fn factors_divide_one_by_one() {
        let rope = Rope { theta: 100.0, scaling: RopeScaling::Factors(vec![1.0, 2.0]) };
        assert!((rope.inverse_frequencies(4)[1] - 0.05).abs() < 1e-8);
        assert!(rope.validate(8).unwrap_err().contains("4 are needed"));
    }
}
