//! The safetensors container, as a pure function of a file's bytes.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use quire_kernels::WeightFormat;
use serde::de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

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

/// The most dimensions of a tensor: more than any model's has.
const MAX_DIMENSIONS: usize = 8;

/// What the header says of tensors, by name. It is read straight into this, because a JSON value of any form takes many
/// times the size of its text.
struct Entries(BTreeMap<String, Entry>);

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    #[serde(deserialize_with = "shape")]
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
    let Entries(entries) = serde_json::from_slice(header)
        .map_err(|error| format!("the header is not a JSON object of tensors: {error}"))?;
    let data = 8 + header.len();
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let tensor = place(&name, entry, data, file.len())?;
        tensors.insert(name, tensor);
    }
    Ok(SafetensorsHeader { tensors })
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value();
                    let entry =
                        entry.map_err(|error| A::Error::custom(format_args!("tensor '{name}': {error}")))?;
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format_args!("tensor '{name}' appears twice")));
                    }
                    entries.insert(name, entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Shape;
    impl<'de> Visitor<'de> for Shape {
        type Value = Vec<u64>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_DIMENSIONS} dimensions")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = list.next_element()? {
                if shape.len() == MAX_DIMENSIONS {
                    return Err(A::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(Shape)
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
