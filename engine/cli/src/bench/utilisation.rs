//! What a measured pass needs of the device, over what the device could do: MFU and MBU.

use quire_engine::{GpuPeak, ModelExecutor, ModelInfo};

/// Arithmetic and memory traffic that passes need, whatever an implementation does besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    /// Additions and multiplications in products and attention.
    pub(super) flops: f64,
    /// Bytes that are read: the weights once a pass, K and V once a sequence.
    pub(super) bytes: f64,
}

/// Sequences of one pass, all alike.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass {
    pub(super) sequences: u32,
    /// Tokens whose K and V are in memory before it.
    pub(super) context: u32,
    /// Tokens that it computes, of which the last one's logits are wanted.
    pub(super) tokens: u32,
}

impl Work {
    pub(super) const NONE: Self = Self { flops: 0.0, bytes: 0.0 };

    /// Of one pass over this model.
    pub(super) fn of(executor: &dyn ModelExecutor, pass: Pass) -> Self {
        let kv_token = executor.info().kv_bytes as f64 / executor.kv_slots() as f64;
        Self::by(executor.info(), kv_token, pass)
    }

    fn by(info: &ModelInfo, kv_token: f64, pass: Pass) -> Self {
        let config = &info.config;
        let number = |n: usize| n as f64;
        let (sequences, context, tokens) =
            (f64::from(pass.sequences), f64::from(pass.context), f64::from(pass.tokens));
        let embedding = number(config.vocab * config.hidden);
        // Norms and biases are a thousandth of it.
        let layers = info.parameters as f64 - if config.tied { 1.0 } else { 2.0 } * embedding;
        // A token sees itself and what is before it, as far as the window goes.
        let window = config.window.map_or(f64::INFINITY, f64::from);
        let seen: f64 = (0..pass.tokens).map(|at| (context + f64::from(at) + 1.0).min(window)).sum();
        let heads = number(config.layers * config.heads * config.head_dim);
        let products = 2.0 * sequences * (tokens * layers + embedding);
        // Of an embedding of its own only the tokens' rows are read.
        let table = if config.tied { 0.0 } else { embedding / info.parameters as f64 };
        Self {
            flops: products + 4.0 * sequences * heads * seen,
            bytes: info.weight_bytes as f64 * (1.0 - table) + sequences * kv_token * context.min(window),
        }
    }

    /// The shares of the peaks that this work in so many seconds is: MFU, where the peak is known, and MBU.
    pub(super) fn shares(self, peak: &GpuPeak, seconds: f64) -> (Option<f64>, f64) {
        let mfu = peak.flops.map(|flops| self.flops / seconds / flops as f64);
        (mfu, self.bytes / seconds / peak.bytes as f64)
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

#[cfg(test)]
mod tests {
    use quire_engine::dummy::DummyShape;
    use quire_engine::model::{ModelConfig, WeightDtype};
    use quire_engine::{DeviceName, GpuPeak, ModelInfo};

    use super::{Pass, Work};

    fn info(shape: DummyShape) -> ModelInfo {
        let config = shape.config();
        let parameters = config.parameters();
        ModelInfo {
            name: shape.name().into(),
            dummy: true,
            config,
            parameters,
            weight_bytes: 2 * parameters,
            dtype: WeightDtype::Bf16,
            kv_bytes: 0,
            device: DeviceName::Cpu { threads: 1, isa: "none" },
        }
    }

    /// By hand, for Llama-3.1-8B's shape: 32 layers of 218.1 million parameters, an output of 525.3 million.
    #[test]
    fn work_of_a_known_shape() {
        let info = info(DummyShape::Llama31_8b);
        let kv_token = 131_072.0;
        let step = Work::by(&info, kv_token, Pass { sequences: 256, context: 512, tokens: 1 });
        let products = 2.0 * 256.0 * (6.98e9 + 0.5253e9);
        let attention = 4.0 * 256.0 * 32.0 * 4096.0 * 513.0;
        assert!((step.flops / (products + attention) - 1.0).abs() < 1e-3, "{}", step.flops);
        let bytes = 2.0 * (6.98e9 + 0.5253e9) + 256.0 * 512.0 * kv_token;
        assert!((step.bytes / bytes - 1.0).abs() < 1e-3, "{}", step.bytes);
        let prefill = Work::by(&info, kv_token, Pass { sequences: 4, context: 0, tokens: 2048 });
        let products = 2.0 * 4.0 * (2048.0 * 6.98e9 + 0.5253e9);
        let attention = 4.0 * 4.0 * 32.0 * 4096.0 * 2048.0 * 2049.0 / 2.0;
        assert!((prefill.flops / (products + attention) - 1.0).abs() < 1e-3, "{}", prefill.flops);
    }

    #[test]
    fn windows_and_tied_embeddings() {
        let pass = Pass { sequences: 1, context: 10_000, tokens: 1 };
        let mistral = info(DummyShape::Mistral7b);
        let window = f64::from(mistral.config.window.unwrap());
        let without =
            ModelInfo { config: ModelConfig { window: None, ..mistral.config.clone() }, ..mistral.clone() };
        let saved = Work::by(&without, 1.0, pass).bytes - Work::by(&mistral, 1.0, pass).bytes;
        assert_eq!(saved, 10_000.0 - window);
        let tied = info(DummyShape::Llama32_1b);
        assert_eq!(Work::by(&tied, 0.0, pass).bytes, tied.weight_bytes as f64);
    }

    #[test]
    fn shares_are_of_the_peaks() {
        let work = Work { flops: 30.0, bytes: 50.0 };
        assert_eq!(work.shares(&GpuPeak { flops: Some(60), bytes: 100 }, 2.0), (Some(0.25), 0.25));
        assert_eq!(work.shares(&GpuPeak { flops: None, bytes: 100 }, 0.5), (None, 1.0));
    }
}
