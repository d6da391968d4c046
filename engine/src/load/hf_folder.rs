//! A Hugging Face model folder: `config.json`, one or many safetensors, the tokenizer's files.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use quire_kernels::{WeightFormat, quant};
use serde::Deserialize;

use crate::EngineError;
use crate::load::mapped::{MappedFile, read_small};
use crate::load::safetensors::weight_format;
use crate::load::{SafetensorsHeader, SafetensorsTensor, config_from_json};
use crate::model::{HostMatrix, LayerWeight, ModelConfig, WeightRole, WeightSource};

/// Configuration files are kilobytes; an index of shards has a line a tensor.
const CONFIG_LIMIT: u64 = 1 << 20;
const INDEX_LIMIT: u64 = 64 << 20;

/// A folder, its weights memory-mapped.
#[derive(Debug)]
pub struct HfFolder {
    folder: PathBuf,
    config: ModelConfig,
    files: Vec<MappedFile>,
    /// By name: the file and the place in it.
    tensors: HashMap<String, (usize, SafetensorsTensor)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl HfFolder {
    /// Opens a folder and reads its configuration and headers.
    ///
    /// # Errors
    /// When a file is missing, cannot be read or is wrong.
    pub fn open(folder: &Path) -> Result<Self, EngineError> {
        let path = folder.join("config.json");
        let text = read_small(&path, CONFIG_LIMIT)?;
        let config = config_from_json(&text).map_err(|what| EngineError::Model { path, what })?;
        let mut opened =
            Self { folder: folder.to_owned(), config, files: Vec::new(), tensors: HashMap::new() };
        for shard in shards(folder)? {
            opened.add(&shard)?;
        }
        Ok(opened)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn add(&mut self, path: &Path) -> Result<(), EngineError> {
        let file = MappedFile::open(path)?;
        let header = SafetensorsHeader::parse(file.bytes(), path)?;
        for (name, tensor) in header.tensors {
            if let Some((other, _)) = self.tensors.get(&name) {
                let what = format!("tensor '{name}' is also in {}", self.files[*other].path().display());
                return Err(EngineError::Model { path: path.to_owned(), what });
            }
            self.tensors.insert(name, (self.files.len(), tensor));
        }
        self.files.push(file);
        Ok(())
    }

    /// The bytes and format of the tensor for `role`, which must have this shape.
    fn tensor(&self, role: WeightRole, shape: &[usize]) -> Result<(WeightFormat, &[u8]), EngineError> {
        let name = tensor_name(role);
        let Some((file, tensor)) = self.tensors.get(&name) else {
            let what = format!("tensor '{name}' is in none of the safetensors files");
            return Err(EngineError::Model { path: self.folder.clone(), what });
        };
        let file = &self.files[*file];
        let fail = |what| Err(EngineError::Model { path: file.path().to_owned(), what });
        if tensor.shape != shape {
            return fail(format!(
                "tensor '{name}' has shape {:?}, but config.json makes it {shape:?}",
                tensor.shape
            ));
        }
        match weight_format(&tensor.dtype) {
            Some(format) => Ok((format, &file.bytes()[tensor.bytes.clone()])),
            None => fail(format!(
                "tensor '{name}' is stored as {}; F32, F16 and BF16 are supported",
                tensor.dtype
            )),
        }
    }
}

impl WeightSource for HfFolder {
    fn matrix(&self, role: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError> {
        let (format, bytes) = self.tensor(role, &[rows, cols])?;
        Ok(HostMatrix { format, rows, cols, bytes: Cow::Borrowed(bytes) })
    }

    fn vector(&self, role: WeightRole, len: usize) -> Result<Vec<f32>, EngineError> {
        let (format, bytes) = self.tensor(role, &[len])?;
        let mut values = vec![0.0; len];
        quant::dequantize(format, bytes, &mut values)?;
        Ok(values)
    }
}

/// The safetensors files of a folder: those of the index, or the single one.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let path = folder.join("model.safetensors.index.json");
    if !path.exists() {
        let single = folder.join("model.safetensors");
        if single.exists() {
            return Ok(vec![single]);
        }
        let what = "there is neither model.safetensors nor model.safetensors.index.json here".into();
        return Err(EngineError::Model { path: folder.to_owned(), what });
    }
    let fail = |what| EngineError::Model { path: path.clone(), what };
    let index: Index =
        serde_json::from_slice(&read_small(&path, INDEX_LIMIT)?).map_err(|error| fail(error.to_string()))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    if names.is_empty() {
        return Err(fail("the index names no file".into()));
    }
    names
        .into_iter()
        .map(|name| {
            let mut components = Path::new(name).components();
            match (components.next(), components.next()) {
                (Some(Component::Normal(file)), None) => Ok(folder.join(file)),
                _ => Err(fail(format!("'{name}' is not the name of a file in this folder"))),
            }
        })
        .collect()
}

/// The name of the tensor for `role`.
pub(super) fn tensor_name(role: WeightRole) -> String {
    let (layer, weight) = match role {
        WeightRole::Embedding => return "model.embed_tokens.weight".into(),
        WeightRole::FinalNorm => return "model.norm.weight".into(),
        WeightRole::OutputHead => return "lm_head.weight".into(),
        WeightRole::Layer(layer, weight) => (layer, weight),
    };
    let name = match weight {
        LayerWeight::AttentionNorm => "input_layernorm.weight",
        LayerWeight::Query => "self_attn.q_proj.weight",
        LayerWeight::Key => "self_attn.k_proj.weight",
        LayerWeight::Value => "self_attn.v_proj.weight",
        LayerWeight::QueryBias => "self_attn.q_proj.bias",
        LayerWeight::KeyBias => "self_attn.k_proj.bias",
        LayerWeight::ValueBias => "self_attn.v_proj.bias",
        LayerWeight::QueryNorm => "self_attn.q_norm.weight",
        LayerWeight::KeyNorm => "self_attn.k_norm.weight",
        LayerWeight::Output => "self_attn.o_proj.weight",
        LayerWeight::OutputBias => "self_attn.o_proj.bias",
        LayerWeight::FfnNorm => "post_attention_layernorm.weight",
        LayerWeight::Gate => "mlp.gate_proj.weight",
        LayerWeight::Up => "mlp.up_proj.weight",
        LayerWeight::Down => "mlp.down_proj.weight",
    };
    format!("model.layers.{layer}.{name}")
}
