//! One pair of axes with its lines.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::super::PlotError;
use super::super::axis::Axis;
use super::super::canvas::{Canvas, FAINT, GRID, INK, Marker, TextLook, text_width};
use super::super::page::{SMALL, WIDTH};
use super::{Intervals, Point, Stroke};

/// Room between the labels of ticks.
const LABEL_GAP: f64 = 8.0;

/// How a line is drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    /// Colour, marker, and whether the line is dashed.
    pub(super) look: (RGBColor, Marker, bool),
    pub(super) stroke: Stroke,
    pub(super) intervals: Intervals,
}

/// Where one pair of axes lies, in units.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) width: f64,
    pub(super) height: f64,
}

impl Frame {
    pub(super) fn middle(&self) -> (f64, f64) {
        self.at(0.5, 0.5)
    }

    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (self.left + x * self.width, self.top + (1.0 - y) * self.height)
    }

    pub(super) fn draw_grid<DB: DrawingBackend>(
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
        let (_, bottom) = self.at(0.0, 0.0);
        let ticks: Vec<(f64, String)> = x_axis.ticks().map(|(x, label)| (self.at(x, 0.0).0, label)).collect();
        for &(x, _) in &ticks {
            canvas.line(&[(x, self.top), (x, bottom)], GRID, 1.0)?;
            canvas.line(&[(x, bottom), (x, bottom + 6.0)], FAINT, 1.5)?;
        }
        let labels = if x_labels { with_room(ticks) } else { Vec::new() };
        for (x, label) in labels {
            canvas.text(&label, (x, bottom + 22.0), TextLook::new(SMALL, HPos::Center))?;
        }
        canvas.line(&[self.at(0.0, 1.0), self.at(0.0, 0.0), self.at(1.0, 0.0)], INK, 1.5)
    }

    pub(super) fn draw_series<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        x_axis: &Axis,
        y_axis: &Axis,
        points: &[Point],
        style: Style,
    ) -> Result<(), PlotError> {
        let (colour, marker, dashed) = style.look;
        let place = |x: f64, y: f64| self.at(x_axis.clamped(x), y_axis.clamped(y));
        match style.intervals {
            Intervals::Band => draw_band(canvas, points, place, colour)?,
            Intervals::Bars => draw_bars(canvas, points, place, colour)?,
        }
        let shown: Vec<&Point> = points.iter().filter(|p| y_axis.position(p.y).is_some()).collect();
        let line: Vec<_> = shown.iter().map(|p| place(p.x, p.y)).collect();
        if line.len() > 1 {
            match dashed || style.stroke == Stroke::Dashed {
                true => canvas.dashed(&line, colour, 2.5)?,
                false => canvas.line(&line, colour, 2.5)?,
            }
        }
        if style.stroke != Stroke::Marked {
            return Ok(());
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

/// The labels of ticks that are drawn: those that end on the page, and of them as many, evenly apart, as do not touch.
fn with_room(mut ticks: Vec<(f64, String)>) -> Vec<(f64, String)> {
    let half = |label: &str| text_width(label, SMALL, false) / 2.0;
    ticks.retain(|(x, label)| x + half(label) <= WIDTH);
    let touches =
        |pair: &[&(f64, String)]| pair[0].0 + half(&pair[0].1) + LABEL_GAP > pair[1].0 - half(&pair[1].1);
    let fits = |step: &usize| {
        let kept: Vec<&(f64, String)> = ticks.iter().step_by(*step).collect();
        !kept.windows(2).any(touches)
    };
    let step = (1..=ticks.len().max(1)).find(fits).unwrap_or(1);
    ticks.into_iter().step_by(step).collect()
}

/// Intervals as a band along the line.
fn draw_band<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    points: &[Point],
    place: impl Fn(f64, f64) -> (f64, f64),
    colour: RGBColor,
) -> Result<(), PlotError> {
    let banded: Vec<(f64, (f64, f64))> = points.iter().filter_map(|p| Some((p.x, p.interval?))).collect();
    if banded.len() < 2 {
        return Ok(());
    }
    let upper = banded.iter().map(|&(x, (_, high))| place(x, high));
    let lower = banded.iter().rev().map(|&(x, (low, _))| place(x, low));
    canvas.polygon(&upper.chain(lower).collect::<Vec<_>>(), colour.mix(0.16))
}

/// Intervals as a bar at each point.
fn draw_bars<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    points: &[Point],
    place: impl Fn(f64, f64) -> (f64, f64),
    colour: RGBColor,
) -> Result<(), PlotError> {
    for point in points {
        let Some((low, high)) = point.interval else { continue };
        let [low, high] = [low, high].map(|y| place(point.x, y));
        canvas.line(&[low, high], colour, 1.5)?;
        for (x, y) in [low, high] {
            canvas.line(&[(x - 5.0, y), (x + 5.0, y)], colour, 1.5)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In four columns 1000 and 10000 touched, and 100000 was cut at the page's edge.
    #[test]
    fn labels_of_ticks_neither_touch_nor_are_cut() {
        let shown = |ticks: &[(f64, &str)]| -> Vec<String> {
            let ticks = ticks.iter().map(|&(x, label)| (x, label.to_string())).collect();
            with_room(ticks).into_iter().map(|tick| tick.1).collect()
        };
        assert_eq!(
            shown(&[(100.0, "10"), (140.0, "100"), (180.0, "1000"), (220.0, "10000")]),
            ["10", "1000"]
        );
        assert_eq!(shown(&[(100.0, "0.1"), (200.0, "1"), (300.0, "10")]), ["0.1", "1", "10"]);
        assert_eq!(shown(&[(WIDTH - 100.0, "10000"), (WIDTH - 10.0, "100000")]), ["10000"]);
        assert!(shown(&[]).is_empty());
    }
}
