//! A figure of lines as data, and how it is laid out: a grid of axes, one column a panel and one row a quantity.

mod frame;

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::axis::{Axis, Scale};
use super::canvas::{Canvas, TextLook, fitted, text_width};
use super::page::{self, CAPTION, LEGEND_LINE, RIGHT, SMALL, TEXT, TITLES, WIDTH, X_LABELS};
use frame::Frame;

/// One measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Ends of the confidence interval, if there is one.
    pub interval: Option<(f64, f64)>,
    /// Drawn hollow: overloaded, or with censored requests.
    pub hollow: bool,
    /// The value is a lower bound: drawn with an arrow upwards.
    pub lower_bound: bool,
}

/// A row of axes: one quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What it is; the second line is its unit or kind.
    pub label: [String; 2],
    /// Vertical scale.
    pub scale: Scale,
    /// Height relative to other rows.
    pub height: f64,
    /// Its own horizontal axis, where it does not share the figure's.
    pub x: Option<Horizontal>,
}

/// A horizontal axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Horizontal {
    /// What it is.
    pub label: String,
    /// Its scale.
    pub scale: Scale,
}

/// A name in the legend.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// The name.
    pub name: String,
    /// How it is drawn.
    pub stroke: Stroke,
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stroke {
    /// A line with a marker at each point, for measurements.
    Marked,
    /// A line, for what has very many points.
    Plain,
    /// A dashed line, for what was not measured.
    Dashed,
}

/// How confidence intervals are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intervals {
    /// A band along the line.
    Band,
    /// A bar at each point, for lines that may turn back.
    Bars,
}

/// A column of axes: one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// Bold title.
    pub title: String,
    /// Line below it.
    pub subtitle: String,
    /// `[row][series]` points, in the line's order.
    pub series: Vec<Vec<Vec<Point>>>,
}

/// A figure of lines, ready to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// The series, in the legend's order.
    pub series: Vec<Series>,
    /// The horizontal axis of the rows that have none of their own.
    pub x: Horizontal,
    /// How intervals are drawn.
    pub intervals: Intervals,
    /// Quantities.
    pub rows: Vec<Row>,
    /// Workloads.
    pub columns: Vec<Column>,
    /// Lines below the figure.
    pub caption: Vec<String>,
}

const LEFT: f64 = 128.0;
const COLUMN_GAP: f64 = 78.0;
const ROW_GAP: f64 = 26.0;
const ROW_HEIGHT: f64 = 165.0;
const LEGEND_COLUMNS: usize = 2;
/// Room of the line before a name in the legend.
const LEGEND_LEFT: f64 = 64.0;
/// More columns than these are laid in two bands, one below the other: titles have no room otherwise.
const MOST_COLUMNS: usize = 4;
/// Room of a tick's label on an axis of powers of two.
const POWER: f64 = 48.0;

/// An axis' label, which says where the scale is one of logarithms.
fn marked(label: &str, scale: Scale) -> String {
    match scale {
        Scale::Linear => label.to_string(),
        Scale::Log | Scale::Log2 => match label.strip_suffix(')') {
            Some(open) => format!("{open}, log)"),
            None => format!("{label} (log)"),
        },
    }
}

impl Row {
    /// With what lies below its axes.
    fn full_height(&self) -> f64 {
        self.height * ROW_HEIGHT + if self.x.is_some() { X_LABELS } else { ROW_GAP }
    }
}

impl Figure {
    /// Width and height, in units.
    pub(crate) fn size(&self) -> (f64, f64) {
        let rows: f64 = self.rows.iter().map(Row::full_height).sum();
        let band = TITLES + rows + self.shared_labels() + ROW_GAP;
        let bands = self.columns.len().max(1).div_ceil(self.columns_a_band()) as f64;
        (WIDTH, self.legend_height() + bands * band + page::caption_height(&self.caption))
    }

    fn columns_a_band(&self) -> usize {
        match self.columns.len() {
            0 => 1,
            few if few <= MOST_COLUMNS => few,
            many => many.div_ceil(2),
        }
    }

    /// Columns of the legend and the width of each: as many as have room for the longest name.
    fn legend_columns(&self) -> (usize, f64) {
        let names = self.series.iter().map(|series| text_width(&series.name, TEXT, false));
        let longest = LEGEND_LEFT + names.fold(0.0, f64::max);
        let width = |columns: usize| (WIDTH - 60.0) / columns as f64;
        let columns =
            (1..=LEGEND_COLUMNS).rev().find(|&columns| longest <= width(columns) - 16.0).unwrap_or(1);
        (columns, width(columns))
    }

    fn legend_height(&self) -> f64 {
        self.series.len().div_ceil(self.legend_columns().0) as f64 * LEGEND_LINE + 16.0
    }

    /// Height of the labels below the last row, where that does not have its own.
    fn shared_labels(&self) -> f64 {
        let own = self.rows.last().is_some_and(|row| row.x.is_some());
        if own { 0.0 } else { X_LABELS - ROW_GAP }
    }

    /// Draws the figure.
    pub(crate) fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        self.draw_legend(canvas)?;
        let mut top = self.legend_height();
        for band in self.columns.chunks(self.columns_a_band()) {
            top = self.draw_band(canvas, band, top)? + self.shared_labels() + ROW_GAP;
        }
        page::draw_caption(canvas, &self.caption, top - ROW_GAP)
    }

    /// Draws columns beside each other below `top`; returns where their last row ends.
    fn draw_band<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        columns: &[Column],
        mut top: f64,
    ) -> Result<f64, PlotError> {
        let count = self.columns_a_band() as f64;
        let width = (WIDTH - LEFT - RIGHT - (count - 1.0) * COLUMN_GAP) / count;
        for (c, column) in columns.iter().enumerate() {
            let middle = LEFT + c as f64 * (width + COLUMN_GAP) + width / 2.0;
            let room = width + COLUMN_GAP - 16.0;
            page::draw_title(canvas, [&column.title, &column.subtitle], (middle, top), room)?;
        }
        top += TITLES;
        for (r, row) in self.rows.iter().enumerate() {
            let height = row.height * ROW_HEIGHT;
            let [name, unit] = &row.label;
            let unit = marked(unit, row.scale);
            for (line, (label, size)) in [(name, SMALL), (&unit, CAPTION)].into_iter().enumerate() {
                let (size, label) = page::fit(label, size, false, height + ROW_GAP);
                let look = TextLook::new(size, HPos::Center).upwards();
                let look = if line == 0 { look } else { look.faint() };
                canvas.text(&label, (16.0 + 26.0 * line as f64, top + height / 2.0), look)?;
            }
            for (c, column) in columns.iter().enumerate() {
                let left = LEFT + c as f64 * (width + COLUMN_GAP);
                let frame = Frame { left, top, width, height };
                self.draw_axes(canvas, frame, column, r)?;
            }
            top += row.full_height();
        }
        Ok(top)
    }

    fn draw_legend<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        let (columns, width) = self.legend_columns();
        let lines = self.series.len().div_ceil(columns);
        for (i, series) in self.series.iter().enumerate() {
            let (colour, marker, dashed) = page::style(i);
            let x = 40.0 + (i / lines) as f64 * width;
            let y = 26.0 + (i % lines) as f64 * LEGEND_LINE;
            let ends = [(x, y), (x + 52.0, y)];
            match dashed || series.stroke == Stroke::Dashed {
                true => canvas.dashed(&ends, colour, 3.0)?,
                false => canvas.line(&ends, colour, 3.0)?,
            }
            if series.stroke == Stroke::Marked {
                canvas.marker(marker, (x + 26.0, y), 7.5, colour, false)?;
            }
            let name = fitted(&series.name, TEXT, false, width - LEGEND_LEFT);
            canvas.text(&name, (x + LEGEND_LEFT, y), TextLook::new(TEXT, HPos::Left))?;
        }
        Ok(())
    }

    fn draw_axes<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        frame: Frame,
        column: &Column,
        row: usize,
    ) -> Result<(), PlotError> {
        let points = &column.series[row];
        if points.iter().all(Vec::is_empty) {
            let look = TextLook::new(SMALL, HPos::Center).faint();
            return canvas.text("nothing to show", frame.middle(), look);
        }
        let own = self.rows[row].x.as_ref();
        let wanted = |scale| if scale == Scale::Log2 { (frame.width / POWER) as usize } else { 5 };
        let x_axis = match own {
            Some(x) => Axis::covering(x.scale, points.iter().flatten().map(|p| p.x), wanted(x.scale)),
            None => {
                let shared = self.shared(column).map(|p| p.x);
                Axis::covering(self.x.scale, shared, wanted(self.x.scale))
            }
        };
        let spread = points.iter().flatten().flat_map(|p| [Some(p.y), p.interval.map(|i| i.1)]).flatten();
        let wanted = (frame.height / 40.0) as usize;
        let y_axis = Axis::covering(self.rows[row].scale, spread, wanted);
        let shared = (row + 1 == self.rows.len()).then_some(&self.x);
        let label = own.or(shared);
        frame.draw_grid(canvas, &x_axis, &y_axis, label.is_some())?;
        if let Some(x) = label {
            let at = (frame.left + frame.width / 2.0, frame.top + frame.height + 58.0);
            canvas.text(&marked(&x.label, x.scale), at, TextLook::new(SMALL, HPos::Center))?;
        }
        for (s, points) in points.iter().enumerate() {
            let stroke = self.series[s].stroke;
            let style = frame::Style { look: page::style(s), stroke, intervals: self.intervals };
            frame.draw_series(canvas, &x_axis, &y_axis, points, style)?;
        }
        Ok(())
    }

    /// Points of the rows that share the horizontal axis.
    fn shared<'a>(&'a self, column: &'a Column) -> impl Iterator<Item = &'a Point> {
        let rows = column.series.iter().zip(&self.rows).filter(|(_, row)| row.x.is_none());
        rows.flat_map(|(series, _)| series.iter().flatten())
    }
}
