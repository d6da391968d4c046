//! Rotary positions.

use std::f64::consts::PI;

use candle_core::{Device, Result, Tensor};

use super::{NaiveConfig, RopeScaling};

/// The model's rotary frequencies; angles are computed for the positions of each pass, as Transformers does.
pub(super) struct Rotary {
    /// Radians a position, for each pair of a head's dimensions.
    frequencies: Vec<f64>,
}

impl Rotary {
    pub(super) fn new(config: &NaiveConfig) -> Self {
        let dim = config.head_dim as f64;
        let frequencies = (0..config.head_dim / 2)
            .map(|i| config.rope_theta.powf(-((2 * i) as f64) / dim))
            .map(|w| scaled(w, config.rope_scaling))
            .collect();
        Self { frequencies }
    }

    /// Cosines and sines for `[batch, tokens]` positions, each `[batch, tokens, head_dim / 2]`.
    pub(super) fn at(&self, positions: &[u32], batch: usize) -> Result<(Tensor, Tensor)> {
        let table = |f: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|p| self.frequencies.iter().map(move |w| f(f64::from(*p) * w) as f32))
                .collect();
            Tensor::from_vec(values, (batch, positions.len() / batch, self.frequencies.len()), &Device::Cpu)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }
}

fn scaled(w: f64, scaling: Option<RopeScaling>) -> f64 {
    match scaling {
        None => w,
        Some(RopeScaling::Linear { factor }) => w / factor,
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original,
        }) => {
            let wavelength = 2.0 * PI / w;
            if wavelength < original / high_freq_factor {
                w
            } else if wavelength > original / low_freq_factor {
                w / factor
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * w / factor + smooth * w
            }
        }
    }
}
