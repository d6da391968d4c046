//! The GGUF container, versions 2 and 3 (ggml's `docs/gguf.md`), as a pure function of a file's bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use quire_kernels::WeightFormat;

use crate::EngineError;
use crate::load::gguf_metadata::GgufValue;

/// Everything in a GGUF file but the tensors' data, all offsets checked against the file's size.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufHeader {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, GgufValue>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// A tensor's place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Element format.
    pub format: WeightFormat,
    /// Output features; 1 for vectors.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Its bytes in the file.
    pub bytes: Range<usize>,
}

impl GgufHeader {
    /// Parses the header of a file with these bytes; `path` is for errors.
    ///
    /// # Errors
    /// When it is not GGUF, is cut short, contradicts itself or uses a tensor type that is not supported.
    pub fn parse(file: &[u8], path: &Path) -> Result<Self, EngineError> {
        parse(file).map_err(|what| EngineError::Model { path: path.to_owned(), what })
    }
}

fn parse(file: &[u8]) -> Result<GgufHeader, String> {
    let mut cursor = Cursor { file, at: 0 };
    if cursor.take(4, "the magic number")? != b"GGUF" {
        return Err("this is not a GGUF file: it does not start with 'GGUF'".into());
    }
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(match version.swap_bytes() {
            1..=3 => "this is a big-endian GGUF file; only little-endian ones are supported".into(),
            _ => format!("GGUF version {version} is not supported; 2 and 3 are"),
        });
    }
    let tensor_count = cursor.u64("the tensor count")?;
    let metadata_count = cursor.u64("the metadata count")?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let at = cursor.at;
        let key = cursor.string("a metadata key")?.to_owned();
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata key '{key}' appears twice, again at byte {at}"));
        }
    }
    let mut entries = Vec::new();
    for _ in 0..tensor_count {
        entries.push(cursor.tensor()?);
    }
    let tensors = place_tensors(entries, &metadata, cursor.at, file.len())?;
    Ok(GgufHeader { version, metadata, tensors })
}

/// A tensor as its header entry has it.
struct Entry {
    name: String,
    format: WeightFormat,
    rows: usize,
    cols: usize,
    offset: u64,
}

fn place_tensors(
    entries: Vec<Entry>,
    metadata: &BTreeMap<String, GgufValue>,
    header_end: usize,
    file_len: usize,
) -> Result<BTreeMap<String, GgufTensor>, String> {
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(GgufValue::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
        Some(other) => return Err(format!("general.alignment is {other:?}, not a power of two up to 2^20")),
    };
    let data = header_end.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for Entry { name, format, rows, cols, offset } in entries {
        let len = format.row_bytes(cols).and_then(|row| row.checked_mul(rows)).ok_or_else(|| {
            format!(
                "tensor '{name}' ({rows} x {cols}) is no whole number of {format:?} blocks of {} elements",
                format.block_elements()
            )
        })?;
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        let bytes = range.filter(|range| range.end <= file_len).ok_or_else(|| {
            format!(
                "tensor '{name}' has {len} bytes at offset {offset} after byte {data}, but the file ends at byte \
                 {file_len}: it is cut short or damaged"
            )
        })?;
        if tensors.insert(name.clone(), GgufTensor { format, rows, cols, bytes }).is_some() {
            return Err(format!("tensor '{name}' appears twice"));
        }
    }
    Ok(tensors)
}

/// Reads forward through the file. Every read is checked against its end.
pub(super) struct Cursor<'a> {
    pub(super) file: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let bytes = self.at.checked_add(len).and_then(|end| self.file.get(self.at..end)).ok_or_else(|| {
            format!(
                "{what} needs {len} bytes at byte {}, but the file ends at byte {}: it is cut short or damaged",
                self.at,
                self.file.len()
            )
        })?;
        self.at += len;
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        Ok(self.take(N, what)?.try_into().expect("take gives as many bytes as were asked for"))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let at = self.at;
        let len = self.u64(what)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        std::str::from_utf8(self.take(len, what)?).map_err(|_| format!("{what} at byte {at} is not UTF-8"))
    }

    fn tensor(&mut self) -> Result<Entry, String> {
        let name = self.string("a tensor's name")?.to_owned();
        let dimensions = self.u32(&name)?;
        if !(1..=4).contains(&dimensions) {
            return Err(format!("tensor '{name}' has {dimensions} dimensions; 1 to 4 are possible"));
        }
        let too_large = |name: &str| format!("tensor '{name}' has more elements than can be addressed");
        let mut cols = 0;
        let mut rows = 1usize;
        for dimension in 0..dimensions {
            let size = usize::try_from(self.u64(&name)?).map_err(|_| too_large(&name))?;
            match dimension {
                0 => cols = size,
                _ => rows = rows.checked_mul(size).ok_or_else(|| too_large(&name))?,
            }
        }
        let kind = self.u32(&name)?;
        let format = weight_format(kind).ok_or_else(|| {
            format!(
                "tensor '{name}' is stored as {}; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K",
                type_name(kind)
            )
        })?;
        let offset = self.u64(&name)?;
        Ok(Entry { name, format, rows, cols, offset })
    }
}

fn weight_format(kind: u32) -> Option<WeightFormat> {
    Some(match kind {
        0 => WeightFormat::F32,
        1 => WeightFormat::F16,
        2 => WeightFormat::Q4_0,
        3 => WeightFormat::Q4_1,
        8 => WeightFormat::Q8_0,
        12 => WeightFormat::Q4K,
        14 => WeightFormat::Q6K,
        30 => WeightFormat::Bf16,
        _ => return None,
    })
}

fn type_name(kind: u32) -> String {
    let name = match kind {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("unknown type {kind}"),
    };
    name.into()
}
