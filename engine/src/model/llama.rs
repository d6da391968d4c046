//! The forward pass of the Llama family.

use quire_kernels::{Backend, GeneratedMatrix, HeadShape, KernelError, QkTransform, WeightFormat};

use crate::EngineError;
use crate::model::{
    HostMatrix, LayerWeight, LoadOptions, Model, ModelConfig, WeightRole, WeightSource, convert,
};

/// A model of the family on a device, with the buffers of its forward pass.
pub struct LlamaModel<B: Backend> {
    config: ModelConfig,
    embedding: B::Weight,
    output_head: Option<B::Weight>,
    final_norm: B::Vector,
    layers: Vec<Layer<B>>,
    rope: B::Rope,
    buffers: Buffers<B>,
    weight_bytes: u64,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    qkv: B::Weight,
    qkv_bias: Option<B::Vector>,
    qk_norm: Option<(B::Vector, B::Vector)>,
    output: B::Weight,
    output_bias: Option<B::Vector>,
    ffn_norm: B::Vector,
    gate_up: B::Weight,
    down: B::Weight,
}

/// Activations, allocated once. Those of the wanted rows grow when a step wants more logits than any before.
struct Buffers<B: Backend> {
    all: Rows<B>,
    qkv: B::Buffer,
    scratch: Scratch<B>,
    wanted: Rows<B>,
    logits: B::Buffer,
    /// Rows that `wanted` and `logits` have room for.
    capacity: usize,
}

/// Of a set of rows: what goes from layer to layer, its norm, and what attention gives.
struct Rows<B: Backend> {
    residual: B::Buffer,
    normed: B::Buffer,
    attended: B::Buffer,
}

/// What the rest of a layer computes in, of whichever rows go through it.
struct Scratch<B: Backend> {
    delta: B::Buffer,
    gate_up: B::Buffer,
    activated: B::Buffer,
}

/// Rows of logits to make room for at first.
const FIRST_LOGIT_ROWS: usize = 32;

impl<B: Backend> LlamaModel<B> {
    /// Prepares the weights of `source` for `backend`, as `dtype`, for batches of up to `max_rows` rows and sequences
    /// of up to `positions` tokens. `progress` hears the layers done and their number.
    ///
    /// # Errors
    /// When a tensor is missing or wrong, or memory cannot be had.
    pub fn load(
        backend: &B,
        config: &ModelConfig,
        source: &dyn WeightSource,
        options: LoadOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, EngineError> {
        let mut loader = Loader { backend, source, options, weight_bytes: 0 };
        let hidden = config.hidden;
        progress(0, config.layers);
        let embedding = loader.matrix(&[(WeightRole::Embedding, config.vocab)], hidden)?;
        let output_head = match config.tied {
            true => None,
            false => Some(loader.matrix(&[(WeightRole::OutputHead, config.vocab)], hidden)?),
        };
        let final_norm = loader.vector(&[(WeightRole::FinalNorm, hidden)])?;
        let mut layers = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            layers.push(loader.layer(config, layer)?);
            progress(layer + 1, config.layers);
        }
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let rope = backend.load_rope(&frequencies, 1.0, options.positions)?;
        let weight_bytes = loader.weight_bytes;
        let buffers = Buffers::new(backend, config, options.max_rows)?;
        Ok(Self {
            config: config.clone(),
            embedding,
            output_head,
            final_norm,
            layers,
            rope,
            buffers,
            weight_bytes,
        })
    }

    fn heads(&self) -> HeadShape {
        let &ModelConfig { heads, kv_heads, head_dim, .. } = &self.config;
        HeadShape { heads, kv_heads, head_dim }
    }

    /// Queries, keys and values of all rows; the latter two are stored.
    fn project(&mut self, backend: &B, index: usize, step: &B::Step<'_>, cache: &mut B::KvCache) {
        let heads = self.heads();
        let (layer, b) = (&self.layers[index], &mut self.buffers);
        let transform = QkTransform {
            heads,
            rope: &self.rope,
            qk_norm: layer.qk_norm.as_ref().map(|(q, k)| (q, k, self.config.rms_eps)),
        };
        let (x, bias) = (&b.all.normed, layer.qkv_bias.as_ref());
        backend.linear_rotate_and_store(x, &layer.qkv, bias, &mut b.qkv, &transform, step, index, cache);
    }

    fn attend(&mut self, backend: &B, index: usize, step: &B::Step<'_>, cache: &mut B::KvCache) {
        let scale = 1.0 / (self.config.head_dim as f32).sqrt();
        let heads = self.heads();
        let b = &mut self.buffers;
        backend.attention(&b.qkv, heads, scale, step, index, cache, &mut b.all.attended);
    }

    /// What follows attention in the last layer, the last norm and the output projection. Nobody reads what they would give
    /// for other rows than the wanted ones: of a prompt, all but the last.
    fn output(&mut self, backend: &B, index: usize, step: &B::Step<'_>, logit_rows: usize) {
        let head = self.output_head.as_ref().unwrap_or(&self.embedding);
        let Buffers { all, scratch, wanted, logits, .. } = &mut self.buffers;
        backend.gather_rows(&all.residual, step, &mut wanted.residual);
        backend.gather_rows(&all.attended, step, &mut wanted.attended);
        scratch.set_rows(backend, logit_rows);
        let eps = self.config.rms_eps;
        self.layers[index].finish(backend, eps, wanted, scratch);
        let Rows { residual, normed, .. } = wanted;
        backend.add_rms_norm(residual, &scratch.delta, &self.final_norm, eps, normed);
        backend.linear(normed, head, None, logits);
    }
}

impl<B: Backend> Layer<B> {
    /// What follows attention. The feed-forward part's result is left in `delta`, for the next norm to add.
    fn finish(&self, backend: &B, eps: f32, rows: &mut Rows<B>, scratch: &mut Scratch<B>) {
        let Scratch { delta, gate_up, activated } = scratch;
        backend.linear(&rows.attended, &self.output, self.output_bias.as_ref(), delta);
        backend.all_reduce(delta);
        backend.add_rms_norm(&mut rows.residual, delta, &self.ffn_norm, eps, &mut rows.normed);
        backend.linear_silu_mul(&rows.normed, &self.gate_up, gate_up, activated);
        backend.linear(activated, &self.down, None, delta);
        backend.all_reduce(delta);
    }
}

impl<B: Backend> Model<B> for LlamaModel<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn run_layers(
        &mut self,
        backend: &B,
        step: &B::Step<'_>,
        [rows, logit_rows]: [usize; 2],
        cache: &mut B::KvCache,
        layers: usize,
    ) -> Result<(), EngineError> {
        let eps = self.config.rms_eps;
        self.buffers.set_rows(backend, &self.config, rows, logit_rows)?;
        backend.embed(step, &self.embedding, &mut self.buffers.all.residual);
        let layers = layers.min(self.layers.len());
        for index in 0..layers {
            let norm = &self.layers[index].attention_norm;
            let Rows { residual, normed, .. } = &mut self.buffers.all;
            match index {
                0 => backend.rms_norm(residual, norm, eps, normed),
                _ => backend.add_rms_norm(residual, &self.buffers.scratch.delta, norm, eps, normed),
            }
            self.project(backend, index, step, cache);
            let is_last = index + 1 == layers;
            if is_last && logit_rows == 0 {
                break;
            }
            self.attend(backend, index, step, cache);
            if is_last {
                self.output(backend, index, step, logit_rows);
            } else {
                let Buffers { all, scratch, .. } = &mut self.buffers;
                self.layers[index].finish(backend, eps, all, scratch);
            }
        }
        Ok(backend.check()?)
    }

    fn logits(&self) -> &B::Buffer {
        &self.buffers.logits
    }

    fn logits_mut(&mut self) -> &mut B::Buffer {
        &mut self.buffers.logits
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a B,
    source: &'a dyn WeightSource,
    options: LoadOptions,
    weight_bytes: u64,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, config: &ModelConfig, index: usize) -> Result<Layer<B>, EngineError> {
        use LayerWeight as W;
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let role = |weight| WeightRole::Layer(index, weight);
        let qkv_bias = match config.qkv_bias {
            true => Some(self.vector(&[
                (role(W::QueryBias), q),
                (role(W::KeyBias), kv),
                (role(W::ValueBias), kv),
            ])?),
            false => None,
        };
        let qk_norm = match config.qk_norm {
            true => Some((
                self.vector(&[(role(W::QueryNorm), config.head_dim)])?,
                self.vector(&[(role(W::KeyNorm), config.head_dim)])?,
            )),
            false => None,
        };
        let output_bias = match config.output_bias {
            true => Some(self.vector(&[(role(W::OutputBias), hidden)])?),
            false => None,
        };
        Ok(Layer {
            attention_norm: self.vector(&[(role(W::AttentionNorm), hidden)])?,
            qkv: self.matrix(&[(role(W::Query), q), (role(W::Key), kv), (role(W::Value), kv)], hidden)?,
            qkv_bias,
            qk_norm,
            output: self.matrix(&[(role(W::Output), hidden)], q)?,
            output_bias,
            ffn_norm: self.vector(&[(role(W::FfnNorm), hidden)])?,
            gate_up: self.matrix(&[(role(W::Gate), ffn), (role(W::Up), ffn)], hidden)?,
            down: self.matrix(&[(role(W::Down), hidden)], ffn)?,
        })
    }

    /// The matrices of `parts` (role and rows), stacked.
    fn matrix(&mut self, parts: &[(WeightRole, usize)], cols: usize) -> Result<B::Weight, EngineError> {
        if let Some(weight) = self.generated(parts, cols)? {
            return Ok(weight);
        }
        let matrices = parts
            .iter()
            .map(|&(role, rows)| {
                let matrix = self.source.matrix(role, rows, cols)?;
                match self.options.dtype.format(role) {
                    Some(format) => convert(matrix, format, self.options.threads),
                    None => Ok(matrix),
                }
            })
            .collect::<Result<Vec<HostMatrix<'_>>, EngineError>>()?;
        self.weight_bytes += matrices.iter().map(|m| m.bytes.len() as u64).sum::<u64>();
        let sources = matrices.iter().map(HostMatrix::source).collect::<Result<Vec<_>, KernelError>>()?;
        Ok(self.backend.load_matrix(&sources)?)
    }

    /// The same made on the device, where the weights are generated and the device can.
    fn generated(
        &mut self,
        parts: &[(WeightRole, usize)],
        cols: usize,
    ) -> Result<Option<B::Weight>, EngineError> {
        let format_of = |role| self.options.dtype.format(role).unwrap_or(WeightFormat::Bf16);
        let Some(format) = parts.first().map(|&(role, _)| format_of(role)) else { return Ok(None) };
        let generated = parts.iter().map(|&(role, rows)| {
            self.source.generated(role, rows, cols).filter(|_| format_of(role) == format)
        });
        let Some(generated) = generated.collect::<Option<Vec<GeneratedMatrix>>>() else { return Ok(None) };
        let weight = self.backend.generate_matrix(format, &generated)?;
        if let (Some(_), Some(row_bytes)) = (&weight, format.row_bytes(cols)) {
            self.weight_bytes += generated.iter().map(|m| (m.rows * row_bytes) as u64).sum::<u64>();
        }
        Ok(weight)
    }

    /// The vectors of `parts` (role and length), one after the other.
    fn vector(&mut self, parts: &[(WeightRole, usize)]) -> Result<B::Vector, EngineError> {
        let mut values = Vec::new();
        for &(role, len) in parts {
            values.extend(self.source.vector(role, len)?);
        }
        self.weight_bytes += 4 * values.len() as u64;
        Ok(self.backend.load_vector(&values)?)
    }
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self, EngineError> {
        let capacity = rows.min(FIRST_LOGIT_ROWS);
        Ok(Self {
            all: Rows::new(backend, config, rows)?,
            qkv: backend.buffer(rows, config.qkv_width())?,
            scratch: Scratch {
                delta: backend.buffer(rows, config.hidden)?,
                gate_up: backend.buffer(rows, 2 * config.ffn)?,
                activated: backend.buffer(rows, config.ffn)?,
            },
            wanted: Rows::new(backend, config, capacity)?,
            logits: backend.logits_buffer(capacity, config.vocab)?,
            capacity,
        })
    }

    fn set_rows(
        &mut self,
        backend: &B,
        config: &ModelConfig,
        rows: usize,
        logit_rows: usize,
    ) -> Result<(), EngineError> {
        self.all.set_rows(backend, rows);
        backend.set_rows(&mut self.qkv, rows);
        self.scratch.set_rows(backend, rows);
        if logit_rows > self.capacity {
            let capacity = logit_rows.next_power_of_two();
            self.wanted = Rows::new(backend, config, capacity)?;
            self.logits = backend.logits_buffer(capacity, config.vocab)?;
            self.capacity = capacity;
        }
        self.wanted.set_rows(backend, logit_rows);
        backend.set_rows(&mut self.logits, logit_rows);
        Ok(())
    }
}

impl<B: Backend> Rows<B> {
    fn new(backend: &B, config: &ModelConfig, rows: usize) -> Result<Self, EngineError> {
        Ok(Self {
            residual: backend.buffer(rows, config.hidden)?,
            normed: backend.buffer(rows, config.hidden)?,
            attended: backend.buffer(rows, config.heads * config.head_dim)?,
        })
    }

    fn set_rows(&mut self, backend: &B, rows: usize) {
        for buffer in [&mut self.residual, &mut self.normed, &mut self.attended] {
            backend.set_rows(buffer, rows);
        }
    }
}

impl<B: Backend> Scratch<B> {
    fn set_rows(&mut self, backend: &B, rows: usize) {
        for buffer in [&mut self.delta, &mut self.gate_up, &mut self.activated] {
            backend.set_rows(buffer, rows);
        }
    }
}
