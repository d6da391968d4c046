//! Random weights in the shape of known models: for measuring without a download. Their text is noise, their speed
//! is the real thing's.

use std::str::FromStr;

use quire_kernels::generated::{fill_normal, mix};
use quire_kernels::{GeneratedMatrix, WeightFormat};

use crate::EngineError;
use crate::model::{
    Architecture, HostMatrix, LayerWeight, ModelConfig, Rope, RopeScaling, WeightDtype, WeightRole,
    WeightSource,
};

/// The shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DummyShape {
    /// HuggingFaceTB/SmolLM2-135M.
    Smollm2_135m,
    /// meta-llama/Llama-3.2-1B.
    Llama32_1b,
    /// meta-llama/Llama-3.1-8B.
    Llama31_8b,
    /// meta-llama/Llama-3.1-70B.
    Llama31_70b,
    /// Qwen/Qwen3-0.6B.
    Qwen3_06b,
    /// mistralai/Mistral-7B-v0.1, whose attention sees 4,096 tokens.
    Mistral7b,
}

impl DummyShape {
    /// All of them.
    pub const ALL: [DummyShape; 6] = [
        DummyShape::Smollm2_135m,
        DummyShape::Llama32_1b,
        DummyShape::Llama31_8b,
        DummyShape::Llama31_70b,
        DummyShape::Qwen3_06b,
        DummyShape::Mistral7b,
    ];

    /// Its name, after `dummy:`.
    pub fn name(self) -> &'static str {
        match self {
            DummyShape::Smollm2_135m => "smollm2-135m",
            DummyShape::Llama32_1b => "llama-3.2-1b",
            DummyShape::Llama31_8b => "llama-3.1-8b",
            DummyShape::Llama31_70b => "llama-3.1-70b",
            DummyShape::Qwen3_06b => "qwen3-0.6b",
            DummyShape::Mistral7b => "mistral-7b-v0.1",
        }
    }

    /// The model's shape and constants, as its published configuration has them.
    pub fn config(self) -> ModelConfig {
        let base = ModelConfig {
            architecture: Architecture::Llama,
            hidden: 576,
            ffn: 1536,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            vocab: 49152,
            max_positions: 8192,
            rms_eps: 1e-5,
            rope: Rope { theta: 100_000.0, scaling: RopeScaling::Default },
            tied: true,
            qkv_bias: false,
            output_bias: false,
            qk_norm: false,
            window: None,
        };
        let llama3 = |factor| Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original: 8192.0,
            },
        };
        match self {
            DummyShape::Smollm2_135m => base,
            DummyShape::Llama32_1b => ModelConfig {
                hidden: 2048,
                ffn: 8192,
                layers: 16,
                heads: 32,
                kv_heads: 8,
                vocab: 128_256,
                max_positions: 131_072,
                rope: llama3(32.0),
                ..base
            },
            DummyShape::Llama31_8b => ModelConfig {
                hidden: 4096,
                ffn: 14336,
                layers: 32,
                heads: 32,
                kv_heads: 8,
                head_dim: 128,
                vocab: 128_256,
                max_positions: 131_072,
                rope: llama3(8.0),
                tied: false,
                ..base
            },
            DummyShape::Llama31_70b => ModelConfig {
                hidden: 8192,
                ffn: 28672,
                layers: 80,
                heads: 64,
                ..DummyShape::Llama31_8b.config()
            },
            DummyShape::Mistral7b => ModelConfig {
                architecture: Architecture::Mistral,
                hidden: 4096,
                ffn: 14336,
                layers: 32,
                heads: 32,
                kv_heads: 8,
                head_dim: 128,
                vocab: 32_000,
                max_positions: 32_768,
                rope: Rope { theta: 10_000.0, scaling: RopeScaling::Default },
                tied: false,
                window: Some(4096),
                ..base
            },
            DummyShape::Qwen3_06b => ModelConfig {
                architecture: Architecture::Qwen3,
                hidden: 1024,
                ffn: 3072,
                layers: 28,
                heads: 16,
                kv_heads: 8,
                head_dim: 128,
                vocab: 151_936,
                max_positions: 40_960,
                rms_eps: 1e-6,
                rope: Rope { theta: 1_000_000.0, scaling: RopeScaling::Default },
                qk_norm: true,
                ..base
            },
        }
    }
}

impl FromStr for DummyShape {
    type Err = EngineError;

    fn from_str(name: &str) -> Result<Self, EngineError> {
        Self::ALL.into_iter().find(|shape| shape.name() == name).ok_or_else(|| {
            let known = Self::ALL.map(DummyShape::name).join(", ");
            EngineError::Config(format!("there is no dummy model '{name}'; there are {known}"))
        })
    }
}

/// Generates weights: normal with mean 0 and deviation 0.02, norms 1, biases like weights. Each element depends on
/// the seed, the tensor and its index alone.
#[derive(Debug, Clone, Copy)]
pub struct DummyWeights {
    seed: u64,
    dtype: WeightDtype,
    threads: usize,
}

impl DummyWeights {
    /// Weights from `seed` as `dtype` ([`WeightDtype::Keep`] is bfloat16), generated on `threads` threads.
    pub fn new(seed: u64, dtype: WeightDtype, threads: usize) -> Self {
        Self { seed, dtype, threads }
    }

    fn key(&self, role: WeightRole) -> u64 {
        let tensor = match role {
            WeightRole::Embedding => 1,
            WeightRole::FinalNorm => 2,
            WeightRole::OutputHead => 3,
            WeightRole::Layer(layer, weight) => 1000 + 64 * layer as u64 + weight as u64,
        };
        mix(mix(self.seed ^ 0x9E37_79B9_7F4A_7C15).wrapping_add(tensor))
    }
}

impl WeightSource for DummyWeights {
    fn matrix(&self, role: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError> {
        let format = self.dtype.format(role).unwrap_or(WeightFormat::Bf16);
        let key = self.key(role);
        let bytes = crate::model::encode_rows(format, rows, cols, self.threads, |row, out| {
            fill_normal(key, row, out);
        })?;
        Ok(HostMatrix { format, rows, cols, bytes: bytes.into() })
    }

    fn generated(&self, role: WeightRole, rows: usize, cols: usize) -> Option<GeneratedMatrix> {
        Some(GeneratedMatrix { key: self.key(role), rows, cols, first_row: 0, first_col: 0 })
    }

    fn vector(&self, role: WeightRole, len: usize) -> Result<Vec<f32>, EngineError> {
        use LayerWeight::{AttentionNorm, FfnNorm, KeyNorm, QueryNorm};
        if matches!(
            role,
            WeightRole::FinalNorm | WeightRole::Layer(_, AttentionNorm | FfnNorm | QueryNorm | KeyNorm)
        ) {
            return Ok(vec![1.0; len]);
        }
        let mut out = vec![0.0; len];
        fill_normal(self.key(role), 0, &mut out);
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use quire_kernels::generated::DEVIATION;

    use super::*;

    fn floats(source: &DummyWeights, role: WeightRole, rows: usize, cols: usize) -> Vec<f32> {
        let matrix = source.matrix(role, rows, cols).unwrap();
        let mut out = vec![0.0; rows * cols];
        quire_kernels::quant::dequantize(matrix.format, &matrix.bytes, &mut out).unwrap();
        out
    }

    #[test]
    fn moments_are_those_of_the_normal() {
        let source = DummyWeights::new(1, WeightDtype::F32, 2);
        let w = floats(&source, WeightRole::Embedding, 512, 512);
        let n = w.len() as f64;
        let moment = |power: i32| w.iter().map(|&v| f64::from(v / DEVIATION).powi(power)).sum::<f64>() / n;
        assert!(moment(1).abs() < 0.01, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.01, "variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 0.1, "kurtosis {}", moment(4));
        // Neighbours, along rows and columns, are not correlated.
        for lag in [1, 2, 4, 512] {
            let covariance = w
                .windows(lag + 1)
                .map(|p| f64::from(p[0] / DEVIATION) * f64::from(p[lag] / DEVIATION))
                .sum::<f64>();
            assert!((covariance / n).abs() < 0.01, "lag {lag}");
        }
    }

    #[test]
    fn seeds_and_tensors_differ_and_threads_do_not_matter() {
        let role = WeightRole::Layer(3, LayerWeight::Gate);
        let w = floats(&DummyWeights::new(1, WeightDtype::Bf16, 1), role, 8, 64);
        assert_eq!(w, floats(&DummyWeights::new(1, WeightDtype::Bf16, 5), role, 8, 64));
        assert_ne!(w, floats(&DummyWeights::new(2, WeightDtype::Bf16, 1), role, 8, 64));
        let other = WeightRole::Layer(4, LayerWeight::Gate);
        assert_ne!(w, floats(&DummyWeights::new(1, WeightDtype::Bf16, 1), other, 8, 64));
    }

    #[test]
    fn formats_follow_the_role() {
        let source = DummyWeights::new(1, WeightDtype::Q4_0, 1);
        assert_eq!(source.matrix(WeightRole::Embedding, 2, 32).unwrap().format, WeightFormat::Q8_0);
        let gate = WeightRole::Layer(0, LayerWeight::Gate);
        assert_eq!(source.matrix(gate, 2, 32).unwrap().format, WeightFormat::Q4_0);
        assert_eq!(source.vector(WeightRole::FinalNorm, 3).unwrap(), [1.0; 3]);
    }

    #[test]
    fn names_round_trip_and_unknown_ones_list_the_known() {
        for shape in DummyShape::ALL {
            assert_eq!(shape.name().parse::<DummyShape>().unwrap(), shape);
            shape.config().validate().unwrap();
        }
        assert!("gpt".parse::<DummyShape>().unwrap_err().to_string().contains("qwen3-0.6b"));
    }
}
