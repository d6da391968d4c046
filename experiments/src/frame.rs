//! Tables in files: data frames from plain columns, parquet and CSV.

use std::fs::File;
use std::path::Path;

use polars::prelude::{Column, DataFrame, NamedFrom, PolarsError, Series};
use polars_io::prelude::{CsvWriter, ParquetCompression, ParquetReader, ParquetWriter, SerReader, SerWriter};
use polars_utils::compression::ZstdLevel;

use crate::record::CellKey;

use crate::replace::replace;

/// An error of reading or writing a table.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {what}")]
pub struct FrameError {
    path: String,
    what: String,
}

impl FrameError {
    /// An error of the file at `path`.
    pub(crate) fn new(path: &Path, what: impl std::fmt::Display) -> Self {
        error(path, what)
    }
}

fn error(path: &Path, what: impl std::fmt::Display) -> FrameError {
    FrameError { path: path.display().to_string(), what: what.to_string() }
}

/// How hard to compress: runs are written fast, what is committed is written small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Fast,
    Small,
}

/// A column of `values`.
pub(crate) fn column<T, A: ?Sized>(name: &str, values: T) -> Column
where
    Series: NamedFrom<T, A>,
{
    Series::new(name.into(), values).into()
}

/// A frame of columns of one length.
pub(crate) fn frame(height: usize, columns: Vec<Column>) -> DataFrame {
    DataFrame::new(height, columns).expect("columns of one table have one length and different names")
}

pub(crate) fn write_parquet(path: &Path, table: &mut DataFrame, how: Compression) -> Result<(), FrameError> {
    let level =
        ZstdLevel::try_new(if how == Compression::Small { 19 } else { 3 }).expect("both are levels of zstd");
    let compression = ParquetCompression::Zstd(Some(level));
    let written = |file| {
        let writer = ParquetWriter::new(file).with_compression(compression);
        writer.finish(table).map(drop).map_err(|e| error(path, e))
    };
    replace(path, written, error)
}

pub(crate) fn read_parquet(path: &Path) -> Result<DataFrame, FrameError> {
    let file = File::open(path).map_err(|e| error(path, e))?;
    ParquetReader::new(file).finish().map_err(|e| error(path, e))
}

pub(crate) fn write_csv(path: &Path, table: &mut DataFrame) -> Result<(), FrameError> {
    let written = |file| CsvWriter::new(file).finish(table).map_err(|e| error(path, e));
    replace(path, written, error)
}

/// Reads columns of a frame, with the file's name in errors.
pub(crate) struct Columns<'a> {
    pub(crate) path: &'a Path,
    pub(crate) table: &'a DataFrame,
}

impl Columns<'_> {
    fn get<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Series) -> Result<Vec<T>, PolarsError>,
    ) -> Result<Vec<T>, FrameError> {
        let column = self.table.column(name).map_err(|e| error(self.path, e))?;
        read(column.as_materialized_series()).map_err(|e| error(self.path, e))
    }

    /// Whether there is a column that not all files have.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.table.column(name).is_ok()
    }

    pub(crate) fn f64(&self, name: &str) -> Result<Vec<f64>, FrameError> {
        self.get(name, |s| Ok(s.f64()?.iter().map(Option::unwrap_or_default).collect()))
    }

    pub(crate) fn optional_u32(&self, name: &str) -> Result<Vec<Option<u32>>, FrameError> {
        self.get(name, |s| Ok(s.u32()?.iter().collect()))
    }

    /// The columns that say which cell a row belongs to.
    pub(crate) fn keys(&self) -> Result<Vec<CellKey>, FrameError> {
        let (panel, system) = (self.text("panel")?, self.text("system")?);
        let (rate, repeat, seed) = (self.f64("rate")?, self.u32("repeat")?, self.u64("seed")?);
        let rest = rate.into_iter().zip(repeat).zip(seed);
        let key = |((panel, system), ((rate, repeat), seed))| CellKey { panel, system, rate, repeat, seed };
        Ok(panel.into_iter().zip(system).zip(rest).map(key).collect())
    }

    pub(crate) fn u64(&self, name: &str) -> Result<Vec<u64>, FrameError> {
        self.get(name, |s| Ok(s.u64()?.iter().map(Option::unwrap_or_default).collect()))
    }

    pub(crate) fn u32(&self, name: &str) -> Result<Vec<u32>, FrameError> {
        self.get(name, |s| Ok(s.u32()?.iter().map(Option::unwrap_or_default).collect()))
    }

    pub(crate) fn bool(&self, name: &str) -> Result<Vec<bool>, FrameError> {
        self.get(name, |s| Ok(s.bool()?.iter().map(Option::unwrap_or_default).collect()))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Vec<String>, FrameError> {
        self.get(name, |s| Ok(s.str()?.iter().map(|t| t.unwrap_or_default().to_string()).collect()))
    }

    /// A column of lists.
    pub(crate) fn u32_lists(&self, name: &str) -> Result<Vec<Vec<u32>>, FrameError> {
        self.get(name, |s| {
            let lists = s.list()?;
            let read = |list: Option<Series>| match list {
                Some(list) => Ok(list.u32()?.iter().map(Option::unwrap_or_default).collect()),
                None => Ok(Vec::new()),
            };
            lists.series_iter().map(read).collect()
        })
    }
}
