//! Weights of a GGUF file.

use std::borrow::Cow;
use std::path::Path;

use quire_kernels::quant;

use crate::EngineError;
use crate::load::mapped::MappedFile;
use crate::load::{GgufHeader, GgufTensor, config_from_gguf};
use crate::model::{HostMatrix, LayerWeight, ModelConfig, WeightRole, WeightSource};

/// A GGUF file, memory-mapped.
#[derive(Debug)]
pub struct GgufWeights {
    file: MappedFile,
    header: GgufHeader,
    config: ModelConfig,
}

impl GgufWeights {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// When it cannot be read or is wrong.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let file = MappedFile::open(path)?;
        let header = GgufHeader::parse(file.bytes(), path)?;
        let config = config_from_gguf(&header, file.bytes())
            .map_err(|what| EngineError::Model { path: path.to_owned(), what })?;
        Ok(Self { file, header, config })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The file's header.
    pub fn header(&self) -> &GgufHeader {
        &self.header
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.file.bytes()
    }

    fn tensor(&self, role: WeightRole, rows: usize, cols: usize) -> Result<&GgufTensor, EngineError> {
        let name = tensor_name(role);
        let fail = |what| Err(EngineError::Model { path: self.file.path().to_owned(), what });
        let Some(tensor) = self.header.tensors.get(&name) else {
            return fail(format!("tensor '{name}' is missing"));
        };
        if (tensor.rows, tensor.cols) != (rows, cols) {
            return fail(format!(
                "tensor '{name}' is {} x {}, but the metadata make it {rows} x {cols}",
                tensor.rows, tensor.cols
            ));
        }
        Ok(tensor)
    }

    /// Heads whose rows this tensor interleaves, if it does.
    fn interleaved_heads(&self, role: WeightRole) -> Option<usize> {
        use LayerWeight::{Key, KeyBias, Query, QueryBias};
        if !self.config.architecture.facts().gguf_interleaves {
            return None;
        }
        match role {
            WeightRole::Layer(_, Query | QueryBias) => Some(self.config.heads),
            WeightRole::Layer(_, Key | KeyBias) => Some(self.config.kv_heads),
            _ => None,
        }
    }
}

impl WeightSource for GgufWeights {
    fn matrix(&self, role: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError> {
        let tensor = self.tensor(role, rows, cols)?;
        let stored = &self.file.bytes()[tensor.bytes.clone()];
        let bytes = match self.interleaved_heads(role) {
            Some(heads) => Cow::Owned(split_halves(stored, heads, rows)),
            None => Cow::Borrowed(stored),
        };
        Ok(HostMatrix { format: tensor.format, rows, cols, bytes })
    }

    fn vector(&self, role: WeightRole, len: usize) -> Result<Vec<f32>, EngineError> {
        let tensor = self.tensor(role, 1, len)?;
        let stored = &self.file.bytes()[tensor.bytes.clone()];
        let mut values = vec![0.0; len];
        quant::dequantize(tensor.format, stored, &mut values)?;
        if let Some(heads) = self.interleaved_heads(role) {
            let half = len / heads / 2;
            values = (0..len).map(|row| values[interleaved_row(row, half)]).collect();
        }
        Ok(values)
    }
}

/// Reorders whole rows, of any format, from the interleaved pairing to the half-split one.
fn split_halves(stored: &[u8], heads: usize, rows: usize) -> Vec<u8> {
    let (stride, half) = (stored.len() / rows, rows / heads / 2);
    let mut out = Vec::with_capacity(stored.len());
    for row in 0..rows {
        let from = interleaved_row(row, half) * stride;
        out.extend_from_slice(&stored[from..from + stride]);
    }
    out
}

/// Where the interleaved order keeps row `row` of the half-split order; a head has `2 * half` rows.
fn interleaved_row(row: usize, half: usize) -> usize {
    let (head, within) = (row / (2 * half), row % (2 * half));
    head * 2 * half + 2 * (within % half) + within / half
}

fn tensor_name(role: WeightRole) -> String {
    let (layer, weight) = match role {
        WeightRole::Embedding => return "token_embd.weight".into(),
        WeightRole::FinalNorm => return "output_norm.weight".into(),
        WeightRole::OutputHead => return "output.weight".into(),
        WeightRole::Layer(layer, weight) => (layer, weight),
    };
    let name = match weight {
        LayerWeight::AttentionNorm => "attn_norm.weight",
        LayerWeight::Query => "attn_q.weight",
        LayerWeight::Key => "attn_k.weight",
        LayerWeight::Value => "attn_v.weight",
        LayerWeight::QueryBias => "attn_q.bias",
        LayerWeight::KeyBias => "attn_k.bias",
        LayerWeight::ValueBias => "attn_v.bias",
        LayerWeight::QueryNorm => "attn_q_norm.weight",
        LayerWeight::KeyNorm => "attn_k_norm.weight",
        LayerWeight::Output => "attn_output.weight",
        LayerWeight::OutputBias => "attn_output.bias",
        LayerWeight::FfnNorm => "ffn_norm.weight",
        LayerWeight::Gate => "ffn_gate.weight",
        LayerWeight::Up => "ffn_up.weight",
        LayerWeight::Down => "ffn_down.weight",
    };
    format!("blk.{layer}.{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_is_undone() {
        // Two heads of four rows of two bytes. The half-split order 0 1 2 3 is stored as 0 2 1 3.
        let stored = [0, 0, 2, 2, 1, 1, 3, 3, 4, 4, 6, 6, 5, 5, 7, 7];
        let split = split_halves(&stored, 2, 8);
        assert_eq!(split, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]);
    }
}
