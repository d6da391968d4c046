//! A figure of stacked bars as data, and how it is laid out: one column a panel, below each other its groups of bars.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::canvas::{Canvas, FAINT, GRID, INK, TextLook};
use super::page::{self, CAPTION, LEGEND_LINE, RIGHT, SMALL, TEXT, TITLES, WIDTH, X_LABELS};

/// A bar: shares of a whole, one on the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// A share for each of the figure's parts; empty where there is nothing to show.
    pub parts: Vec<f64>,
    /// Ends of the first part's interval, if there is one.
    pub interval: Option<(f64, f64)>,
    /// What is said where there is nothing to show.
    pub note: &'static str,
}

/// Bars that belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct BarGroup {
    /// Line above them.
    pub title: String,
    /// One for each of the figure's labels.
    pub bars: Vec<Bar>,
}

/// A column of groups: one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct BarColumn {
    /// Bold title.
    pub title: String,
    /// Line below it.
    pub subtitle: String,
    /// Its groups.
    pub groups: Vec<BarGroup>,
}

/// A part of every bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// Name in the legend.
    pub name: &'static str,
    /// Colour.
    pub colour: RGBColor,
}

/// A figure of bars, ready to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct BarFigure {
    /// The parts, from the left.
    pub parts: Vec<Part>,
    /// Names of the bars of each group.
    pub labels: Vec<String>,
    /// Label of every horizontal axis.
    pub x_label: String,
    /// Workloads.
    pub columns: Vec<BarColumn>,
    /// Lines below the figure.
    pub caption: Vec<String>,
}

const COLUMN_GAP: f64 = 34.0;
const BAR: f64 = 30.0;
const BAR_STEP: f64 = 40.0;
const GROUP_TITLE: f64 = 38.0;
const GROUP_GAP: f64 = 12.0;
const LEGEND_COLUMNS: usize = 3;
/// Width of a letter of the labels, about.
const LETTER: f64 = 10.4;
/// The narrowest part that has its share written on it.
const WRITTEN: f64 = 54.0;

impl BarFigure {
    /// Width and height, in units.
    pub(crate) fn size(&self) -> (f64, f64) {
        let caption = page::caption_height(&self.caption);
        (WIDTH, self.legend_height() + TITLES + self.groups_height() + X_LABELS + caption)
    }

    fn legend_height(&self) -> f64 {
        self.parts.len().div_ceil(LEGEND_COLUMNS) as f64 * LEGEND_LINE + 16.0
    }

    fn group_height(&self) -> f64 {
        GROUP_TITLE + self.labels.len() as f64 * BAR_STEP + GROUP_GAP
    }

    fn groups_height(&self) -> f64 {
        self.columns.iter().map(|c| c.groups.len()).max().unwrap_or(0) as f64 * self.group_height()
    }

    /// Room for the labels.
    fn left(&self) -> f64 {
        let longest = self.labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        (longest as f64 * LETTER + 34.0).clamp(80.0, 400.0)
    }

    /// Draws the figure.
    pub(crate) fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        self.draw_legend(canvas)?;
        let count = self.columns.len().max(1) as f64;
        let width = (WIDTH - self.left() - RIGHT - 16.0 - (count - 1.0) * COLUMN_GAP) / count;
        let top = self.legend_height();
        for (c, column) in self.columns.iter().enumerate() {
            let left = self.left() + c as f64 * (width + COLUMN_GAP);
            let middle = left + width / 2.0;
            let room = width + COLUMN_GAP - 16.0;
            page::draw_title(canvas, [&column.title, &column.subtitle], (middle, top), room)?;
            let bottom = top + TITLES + column.groups.len() as f64 * self.group_height();
            draw_axis(canvas, (left, width), (top + TITLES, bottom))?;
            canvas.text(&self.x_label, (middle, bottom + 54.0), TextLook::new(SMALL, HPos::Center))?;
            for (g, group) in column.groups.iter().enumerate() {
                let top = top + TITLES + g as f64 * self.group_height();
                self.draw_group(canvas, group, (left, width), top, c == 0)?;
            }
        }
        page::draw_caption(canvas, &self.caption, top + TITLES + self.groups_height() + X_LABELS - 8.0)
    }

    fn draw_legend<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        let lines = self.parts.len().div_ceil(LEGEND_COLUMNS);
        let width = (WIDTH - 40.0) / LEGEND_COLUMNS as f64;
        for (i, part) in self.parts.iter().enumerate() {
            let x = 24.0 + (i / lines) as f64 * width;
            let y = 26.0 + (i % lines) as f64 * LEGEND_LINE;
            let corners = rectangle((x, x + 34.0), (y - 11.0, y + 11.0));
            canvas.polygon(&corners, part.colour.to_rgba())?;
            canvas.line(&closed(&corners), FAINT, 1.0)?;
            canvas.text(part.name, (x + 46.0, y), TextLook::new(TEXT - 2.0, HPos::Left))?;
        }
        Ok(())
    }

    fn draw_group<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        group: &BarGroup,
        (left, width): (f64, f64),
        top: f64,
        labelled: bool,
    ) -> Result<(), PlotError> {
        canvas.text(&group.title, (left + 6.0, top + 20.0), TextLook::new(SMALL, HPos::Left))?;
        for (i, (bar, label)) in group.bars.iter().zip(&self.labels).enumerate() {
            let middle = top + GROUP_TITLE + (i as f64 + 0.5) * BAR_STEP;
            if labelled {
                let (size, label) = page::fit(label, SMALL, false, left - 24.0);
                canvas.text(&label, (left - 12.0, middle), TextLook::new(size, HPos::Right))?;
            }
            if bar.parts.is_empty() {
                let look = TextLook::new(CAPTION, HPos::Left).faint();
                canvas.text(bar.note, (left + 10.0, middle), look)?;
            }
            let mut from = left;
            for (share, part) in bar.parts.iter().zip(&self.parts) {
                let to = from + share.clamp(0.0, 1.0) * width;
                self.draw_part(canvas, part, *share, (from, to), middle)?;
                from = to;
            }
            if let Some((low, high)) = bar.interval {
                let [low, high] = [low, high].map(|x| left + x.clamp(0.0, 1.0) * width);
                let below = middle + BAR / 2.0 - 4.0;
                canvas.line(&[(low, below), (high, below)], INK, 2.0)?;
            }
        }
        Ok(())
    }

    fn draw_part<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        part: &Part,
        share: f64,
        (from, to): (f64, f64),
        middle: f64,
    ) -> Result<(), PlotError> {
        if to - from < 0.5 {
            return Ok(());
        }
        let corners = rectangle((from, to), (middle - BAR / 2.0, middle + BAR / 2.0));
        canvas.polygon(&corners, part.colour.to_rgba())?;
        canvas.line(&closed(&corners), WHITE, 1.0)?;
        if to - from < WRITTEN {
            return Ok(());
        }
        let mut look = TextLook::new(CAPTION, HPos::Center);
        if is_dark(part.colour) {
            look.colour = WHITE;
        }
        canvas.text(&format!("{:.0} %", share * 100.0), ((from + to) / 2.0, middle), look)
    }
}

fn draw_axis<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    (left, width): (f64, f64),
    (top, bottom): (f64, f64),
) -> Result<(), PlotError> {
    for percent in [0, 25, 50, 75, 100] {
        let x = left + width * f64::from(percent) / 100.0;
        canvas.line(&[(x, top), (x, bottom)], GRID, 1.0)?;
        canvas.line(&[(x, bottom), (x, bottom + 6.0)], FAINT, 1.5)?;
        canvas.text(&percent.to_string(), (x, bottom + 22.0), TextLook::new(SMALL, HPos::Center))?;
    }
    canvas.line(&[(left, top), (left, bottom), (left + width, bottom)], INK, 1.5)
}

fn rectangle((left, right): (f64, f64), (top, bottom): (f64, f64)) -> [(f64, f64); 4] {
    [(left, top), (right, top), (right, bottom), (left, bottom)]
}

fn closed(corners: &[(f64, f64); 4]) -> Vec<(f64, f64)> {
    corners.iter().chain(corners.first()).copied().collect()
}

/// Whether white text is easier to read on a colour than black.
fn is_dark(RGBColor(red, green, blue): RGBColor) -> bool {
    0.299 * f64::from(red) + 0.587 * f64::from(green) + 0.114 * f64::from(blue) < 130.0
}
