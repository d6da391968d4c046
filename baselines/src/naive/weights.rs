//! Where the weights come from: any function from a Hugging Face tensor name to numbers, or a folder.

use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, RmsNorm};
use serde::Deserialize;

use crate::BaselineError;

/// Gives the tensor of a name, in the shape that is asked for.
type Source<'a> = dyn FnMut(&str, &[usize]) -> Result<Tensor, BaselineError> + 'a;

/// A source of tensors by name; the shape asked for is checked here.
pub(super) struct Weights<'a> {
    source: Box<Source<'a>>,
}

impl<'a> Weights<'a> {
    pub(super) fn from_fn(mut source: impl FnMut(&str) -> Vec<f32> + 'a) -> Self {
        Self {
            source: Box::new(move |name, shape| {
                let data = source(name);
                let expected: usize = shape.iter().product();
                if data.len() != expected {
                    return Err(wrong(name, format!("{} numbers for the shape {shape:?}", data.len())));
                }
                Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
            }),
        }
    }

    pub(super) fn from_safetensors(files: &'a MmapedSafetensors) -> Self {
        Self {
            source: Box::new(move |name, shape| {
                let tensor = files.load(name, &Device::Cpu).map_err(|e| wrong(name, e.to_string()))?;
                if tensor.dims() != shape {
                    return Err(wrong(name, format!("shape {:?}, expected {shape:?}", tensor.dims())));
                }
                Ok(tensor.to_dtype(DType::F32)?)
            }),
        }
    }

    pub(super) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor, BaselineError> {
        (self.source)(name, shape)
    }

    pub(super) fn linear(
        &mut self,
        name: &str,
        rows: usize,
        columns: usize,
        bias: bool,
    ) -> Result<Linear, BaselineError> {
        let weight = self.tensor(&format!("{name}.weight"), &[rows, columns])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[rows])).transpose()?;
        Ok(Linear::new(weight, bias))
    }

    pub(super) fn norm(&mut self, name: &str, size: usize, eps: f64) -> Result<RmsNorm, BaselineError> {
        Ok(RmsNorm::new(self.tensor(&format!("{name}.weight"), &[size])?, eps))
    }
}

fn wrong(name: &str, reason: String) -> BaselineError {
    BaselineError::Weight { name: name.to_owned(), reason }
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// Maps the safetensors files of a Hugging Face folder: one file, or those that the index names.
pub(super) fn open_folder(folder: &Path) -> Result<MmapedSafetensors, BaselineError> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    let files = if index.exists() { shards(folder, &index)? } else { vec![single] };
    for path in &files {
        std::fs::metadata(path)
            .map_err(|e| BaselineError::File { path: path.clone(), reason: e.to_string() })?;
    }
    // SAFETY: the files are mapped read-only; as for every reader of mapped weights, nobody may change them while
    // the model loads. The mapping ends when loading does: every tensor is copied.
    let mapped = unsafe { MmapedSafetensors::multi(&files) };
    mapped.map_err(|e| BaselineError::File { path: folder.to_owned(), reason: e.to_string() })
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>, BaselineError> {
    let fail = |reason: String| BaselineError::File { path: index.to_owned(), reason };
    let text = std::fs::read_to_string(index).map_err(|e| fail(e.to_string()))?;
    let parsed: ShardIndex = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    let mut names: Vec<String> = parsed.weight_map.into_values().collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| {
            let plain = Path::new(&name).file_name().is_some_and(|f| f == name.as_str());
            if plain {
                Ok(folder.join(name))
            } else {
                Err(fail(format!("{name:?} is no file of this folder")))
            }
        })
        .collect()
}
