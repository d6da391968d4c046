//! Figures, drawn from records alone: one description, two files (SVG and PNG).

mod ablation;
mod axis;
mod bars;
mod canvas;
mod caption;
mod figure;
mod grid;
mod memory;
mod micro;
mod page;
mod palette;
mod rates;
mod ratio_grid;
mod ratios;
mod speedup;
mod sweep;
mod traces;

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use plotters::prelude::*;

pub use axis::Scale;
pub use bars::{Bar, BarColumn, BarFigure, BarGroup, Part};
pub use figure::{Column, Figure, Horizontal, Intervals, Point, Row, Series, Stroke};
pub use grid::{Grid, GridBand, GridCell, GridPanel, GridRow};
pub use micro::micro_figure;
pub use ratios::{Ratio, RatioBar, RatioColumn, RatioFigure, RatioRow};
pub use traces::traces_figure;

use crate::config::FigureConfig;
use crate::run_data::RunData;
use canvas::Canvas;

/// A figure of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Picture {
    /// Of lines.
    Lines(Figure),
    /// Of stacked bars.
    Bars(BarFigure),
    /// Of ratios.
    Ratios(RatioFigure),
    /// A table.
    Grid(Grid),
}

/// Builds the figure that a run's configuration asks for.
pub fn run_figure(run: &RunData) -> Picture {
    match &run.manifest.settings.figure {
        FigureConfig::Rates { rows } => Picture::Lines(rates::rate_figure(run, rows)),
        FigureConfig::Tradeoff { x, rows } => Picture::Lines(rates::tradeoff_figure(run, *x, rows)),
        FigureConfig::Speedup { over } => Picture::Lines(speedup::speedup_figure(run, over)),
        FigureConfig::Memory {} => Picture::Bars(memory::memory_figure(run)),
        FigureConfig::Sweep { x, scale, rows } => Picture::Lines(sweep::sweep_figure(run, x, *scale, rows)),
        FigureConfig::Ablation { over, rows } => Picture::Ratios(ablation::ablation_figure(run, over, rows)),
        FigureConfig::Table { .. } => Picture::Grid(ratio_grid::ratio_grid(run)),
    }
}

impl Picture {
    /// The lines below it.
    pub fn caption(&self) -> &[String] {
        match self {
            Picture::Lines(figure) => &figure.caption,
            Picture::Bars(figure) => &figure.caption,
            Picture::Ratios(figure) => &figure.caption,
            Picture::Grid(grid) => &grid.caption,
        }
    }

    /// Takes the caption off, for a page that has its own.
    pub fn take_caption(&mut self) -> Vec<String> {
        std::mem::take(match self {
            Picture::Lines(figure) => &mut figure.caption,
            Picture::Bars(figure) => &mut figure.caption,
            Picture::Ratios(figure) => &mut figure.caption,
            Picture::Grid(grid) => &mut grid.caption,
        })
    }

    fn size(&self) -> (f64, f64) {
        match self {
            Picture::Lines(figure) => figure.size(),
            Picture::Bars(figure) => figure.size(),
            Picture::Ratios(figure) => figure.size(),
            Picture::Grid(grid) => grid.size(),
        }
    }

    /// Draws it; `drop` is for [`Canvas::new`].
    fn draw<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, plotters::coord::Shift>,
        drop: f64,
    ) -> Result<(), PlotError> {
        let canvas = Canvas::new(area, SCALE, drop);
        canvas.fill(WHITE)?;
        match self {
            Picture::Lines(figure) => figure.draw(&canvas),
            Picture::Bars(figure) => figure.draw(&canvas),
            Picture::Ratios(figure) => figure.draw(&canvas),
            Picture::Grid(grid) => grid.draw(&canvas),
        }
    }
}

/// A figure that cannot be drawn or saved.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The drawing library's refusal.
    #[error("drawing: {0}")]
    Draw(String),
    /// A file that cannot be written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why. No `source`: the text has it, and a chain would say it twice.
        error: std::io::Error,
    },
}

/// Pixels a unit; the figure is 1,000 units wide.
const SCALE: f64 = 2.0;

/// By which share of its size text is lowered in the bitmap.
const BITMAP_DROP: f64 = 0.09;

/// Draws `picture` to `stem`.svg and `stem`.png.
///
/// # Errors
/// When a file cannot be written.
pub fn save(picture: &Picture, stem: &Path) -> Result<(), PlotError> {
    canvas::register_fonts();
    let (width, height) = picture.size();
    let size = ((width * SCALE).round() as u32, (height * SCALE).round() as u32);

    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        picture.draw(&area, 0.0)?;
        area.present().map_err(|e| PlotError::Draw(e.to_string()))?;
    }
    let opened = svg.find('>').map_or(0, |end| end + 1);
    svg.insert_str(opened, &canvas::embedded_fonts());
    let path = with_extension(stem, "svg");
    fs::write(&path, svg).map_err(|error| PlotError::Io { path: path.display().to_string(), error })?;

    let mut pixels = vec![0; size.0 as usize * size.1 as usize * 3];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        picture.draw(&area, BITMAP_DROP)?;
        area.present().map_err(|e| PlotError::Draw(e.to_string()))?;
    }
    let path = with_extension(stem, "png");
    write_png(&path, size, &pixels)
        .map_err(|e| PlotError::Io { path: path.display().to_string(), error: e.into() })
}

/// `stem`.`extension`: what follows a dot in the stem's own name stays.
pub(crate) fn with_extension(stem: &Path, extension: &str) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Writes RGB pixels as small as can be: with a palette, and without a filter, which helps only where colours differ.
fn write_png(path: &Path, (width, height): (u32, u32), pixels: &[u8]) -> Result<(), png::EncodingError> {
    let (palette, indices) = palette::indexed(pixels);
    let mut encoder = png::Encoder::new(BufWriter::new(fs::File::create(path)?), width, height);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette(palette.into_flattened());
    // The level first: it chooses a filter too.
    encoder.set_compression(png::Compression::High);
    encoder.set_filter(png::Filter::NoFilter);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&indices)?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure() -> Figure {
        let point = |x: f64, y: f64| Point {
            x,
            y,
            interval: Some((y * 0.8, y * 1.2)),
            hollow: x > 3.0,
            lower_bound: x > 3.0,
        };
        let line = |k: f64| (1..5).map(|i| point(f64::from(i), k * f64::from(i))).collect::<Vec<_>>();
        let row = |scale| Row { label: ["Latency".into(), "s/token".into()], scale, height: 1.0, x: None };
        let series = |name: &str, stroke| Series { name: name.into(), stroke };
        let own = Horizontal { label: "Length (tokens)".into(), scale: Scale::Log };
        Figure {
            series: vec![series("first & <best>", Stroke::Marked), series("second", Stroke::Dashed)],
            x: Horizontal { label: "Request rate (1/s)".into(), scale: Scale::Linear },
            intervals: Intervals::Band,
            rows: vec![Row { x: Some(own), ..row(Scale::Log) }, row(Scale::Linear)],
            columns: vec![Column {
                title: "Panel".into(),
                subtitle: "made up".into(),
                series: vec![vec![line(1.0), line(2.0)], vec![line(0.0), vec![]]],
            }],
            caption: vec!["A caption.".into()],
        }
    }

    #[test]
    fn draws_both_files_with_every_name_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let stem = dir.path().join("figure");
        save(&Picture::Lines(figure()), &stem).unwrap();
        let svg = fs::read_to_string(stem.with_extension("svg")).unwrap();
        for text in [
            "first &amp; &lt;best&gt;",
            "second",
            "Panel",
            "s/token",
            "Request rate (1/s)",
            "A caption.",
            "Length (tokens, log)",
        ] {
            assert!(svg.contains(text), "{text} is missing");
        }
        let png = fs::read(stem.with_extension("png")).unwrap();
        assert_eq!(&png[1..4], b"PNG");
        let width = u32::from_be_bytes(png[16..20].try_into().unwrap());
        assert_eq!(width, 2000);
    }

    #[test]
    fn an_empty_figure_is_drawn_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut empty = figure();
        for series in &mut empty.columns[0].series {
            series.iter_mut().for_each(Vec::clear);
        }
        empty.intervals = Intervals::Bars;
        save(&Picture::Lines(empty), &dir.path().join("empty")).unwrap();
    }

    #[test]
    fn bars_say_their_shares_and_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let part = |name, colour| Part { name, colour };
        let bar = |parts: &[f64], note| Bar { parts: parts.to_vec(), interval: Some((0.5, 0.7)), note };
        let bars = vec![bar(&[0.62, 0.38], ""), bar(&[], "left out")];
        let figure = BarFigure {
            parts: vec![part("used", BLUE), part("free", WHITE)],
            labels: vec!["one".into(), "other".into()],
            x_label: "share".into(),
            columns: vec![BarColumn {
                title: "Panel".into(),
                subtitle: String::new(),
                groups: vec![BarGroup { title: "7 requests/s".into(), bars }],
            }],
            caption: vec![],
        };
        let stem = dir.path().join("bars");
        save(&Picture::Bars(figure), &stem).unwrap();
        let svg = fs::read_to_string(stem.with_extension("svg")).unwrap();
        for text in ["62 %", "38 %", "left out", "used", "free", "7 requests/s", "other"] {
            assert!(svg.contains(text), "{text} is missing");
        }
    }
}
