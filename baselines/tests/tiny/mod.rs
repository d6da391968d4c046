//! Small random models, with a forward pass of their own in f64: one token after the other, one number at a time.

#![allow(dead_code, unreachable_pub, reason = "shared by test binaries, each of which uses its part")]

use std::collections::BTreeMap;
use std::path::Path;

pub use quire_baselines::naive::NaiveConfig as Config;
use quire_baselines::naive::{NaiveModel, RopeScaling};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A Llama of two layers.
pub fn llama() -> Config {
    Config {
        vocab_size: 50,
        hidden_size: 16,
        intermediate_size: 24,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        rope_theta: 10_000.0,
        rope_scaling: None,
        rms_norm_eps: 1e-5,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        attention_bias: false,
        attention_output_bias: false,
        qk_norm: false,
    }
}

/// Random prompts of these lengths.
pub fn prompts(lengths: &[usize], vocab: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = StdRng::seed_from_u64(seed);
    lengths.iter().map(|n| (0..*n).map(|_| rng.random_range(0..vocab as u32)).collect()).collect()
}

/// A configuration and its weights by Hugging Face name.
pub struct TinyModel {
    pub config: Config,
    pub weights: BTreeMap<String, Vec<f32>>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl TinyModel {
    /// Weights large enough that logits lie well apart.
    pub fn random(config: Config, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let shapes = shapes(&config);
        let weights = shapes
            .iter()
            .map(|(name, shape)| {
                let data = (0..shape.iter().product())
                    .map(|_| rng.random_range(-0.7..0.7) + if name.contains("norm") { 1.0f32 } else { 0.0 })
                    .collect();
                (name.clone(), data)
            })
            .collect();
        Self { config, weights, shapes }
    }

    pub fn model(&self) -> NaiveModel {
        NaiveModel::from_tensors(self.config.clone(), |name| self.weights[name].clone()).unwrap()
    }

    /// Writes `config.json` and the weights in `shards` safetensors files.
    pub fn write_hf_folder(&self, folder: &Path, shards: usize) {
        let c = &self.config;
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
            "rope_theta": c.rope_theta, "rms_norm_eps": c.rms_norm_eps, "hidden_act": "silu",
            "max_position_embeddings": c.max_position_embeddings,
            "tie_word_embeddings": c.tie_word_embeddings,
        });
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let bytes: BTreeMap<&String, Vec<u8>> = self
            .weights
            .iter()
            .map(|(name, data)| (name, data.iter().flat_map(|x| x.to_le_bytes()).collect()))
            .collect();
        let mut map = BTreeMap::new();
        for shard in 0..shards {
            let file =
                if shards == 1 { "model.safetensors".into() } else { format!("part-{shard}.safetensors") };
            let views: Vec<_> = bytes
                .iter()
                .enumerate()
                .filter(|(i, _)| i % shards == shard)
                .map(|(_, (name, data))| {
                    let shape = self.shapes[*name].clone();
                    map.insert((*name).clone(), file.clone());
                    (
                        *name,
                        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, data).unwrap(),
                    )
                })
                .collect();
            safetensors::serialize_to_file(views, None, &folder.join(&file)).unwrap();
        }
        if shards > 1 {
            let index = serde_json::json!({ "weight_map": map }).to_string();
            std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        }
    }

    /// Logits after the last token, everything recomputed.
    pub fn forward_f64(&self, tokens: &[u32]) -> Vec<f64> {
        let c = &self.config;
        let embedding = &self.weights["model.embed_tokens.weight"];
        let row = |t: &u32| &embedding[*t as usize * c.hidden_size..][..c.hidden_size];
        let mut xs: Vec<Vec<f64>> =
            tokens.iter().map(|t| row(t).iter().map(|v| f64::from(*v)).collect()).collect();
        for layer in 0..c.num_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = xs.iter().map(|x| self.norm(x, &name("input_layernorm"))).collect::<Vec<_>>();
            let attended = self.attend(&normed, &name("self_attn"));
            for (x, a) in xs.iter_mut().zip(&attended) {
                add(x, a);
                let h = self.norm(x, &name("post_attention_layernorm"));
                let gate = self.linear(&h, &name("mlp.gate_proj"));
                let up = self.linear(&h, &name("mlp.up_proj"));
                let h: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
                add(x, &self.linear(&h, &name("mlp.down_proj")));
            }
        }
        let last = self.norm(xs.last().unwrap(), "model.norm");
        self.linear(&last, if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" })
    }

    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let weight = &self.weights[&format!("{name}.weight")];
        let bias = self.weights.get(&format!("{name}.bias"));
        weight
            .chunks(x.len())
            .enumerate()
            .map(|(i, row)| {
                let product: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
                product + bias.map_or(0.0, |b| f64::from(b[i]))
            })
            .collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let scale = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + self.config.rms_norm_eps).sqrt();
        x.iter()
            .zip(&self.weights[&format!("{name}.weight")])
            .map(|(v, w)| v / scale * f64::from(*w))
            .collect()
    }

    fn heads(&self, x: &[f64], position: usize, name: &str, norm: &str) -> Vec<Vec<f64>> {
        self.linear(x, name)
            .chunks(self.config.head_dim)
            .map(|head| if self.config.qk_norm { self.norm(head, norm) } else { head.to_vec() })
            .map(|head| self.rotate(&head, position))
            .collect()
    }

    fn attend(&self, xs: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let (c, dim) = (&self.config, self.config.head_dim);
        let part = |p: &str| format!("{name}.{p}");
        let project = |p: &str, n: &str| -> Vec<_> {
            xs.iter().enumerate().map(|(i, x)| self.heads(x, i, &part(p), &part(n))).collect()
        };
        let (queries, keys) = (project("q_proj", "q_norm"), project("k_proj", "k_norm"));
        let values: Vec<Vec<f64>> = xs.iter().map(|x| self.linear(x, &part("v_proj"))).collect();
        queries
            .iter()
            .enumerate()
            .map(|(i, heads)| {
                let mut out = Vec::new();
                for (h, q) in heads.iter().enumerate() {
                    let kv = h / (c.num_heads / c.num_kv_heads);
                    let scores: Vec<f64> = keys[..=i]
                        .iter()
                        .map(|k| {
                            let dot: f64 = q.iter().zip(&k[kv]).map(|(a, b)| a * b).sum();
                            (dot / (dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let total: f64 = scores.iter().sum();
                    out.extend((0..dim).map(|d| {
                        scores.iter().zip(&values).map(|(s, v)| s / total * v[kv * dim + d]).sum::<f64>()
                    }));
                }
                self.linear(&out, &part("o_proj"))
            })
            .collect()
    }

    fn rotate(&self, head: &[f64], position: usize) -> Vec<f64> {
        let half = head.len() / 2;
        let mut out = head.to_vec();
        for i in 0..half {
            let mut w = self.config.rope_theta.powf(-(i as f64) / half as f64);
            match self.config.rope_scaling {
                None => {}
                Some(RopeScaling::Linear { factor }) => w /= factor,
                Some(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: original,
                }) => {
                    // 1 for wavelengths that turn often in the original context, 0 for those that hardly do.
                    let turns = original * w / std::f64::consts::TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    w *= keep + (1.0 - keep) / factor;
                }
            }
            let (sin, cos) = (position as f64 * w).sin_cos();
            out[i] = head[i] * cos - head[i + half] * sin;
            out[i + half] = head[i + half] * cos + head[i] * sin;
        }
        out
    }
}

fn add(x: &mut [f64], y: &[f64]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

fn shapes(c: &Config) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    let mut put = |name: String, shape: &[usize]| shapes.insert(name, shape.to_vec());
    put("model.embed_tokens.weight".into(), &[c.vocab_size, c.hidden_size]);
    put("model.norm.weight".into(), &[c.hidden_size]);
    if !c.tie_word_embeddings {
        put("lm_head.weight".into(), &[c.vocab_size, c.hidden_size]);
    }
    let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
    for i in 0..c.num_layers {
        let mut part = |name: &str, shape: &[usize]| put(format!("model.layers.{i}.{name}"), shape);
        part("input_layernorm.weight", &[c.hidden_size]);
        part("post_attention_layernorm.weight", &[c.hidden_size]);
        part("mlp.gate_proj.weight", &[c.intermediate_size, c.hidden_size]);
        part("mlp.up_proj.weight", &[c.intermediate_size, c.hidden_size]);
        part("mlp.down_proj.weight", &[c.hidden_size, c.intermediate_size]);
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            part(&format!("self_attn.{name}_proj.weight"), &[rows, c.hidden_size]);
            if c.attention_bias {
                part(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
        }
        part("self_attn.o_proj.weight", &[c.hidden_size, q]);
        if c.attention_output_bias {
            part("self_attn.o_proj.bias", &[c.hidden_size]);
        }
        if c.qk_norm {
            part("self_attn.q_norm.weight", &[c.head_dim]);
            part("self_attn.k_norm.weight", &[c.head_dim]);
        }
    }
    shapes
}
