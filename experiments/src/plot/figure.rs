//! A figure as data, and how it is laid out: a grid of axes, one column a panel and one row a metric.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::axis::{Axis, Scale};
use super::canvas::{Canvas, FAINT, GRID, INK, Marker, TextLook};

/// One measured point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Horizontal value.
    pub x: f64,
    /// Vertical value.
    pub y: f64,
    /// Ends of the confidence interval, if there is one.
    pub interval: Option<(f64, f64)>,
    /// Drawn hollow: saturated, or with censored requests.
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
}

/// A column of axes: one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// Bold title.
    pub title: String,
    /// Line below it.
    pub subtitle: String,
    /// `[row][series]` points, by ascending x.
    pub series: Vec<Vec<Vec<Point>>>,
}

/// A figure, ready to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Names of the series, in the legend's order.
    pub series: Vec<String>,
    /// Label of every horizontal axis.
    pub x_label: String,
    /// Quantities.
    pub rows: Vec<Row>,
    /// Workloads.
    pub columns: Vec<Column>,
    /// Lines below the figure.
    pub caption: Vec<String>,
}

/// Okabe and Ito's palette, which colour-blind readers can tell apart, each with its own marker.
const STYLES: [(RGBColor, Marker); 8] = [
    (RGBColor(0, 0, 0), Marker::Cross),
    (RGBColor(230, 159, 0), Marker::Square),
    (RGBColor(213, 94, 0), Marker::TriangleDown),
    (RGBColor(204, 121, 167), Marker::Diamond),
    (RGBColor(0, 158, 115), Marker::Triangle),
    (RGBColor(0, 114, 178), Marker::Circle),
    (RGBColor(86, 180, 233), Marker::Pentagon),
    (RGBColor(120, 120, 120), Marker::Plus),
];

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 128.0;
const RIGHT: f64 = 14.0;
const COLUMN_GAP: f64 = 78.0;
const ROW_GAP: f64 = 26.0;
const ROW_HEIGHT: f64 = 165.0;
const LEGEND_LINE: f64 = 36.0;
const LEGEND_COLUMNS: usize = 2;
const TITLES: f64 = 74.0;
const X_LABELS: f64 = 74.0;
const CAPTION_LINE: f64 = 25.0;
const TEXT: f64 = 27.0;
const SMALL: f64 = 23.0;
const CAPTION: f64 = 21.0;

impl Figure {
    /// Width and height, in units.
    pub(crate) fn size(&self, caption_lines: usize) -> (f64, f64) {
        let rows: f64 = self.rows.iter().map(|r| r.height * ROW_HEIGHT + ROW_GAP).sum();
        (WIDTH, self.legend_height() + TITLES + rows + X_LABELS + caption_lines as f64 * CAPTION_LINE + 8.0)
    }

    fn legend_height(&self) -> f64 {
        self.series.len().div_ceil(LEGEND_COLUMNS) as f64 * LEGEND_LINE + 16.0
    }

    /// The caption's lines, broken to the figure's width.
    pub(crate) fn caption_lines(&self) -> Vec<String> {
        // The shipped font's letters are less than half an em wide on average.
        let letters = ((WIDTH - 40.0) / (CAPTION / 1.24 * 0.45)) as usize;
        self.caption.iter().flat_map(|line| break_line(line, letters)).collect()
    }

    /// Draws the figure, `scale` pixels a unit; `drop` is for [`Canvas::new`].
    pub(crate) fn draw<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        scale: f64,
        drop: f64,
    ) -> Result<(), PlotError> {
        let canvas = Canvas::new(area, scale, drop);
        canvas.fill(WHITE)?;
        self.draw_legend(&canvas)?;
        let count = self.columns.len().max(1) as f64;
        let width = (WIDTH - LEFT - RIGHT - (count - 1.0) * COLUMN_GAP) / count;
        let mut top = self.legend_height();
        for (c, column) in self.columns.iter().enumerate() {
            let middle = LEFT + c as f64 * (width + COLUMN_GAP) + width / 2.0;
            canvas.text(
                &column.title,
                (middle, top + 18.0),
                TextLook::new(TEXT + 2.0, HPos::Center).bold(),
            )?;
            canvas.text(
                &column.subtitle,
                (middle, top + 48.0),
                TextLook::new(SMALL, HPos::Center).faint(),
            )?;
        }
        top += TITLES;
        for (r, row) in self.rows.iter().enumerate() {
            let height = row.height * ROW_HEIGHT;
            for (line, label) in row.label.iter().enumerate() {
                let look = TextLook::new(if line == 0 { SMALL } else { CAPTION }, HPos::Center).upwards();
                let look = if line == 0 { look } else { look.faint() };
                canvas.text(label, (16.0 + 26.0 * line as f64, top + height / 2.0), look)?;
            }
            for (c, column) in self.columns.iter().enumerate() {
                let left = LEFT + c as f64 * (width + COLUMN_GAP);
                let frame = Frame { left, top, width, height };
                let last = r + 1 == self.rows.len();
                self.draw_axes(&canvas, frame, column, r, last)?;
            }
            top += height + ROW_GAP;
        }
        for (i, line) in self.caption_lines().iter().enumerate() {
            let at = (20.0, top + X_LABELS - ROW_GAP + 22.0 + i as f64 * CAPTION_LINE);
            canvas.text(line, at, TextLook::new(CAPTION, HPos::Left).faint())?;
        }
        Ok(())
    }

    fn draw_legend<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        let lines = self.series.len().div_ceil(LEGEND_COLUMNS);
        let width = (WIDTH - 60.0) / LEGEND_COLUMNS as f64;
        for (i, name) in self.series.iter().enumerate() {
            let (colour, marker) = STYLES[i % STYLES.len()];
            let x = 40.0 + (i / lines) as f64 * width;
            let y = 26.0 + (i % lines) as f64 * LEGEND_LINE;
            canvas.line(&[(x, y), (x + 52.0, y)], colour, 3.0)?;
            canvas.marker(marker, (x + 26.0, y), 7.5, colour, false)?;
            canvas.text(name, (x + 64.0, y), TextLook::new(TEXT, HPos::Left))?;
        }
        Ok(())
    }

    fn draw_axes<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        frame: Frame,
        column: &Column,
        row: usize,
        last: bool,
    ) -> Result<(), PlotError> {
        let all = || column.series.iter().flatten().flatten();
        let x_axis = Axis::covering(Scale::Linear, all().map(|p| p.x), 5);
        let points = &column.series[row];
        let spread = points.iter().flatten().flat_map(|p| [Some(p.y), p.interval.map(|i| i.1)]).flatten();
        let wanted = (frame.height / 40.0) as usize;
        let y_axis = Axis::covering(self.rows[row].scale, spread, wanted);
        frame.draw_grid(canvas, &x_axis, &y_axis, last)?;
        if last {
            let at = (frame.left + frame.width / 2.0, frame.top + frame.height + 58.0);
            canvas.text(&self.x_label, at, TextLook::new(SMALL, HPos::Center))?;
        }
        for (s, points) in points.iter().enumerate() {
            frame.draw_series(canvas, &x_axis, &y_axis, points, STYLES[s % STYLES.len()])?;
        }
        Ok(())
    }
}

/// Where one pair of axes lies, in units.
#[derive(Debug, Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left + x * self.width, self.top + (1.0 - y) * self.height)
    }

    fn draw_grid<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        x_axis: &Axis,
        y_axis: &Axis,
        x_labels: bool,
    ) -> Result<(), PlotError> {
        for (y, label) in y_axis.ticks() {
            canvas.line(&[self.at(0.0, y), self.at(1.0, y)], GRID, 1.0)?;
            let (left, middle) = self.at(0.0, y);
            canvas.text(&label, (left - 9.0, middle), TextLook::new(SMALL, HPos::Right))?;
        }
        for (x, label) in x_axis.ticks() {
            canvas.line(&[self.at(x, 0.0), self.at(x, 1.0)], GRID, 1.0)?;
            let (middle, bottom) = self.at(x, 0.0);
            canvas.line(&[(middle, bottom), (middle, bottom + 6.0)], FAINT, 1.5)?;
            if x_labels {
                canvas.text(&label, (middle, bottom + 22.0), TextLook::new(SMALL, HPos::Center))?;
            }
        }
        canvas.line(&[self.at(0.0, 1.0), self.at(0.0, 0.0), self.at(1.0, 0.0)], INK, 1.5)
    }

    fn draw_series<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        x_axis: &Axis,
        y_axis: &Axis,
        points: &[Point],
        (colour, marker): (RGBColor, Marker),
    ) -> Result<(), PlotError> {
        let place = |x: f64, y: f64| self.at(x_axis.clamped(x), y_axis.clamped(y));
        let banded: Vec<(f64, (f64, f64))> = points.iter().filter_map(|p| Some((p.x, p.interval?))).collect();
        if banded.len() > 1 {
            let upper = banded.iter().map(|&(x, (_, high))| place(x, high));
            let lower = banded.iter().rev().map(|&(x, (low, _))| place(x, low));
            canvas.polygon(&upper.chain(lower).collect::<Vec<_>>(), colour.mix(0.16))?;
        }
        let shown: Vec<&Point> = points.iter().filter(|p| y_axis.position(p.y).is_some()).collect();
        let line: Vec<_> = shown.iter().map(|p| place(p.x, p.y)).collect();
        if line.len() > 1 {
            canvas.line(&line, colour, 2.5)?;
        }
        for (point, &at) in shown.iter().zip(&line) {
            if point.lower_bound {
                let tip = (at.0, at.1 - 22.0);
                canvas.line(&[at, tip], colour, 2.0)?;
                canvas.line(&[(tip.0 - 5.0, tip.1 + 7.0), tip, (tip.0 + 5.0, tip.1 + 7.0)], colour, 2.0)?;
            }
            canvas.marker(marker, at, 6.5, colour, point.hollow)?;
        }
        Ok(())
    }
}

/// Breaks `line` at spaces into pieces of at most `letters` characters (longer words stay whole).
fn break_line(line: &str, letters: usize) -> Vec<String> {
    let mut pieces = vec![String::new()];
    for word in line.split_whitespace() {
        let current = pieces.last_mut().expect("one piece at least");
        if current.is_empty() {
            current.push_str(word);
        } else if current.chars().count() + 1 + word.chars().count() <= letters {
            current.push(' ');
            current.push_str(word);
        } else {
            pieces.push(word.to_string());
        }
    }
    pieces
}
