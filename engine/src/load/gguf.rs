//! The GGUF container, versions 2 and 3 (ggml's `docs/gguf.md`), as a pure function of a file's bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use quire_kernels::WeightFormat;

use crate::EngineError;

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

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    String(String),
    /// A list, left in the file.
    Array(GgufArray),
}

/// A list in the metadata: where it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufArray {
    kind: u32,
    count: usize,
    bytes: Range<usize>,
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

const STRING: u32 = 8;
const ARRAY: u32 = 9;

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
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
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

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        Ok(self.take(N, what)?.try_into().expect("take gives as many bytes as were asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, what: &str) -> Result<&'a str, String> {
        let at = self.at;
        let len = self.u64(what)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        std::str::from_utf8(self.take(len, what)?).map_err(|_| format!("{what} at byte {at} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<GgufValue, String> {
        use GgufValue::{Bool, Float, Signed, Unsigned};
        Ok(match kind {
            0 => Unsigned(self.array::<1>(key)?[0].into()),
            1 => Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Unsigned(self.u32(key)?.into()),
            5 => Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Bool(self.array::<1>(key)?[0] != 0),
            STRING => GgufValue::String(self.string(key)?.to_owned()),
            ARRAY => GgufValue::Array(self.list(key)?),
            10 => Unsigned(self.u64(key)?),
            11 => Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Float(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(format!("metadata key '{key}' at byte {} has unknown type {kind}", self.at)),
        })
    }

    fn list(&mut self, key: &str) -> Result<GgufArray, String> {
        let kind = self.u32(key)?;
        let count = self.u64(key)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let start = self.at;
        if kind == STRING {
            for _ in 0..count {
                self.string(key)?;
            }
        } else {
            let width = scalar_width(kind).ok_or_else(|| {
                format!("metadata key '{key}' at byte {start} is a list of unsupported type {kind}")
            })?;
            self.take(count.saturating_mul(width), key)?;
        }
        Ok(GgufArray { kind, count, bytes: start..self.at })
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

fn scalar_width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
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

impl GgufArray {
    /// Elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The strings of a list of strings, from the bytes of the file it was parsed from; `None` if it is another list.
    pub fn strings<'a>(&self, file: &'a [u8]) -> Option<Vec<&'a str>> {
        if self.kind != STRING {
            return None;
        }
        let mut cursor = Cursor { file: file.get(..self.bytes.end)?, at: self.bytes.start };
        (0..self.count).map(|_| cursor.string("a list's string").ok()).collect()
    }

    /// The numbers of a list of numbers.
    pub fn numbers(&self, file: &[u8]) -> Option<Vec<f64>> {
        scalar_width(self.kind)?;
        let mut cursor = Cursor { file: file.get(..self.bytes.end)?, at: self.bytes.start };
        let number = |value| match value {
            GgufValue::Unsigned(n) => Some(n as f64),
            GgufValue::Signed(n) => Some(n as f64),
            GgufValue::Float(n) => Some(n),
            GgufValue::Bool(n) => Some(f64::from(n)),
            GgufValue::String(_) | GgufValue::Array(_) => None,
        };
        (0..self.count).map(|_| cursor.value(self.kind, "a list's number").ok().and_then(number)).collect()
    }
}

impl GgufHeader {
    /// An unsigned number of the metadata; signed ones that are not negative count.
    ///
    /// # Errors
    /// When the key is there and is no such number.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, String> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Unsigned(n)) => Ok(Some(*n)),
            Some(GgufValue::Signed(n)) if *n >= 0 => Ok(Some(*n as u64)),
            Some(other) => Err(format!("metadata key '{key}' is {}, not a whole number", other.kind())),
        }
    }

    /// A float of the metadata.
    ///
    /// # Errors
    /// When the key is there and is no float.
    pub fn float(&self, key: &str) -> Result<Option<f64>, String> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Float(n)) => Ok(Some(*n)),
            Some(other) => Err(format!("metadata key '{key}' is {}, not a float", other.kind())),
        }
    }

    /// A text of the metadata.
    ///
    /// # Errors
    /// When the key is there and is no text.
    pub fn text(&self, key: &str) -> Result<Option<&str>, String> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::String(text)) => Ok(Some(text)),
            Some(other) => Err(format!("metadata key '{key}' is {}, not text", other.kind())),
        }
    }

    /// A truth value of the metadata.
    ///
    /// # Errors
    /// When the key is there and is none.
    pub fn truth(&self, key: &str) -> Result<Option<bool>, String> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(GgufValue::Bool(truth)) => Ok(Some(*truth)),
            Some(other) => Err(format!("metadata key '{key}' is {}, not true or false", other.kind())),
        }
    }
}

impl GgufValue {
    fn kind(&self) -> &'static str {
        match self {
            GgufValue::Unsigned(_) | GgufValue::Signed(_) => "an integer",
            GgufValue::Float(_) => "a float",
            GgufValue::Bool(_) => "a truth value",
            GgufValue::String(_) => "text",
            GgufValue::Array(_) => "a list",
        }
    }
}
