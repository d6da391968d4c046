//! What a measured pass needs of the device, over what the device could do: MFU and MBU.

use quire_engine::{GpuPeak, ModelExecutor, ModelInfo};

/// Arithmetic and memory traffic that passes need, whatever an implementation does besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Work {
    /// Additions and multiplications in products and attention, of every token in every layer, as is usual. Of a prompt the
    /// engine leaves out what follows attention in the last layer but for one row: 2.7 % of the arithmetic with 32 layers.
    pub(crate) flops: f64,
    /// Bytes that are read: the weights once a pass, K and V once a sequence.
    pub(crate) bytes: f64,
}

/// Sequences of one pass, all alike.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass {
    pub(crate) sequences: u32,
    /// Tokens whose K and V are in memory before it.
    pub(crate) context: u32,
    /// Tokens that it computes, of which the last one's logits are wanted.
    pub(crate) tokens: u32,
}

impl Work {
    pub(crate) const NONE: Self = Self { flops: 0.0, bytes: 0.0 };

    /// Of one pass over this model.
    pub(crate) fn of(executor: &dyn ModelExecutor, pass: Pass) -> Self {
        Self::by(executor.info(), kv_token(executor), pass)
    }

    /// Of requests of these lengths (prompt and output), each token computed once, in `steps` passes over the weights.
    pub(crate) fn of_requests(
        executor: &dyn ModelExecutor,
        requests: impl Iterator<Item = (u32, u32)>,
        steps: u64,
    ) -> Self {
        let info = executor.info();
        let kv_token = kv_token(executor);
        let mut work = Self { flops: 0.0, bytes: steps as f64 * weights(info) };
        for (prompt, output) in requests {
            work.add_request(info, kv_token, prompt, output);
        }
        work
    }

    fn add_request(&mut self, info: &ModelInfo, kv_token: f64, prompt: u32, output: u32) {
        *self += Self::of_sequences(info, kv_token, Pass { sequences: 1, context: 0, tokens: prompt });
        // The last token is not computed with.
        for context in prompt..(prompt + output).saturating_sub(1) {
            *self += Self::of_sequences(info, kv_token, Pass { sequences: 1, context, tokens: 1 });
        }
    }

    fn by(info: &ModelInfo, kv_token: f64, pass: Pass) -> Self {
        let mut work = Self::of_sequences(info, kv_token, pass);
        work.bytes += weights(info);
        work
    }

    /// Of a pass without the weights' way.
    fn of_sequences(info: &ModelInfo, kv_token: f64, pass: Pass) -> Self {
        let config = &info.config;
        let (sequences, context, tokens) =
            (f64::from(pass.sequences), f64::from(pass.context), f64::from(pass.tokens));
        let embedding = (config.vocab * config.hidden) as f64;
        // Norms and biases are a thousandth of it.
        let layers = info.parameters as f64 - if config.tied { 1.0 } else { 2.0 } * embedding;
        // A token sees itself and what is before it, as far as the window goes.
        let window = config.window.map_or(f64::INFINITY, f64::from);
        let seen: f64 = (0..pass.tokens).map(|at| (context + f64::from(at) + 1.0).min(window)).sum();
        let heads = (config.layers * config.heads * config.head_dim) as f64;
        let products = 2.0 * sequences * (tokens * layers + embedding);
        Self {
            flops: products + 4.0 * sequences * heads * seen,
            bytes: sequences * kv_token * context.min(window),
        }
    }

    /// The shares of the peaks that this work in so many seconds is: MFU, where the peak is known, and MBU.
    pub(crate) fn shares(self, peak: &GpuPeak, seconds: f64) -> (Option<f64>, f64) {
        let mfu = peak.flops.map(|flops| self.flops / seconds / flops as f64);
        (mfu, self.bytes / seconds / peak.bytes as f64)
    }
}

/// Bytes of one token's K and V.
fn kv_token(executor: &dyn ModelExecutor) -> f64 {
    executor.info().kv_bytes as f64 / executor.kv_slots() as f64
}

/// Bytes of the weights that a pass reads.
fn weights(info: &ModelInfo) -> f64 {
    // Of an embedding of its own only the tokens' rows are read.
    let embedding = (info.config.vocab * info.config.hidden) as f64;
    let table = if info.config.tied { 0.0 } else { embedding / info.parameters as f64 };
    info.weight_bytes as f64 * (1.0 - table)
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

    /// A request is a prefill and as many decodes as it has tokens but one, and reads no weights by itself.
    #[test]
    fn work_of_a_request_is_that_of_its_passes() {
        let info = info(DummyShape::Llama32_1b);
        let of = |context, tokens| Work::of_sequences(&info, 3.0, Pass { sequences: 1, context, tokens });
        let mut passes = of(0, 10);
        passes += of(10, 1);
        passes += of(11, 1);
        let mut work = Work { flops: 0.0, bytes: 0.0 };
        work.add_request(&info, 3.0, 10, 3);
        assert_eq!(work, passes);
        assert_eq!(work.bytes, 3.0 * 21.0);
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
