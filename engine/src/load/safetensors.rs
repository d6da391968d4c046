//! The safetensors container, as a pure function of a file's bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use quire_kernels::WeightFormat;
use serde::Deserialize;

use crate::EngineError;

/// The header of a safetensors file, all offsets checked against the file's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsHeader {
    /// Tensors by name.
    pub tensors: BTreeMap<String, SafetensorsTensor>,
}

/// A tensor's place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsTensor {
    /// Element type as the file names it.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

/// The most bytes that the format allows a header.
const MAX_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl SafetensorsHeader {
    /// Parses the header of a file with these bytes; `path` is for errors.
    ///
    /// # Errors
    /// When it is not a safetensors file, is cut short or contradicts itself.
    pub fn parse(file: &[u8], path: &Path) -> Result<Self, EngineError> {
        parse(file).map_err(|what| EngineError::Model { path: path.to_owned(), what })
    }
}

fn parse(file: &[u8]) -> Result<SafetensorsHeader, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("this is not a safetensors file: it has only {} bytes", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length).ok().filter(|_| length <= MAX_HEADER).and_then(|n| rest.get(..n));
    let Some(header) = header else {
        return Err(format!(
            "the header claims {length} bytes, but the file has {} after byte 8 and a header may have {MAX_HEADER}: it \
             is cut short or no safetensors file",
            rest.len()
        ));
    };
    let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header)
        .map_err(|error| format!("the header is not a JSON object: {error}"))?;
    let data = 8 + header.len();
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        if name == "__metadata__" {
            continue;
        }
        let entry: Entry = serde_json::from_value(entry)
            .map_err(|error| format!("tensor '{name}' in the header: {error}"))?;
        let tensor = place(&name, entry, data, file.len())?;
        tensors.insert(name, tensor);
    }
    Ok(SafetensorsHeader { tensors })
}

fn place(name: &str, entry: Entry, data: usize, file_len: usize) -> Result<SafetensorsTensor, String> {
    let [begin, end] = entry.data_offsets;
    let absolute = |offset: u64| usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
    let (Some(start), Some(stop)) = (absolute(begin), absolute(end)) else {
        return Err(format!("tensor '{name}' has offsets {begin} to {end}, beyond any file"));
    };
    if begin > end || stop > file_len {
        return Err(format!(
            "tensor '{name}' lies at bytes {start} to {stop}, but the file ends at byte {file_len}: it is cut short or \
             damaged"
        ));
    }
    let shape = entry.shape.iter().map(|&n| usize::try_from(n)).collect::<Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| format!("tensor '{name}' has a dimension beyond any memory"))?;
    let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    let Some(elements) = elements else {
        return Err(format!("tensor '{name}' has more elements than can be addressed"));
    };
    if let Some(format) = weight_format(&entry.dtype)
        && format.row_bytes(elements) != Some(stop - start)
    {
        return Err(format!(
            "tensor '{name}' has {elements} elements of {} but {} bytes",
            entry.dtype,
            stop - start
        ));
    }
    Ok(SafetensorsTensor { dtype: entry.dtype, shape, bytes: start..stop })
}

/// The weight format of an element type, for those that are supported.
pub(crate) fn weight_format(dtype: &str) -> Option<WeightFormat> {
    match dtype {
        "F32" => Some(WeightFormat::F32),
        "F16" => Some(WeightFormat::F16),
        "BF16" => Some(WeightFormat::Bf16),
        _ => None,
    }
}
