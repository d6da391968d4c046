//! Metadata of GGUF files: typed values by key.

use std::ops::Range;

use crate::load::gguf::{Cursor, GgufHeader};

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

const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl Cursor<'_> {
    /// Reads a value of type `kind`, which is that of `key`.
    pub(super) fn value(&mut self, kind: u32, key: &str) -> Result<GgufValue, String> {
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
