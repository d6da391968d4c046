//! Reading line by line with bounded memory, and comma-separated fields with their places.
//!
//! The traces' CSV has no quotes, so a comma always ends a field; that keeps every column of an error exact.

use std::io::{BufRead, Read};

use crate::error::WorkloadError;
use crate::trace::MAX_TOKENS;

/// The longest line that is read; the longest prompt of a real trace takes a few kilobytes.
const MAX_LINE: u64 = 1 << 24;

/// The lines of a file that are not blank.
pub(crate) struct Lines<'a, R> {
    reader: R,
    file: &'a str,
    line: u64,
    buffer: Vec<u8>,
}

impl<'a, R: BufRead> Lines<'a, R> {
    pub(crate) fn new(reader: R, file: &'a str) -> Self {
        Self { reader, file, line: 0, buffer: Vec::new() }
    }

    /// The next line without its end, or `None` at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<Line<'_>>, WorkloadError> {
        loop {
            self.buffer.clear();
            self.line += 1;
            let mut bounded = (&mut self.reader).take(MAX_LINE);
            let read = bounded.read_until(b'\n', &mut self.buffer);
            let read = read.map_err(|error| WorkloadError::Io { path: self.file.into(), error })?;
            if read == 0 {
                return Ok(None);
            }
            let place = Place { file: self.file, line: self.line };
            if read as u64 == MAX_LINE {
                return Err(place.error(0, format!("the line is longer than {MAX_LINE} bytes")));
            }
            let start = if self.line == 1 && self.buffer.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            if !self.buffer[start..].trim_ascii().is_empty() {
                return Ok(Some(Line { bytes: self.buffer[start..].trim_ascii_end(), place }));
            }
        }
    }
}

/// A line and where it is.
pub(crate) struct Line<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) place: Place<'a>,
}

impl Line<'_> {
    /// The line as a JSON document.
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, WorkloadError> {
        serde_json::from_slice(self.bytes).map_err(|error| {
            let text = error.to_string();
            let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what);
            self.place.error(error.column().saturating_sub(1), problem)
        })
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    file: &'a str,
    line: u64,
}

impl Place<'_> {
    /// An error at a byte of the line, counted from 0.
    pub(crate) fn error(self, offset: usize, problem: impl Into<String>) -> WorkloadError {
        WorkloadError::Malformed {
            file: self.file.to_owned(),
            line: self.line,
            column: offset as u64 + 1,
            problem: problem.into(),
        }
    }
}

/// Where the wanted columns are in a file with a header line.
pub(crate) struct Header<const N: usize> {
    names: [&'static str; N],
    index: [usize; N],
    width: usize,
}

impl<const N: usize> Header<N> {
    pub(crate) fn parse(line: &Line, names: [&'static str; N]) -> Result<Self, WorkloadError> {
        let fields: Vec<&[u8]> = line.bytes.split(|&b| b == b',').map(<[u8]>::trim_ascii).collect();
        let mut index = [0; N];
        for (slot, name) in index.iter_mut().zip(names) {
            let found = fields.iter().position(|field| *field == name.as_bytes());
            *slot = found.ok_or_else(|| line.place.error(0, format!("the header has no column {name:?}")))?;
        }
        Ok(Self { names, index, width: fields.len() })
    }

    /// The wanted fields of a row, in the order of the names.
    pub(crate) fn fields<'a>(&self, line: &Line<'a>) -> Result<[Field<'a>; N], WorkloadError> {
        let mut picked = self.names.map(|name| Field { bytes: &[][..], offset: 0, name, place: line.place });
        let (mut offset, mut width) = (0, 0);
        for (column, bytes) in line.bytes.split(|&b| b == b',').enumerate() {
            for (slot, index) in picked.iter_mut().zip(self.index) {
                if index == column {
                    (slot.bytes, slot.offset) = (bytes.trim_ascii(), offset);
                }
            }
            offset += bytes.len() + 1;
            width = column + 1;
        }
        if width != self.width {
            let problem = format!("the row has {width} fields, the header {}", self.width);
            return Err(line.place.error(line.bytes.len(), problem));
        }
        Ok(picked)
    }
}

/// A field of a row.
pub(crate) struct Field<'a> {
    pub(crate) bytes: &'a [u8],
    offset: usize,
    name: &'static str,
    place: Place<'a>,
}

impl Field<'_> {
    pub(crate) fn error(&self, problem: &str) -> WorkloadError {
        let shown = String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(40)]);
        self.place.error(self.offset, format!("{} {shown:?}: {problem}", self.name))
    }

    fn text(&self) -> Result<&str, WorkloadError> {
        str::from_utf8(self.bytes).map_err(|_| self.error("not UTF-8"))
    }

    /// A number of tokens.
    pub(crate) fn tokens(&self) -> Result<u32, WorkloadError> {
        let value: u64 = self.text()?.parse().map_err(|_| self.error("not a whole number of tokens"))?;
        match u32::try_from(value) {
            Ok(tokens) if tokens <= MAX_TOKENS => Ok(tokens),
            _ => Err(self.error(&format!("more than {} tokens", MAX_TOKENS))),
        }
    }

    /// A time in seconds.
    pub(crate) fn seconds(&self) -> Result<f64, WorkloadError> {
        let value: f64 = self.text()?.parse().map_err(|_| self.error("not a number of seconds"))?;
        if value.is_finite() && (0.0..1e12).contains(&value) {
            return Ok(value);
        }
        Err(self.error("not a time between 0 and 1e12 seconds"))
    }
}
