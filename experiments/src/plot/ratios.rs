//! A figure of ratios as data, and how it is laid out: one column a panel, below each other its metrics, and in each a bar a
//! system from 1 to the ratio, on a scale of logarithms, so that twice and half are as long.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::axis::{Axis, Scale};
use super::canvas::{Canvas, FAINT, GRID, INK, TextLook, text_width};
use super::page::{self, CAPTION, LEGEND_LINE, RIGHT, SMALL, TEXT, TITLES, WIDTH};

/// A ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ratio {
    /// The value over the same of the system that it is held against.
    pub value: f64,
    /// Ends of its interval, if there is one.
    pub interval: Option<(f64, f64)>,
    /// Drawn hollow: one of the two is overloaded, or has censored requests.
    pub hollow: bool,
    /// What stands before the number: ">" where it is a lower bound, "<" where it is an upper one, "?" where it rests on
    /// bounds in both.
    pub bound: &'static str,
}

impl Ratio {
    /// Whether it is more than 1, or else less, by its interval and the side from which it is known; none where that is open.
    fn is_more(&self) -> Option<bool> {
        let (low, high) = self.interval.unwrap_or((self.value, self.value));
        let [from_below, from_above] = [[">", ""], ["<", ""]].map(|known| known.contains(&self.bound));
        let more = from_below && low > 1.0;
        (more || from_above && high < 1.0).then_some(more)
    }
}

/// A bar, or what is said in its place.
#[derive(Debug, Clone, PartialEq)]
pub enum RatioBar {
    /// There is a ratio.
    Ratio(Ratio),
    /// There is none, and why.
    Missing(String),
}

/// A metric.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioRow {
    /// Line above its bars.
    pub title: String,
    /// Whether more of it is better.
    pub higher_is_better: bool,
}

/// A column: one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioColumn {
    /// Bold title.
    pub title: String,
    /// Line below it.
    pub subtitle: String,
    /// `[row][system]`.
    pub bars: Vec<Vec<RatioBar>>,
}

/// A figure of ratios, ready to draw.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioFigure {
    /// Names of the systems.
    pub labels: Vec<String>,
    /// Metrics.
    pub rows: Vec<RatioRow>,
    /// Workloads.
    pub columns: Vec<RatioColumn>,
    /// Lines below the figure.
    pub caption: Vec<String>,
}

const BETTER: RGBColor = RGBColor(0, 114, 178);
const WORSE: RGBColor = RGBColor(213, 94, 0);
const OPEN: RGBColor = RGBColor(150, 150, 150);
const LEGEND: [(&str, RGBColor); 3] =
    [("Better", BETTER), ("Worse", WORSE), ("Open: may be 1, as far as is known", OPEN)];

const COLUMN_GAP: f64 = 24.0;
const BAR: f64 = 22.0;
const BAR_STEP: f64 = 34.0;
const ROW_TITLE: f64 = 40.0;
/// Room below a row's bars for the labels of its ticks.
const TICKS: f64 = 46.0;
/// Room between the labels of ticks.
const LABEL_GAP: f64 = 8.0;
/// Room right of the bars for their numbers.
const NUMBERS: f64 = 96.0;
/// Width of a letter of the labels, about.
const LETTER: f64 = 10.4;

/// Where the bars of one row in one column lie.
#[derive(Clone, Copy)]
struct Place {
    left: f64,
    width: f64,
    top: f64,
}

impl RatioFigure {
    /// Width and height, in units.
    pub(crate) fn size(&self) -> (f64, f64) {
        let rows = self.rows.len() as f64 * self.row_height();
        (WIDTH, LEGEND_LINE + 16.0 + TITLES + rows + page::caption_height(&self.caption))
    }

    fn row_height(&self) -> f64 {
        ROW_TITLE + self.labels.len() as f64 * BAR_STEP + TICKS
    }

    /// Room for the labels.
    fn left(&self) -> f64 {
        let longest = self.labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
        (longest as f64 * LETTER + 34.0).clamp(80.0, 400.0)
    }

    /// Draws the figure.
    pub(crate) fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        draw_legend(canvas)?;
        let count = self.columns.len().max(1) as f64;
        let width = (WIDTH - self.left() - RIGHT - (count - 1.0) * COLUMN_GAP) / count;
        let top = LEGEND_LINE + 16.0;
        for (c, column) in self.columns.iter().enumerate() {
            let left = self.left() + c as f64 * (width + COLUMN_GAP);
            let (middle, room) = (left + width / 2.0, width + COLUMN_GAP - 12.0);
            page::draw_title(canvas, [&column.title, &column.subtitle], (middle, top), room)?;
            for (r, (row, bars)) in self.rows.iter().zip(&column.bars).enumerate() {
                let top = top + TITLES + r as f64 * self.row_height();
                let place = Place { left, width: width - NUMBERS, top: top + ROW_TITLE };
                if c == 0 {
                    let look = TextLook::new(SMALL, HPos::Left).bold();
                    canvas.text(&row.title, (20.0, top + 18.0), look)?;
                    self.draw_labels(canvas, place)?;
                }
                draw_row(canvas, row, bars, place)?;
            }
        }
        let rows = self.rows.len() as f64 * self.row_height();
        page::draw_caption(canvas, &self.caption, top + TITLES + rows - 8.0)
    }

    fn draw_labels<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        place: Place,
    ) -> Result<(), PlotError> {
        for (i, label) in self.labels.iter().enumerate() {
            let at = (place.left - 12.0, place.top + (i as f64 + 0.5) * BAR_STEP);
            let (size, label) = page::fit(label, SMALL, false, place.left - 24.0);
            canvas.text(&label, at, TextLook::new(size, HPos::Right))?;
        }
        Ok(())
    }
}

fn draw_legend<DB: DrawingBackend>(canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
    let mut x = 24.0;
    for (name, colour) in LEGEND {
        canvas.polygon(&rectangle((x, x + 34.0), (15.0, 37.0)), colour.to_rgba())?;
        canvas.text(name, (x + 46.0, 26.0), TextLook::new(TEXT - 2.0, HPos::Left))?;
        x += 190.0;
    }
    Ok(())
}

fn draw_row<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    row: &RatioRow,
    bars: &[RatioBar],
    place: Place,
) -> Result<(), PlotError> {
    let ratios = bars.iter().filter_map(|bar| match bar {
        RatioBar::Ratio(ratio) => Some(ratio),
        RatioBar::Missing(_) => None,
    });
    let ends = ratios.flat_map(|ratio| {
        let (low, high) = ratio.interval.unwrap_or((ratio.value, ratio.value));
        [low, high, ratio.value]
    });
    let axis = Axis::covering(Scale::Log, ends.chain([1.0]), (place.width / 60.0) as usize);
    let x = |value: f64| place.left + axis.clamped(value) * place.width;
    let bottom = place.top + bars.len() as f64 * BAR_STEP;
    for (at, label) in spread(axis.ticks().collect(), place.width) {
        let at = place.left + at;
        canvas.line(&[(at, place.top), (at, bottom)], GRID, 1.0)?;
        canvas.line(&[(at, bottom), (at, bottom + 6.0)], FAINT, 1.5)?;
        canvas.text(&label, (at, bottom + 22.0), TextLook::new(CAPTION, HPos::Center))?;
    }
    for (i, bar) in bars.iter().enumerate() {
        let middle = place.top + (i as f64 + 0.5) * BAR_STEP;
        match bar {
            RatioBar::Missing(note) => {
                let look = TextLook::new(CAPTION, HPos::Left).faint();
                canvas.text(note, (x(1.0) + 10.0, middle), look)?;
            }
            RatioBar::Ratio(ratio) => {
                draw_bar(canvas, ratio, row.higher_is_better, &x, middle)?;
                let text = format!("{}{:.2}x", ratio.bound, ratio.value);
                let at = (place.left + place.width + NUMBERS - 6.0, middle);
                canvas.text(&text, at, TextLook::new(SMALL, HPos::Right))?;
            }
        }
    }
    canvas.line(&[(place.left, bottom), (place.left + place.width, bottom)], INK, 1.5)?;
    canvas.line(&[(x(1.0), place.top), (x(1.0), bottom)], INK, 1.5)
}

/// Where ticks lie on an axis of so much room: as many, evenly apart and 1 among them, as have labels that do not touch.
fn spread(ticks: Vec<(f64, String)>, width: f64) -> Vec<(f64, String)> {
    let one = ticks.iter().position(|(_, label)| label == "1").unwrap_or(0);
    let every = |step: usize| {
        let kept = ticks.iter().enumerate().filter(|(i, _)| i.abs_diff(one).is_multiple_of(step));
        kept.map(|(_, (at, label))| (at * width, label.clone())).collect::<Vec<_>>()
    };
    let half = |label: &str| text_width(label, CAPTION, false) / 2.0;
    let fits = |kept: &Vec<(f64, String)>| {
        kept.windows(2).all(|pair| pair[1].0 - half(&pair[1].1) > pair[0].0 + half(&pair[0].1) + LABEL_GAP)
    };
    (1..ticks.len()).map(every).find(fits).unwrap_or_else(|| every(ticks.len().max(1)))
}

fn draw_bar<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    ratio: &Ratio,
    higher_is_better: bool,
    x: &impl Fn(f64) -> f64,
    middle: f64,
) -> Result<(), PlotError> {
    let colour = match ratio.is_more() {
        None => OPEN,
        Some(more) if more == higher_is_better => BETTER,
        Some(_) => WORSE,
    };
    let corners = rectangle((x(1.0), x(ratio.value)), (middle - BAR / 2.0, middle + BAR / 2.0));
    let inside = if ratio.hollow { WHITE } else { colour };
    canvas.polygon(&corners, inside.to_rgba())?;
    let outline: Vec<(f64, f64)> = corners.iter().chain(corners.first()).copied().collect();
    canvas.line(&outline, colour, 2.0)?;
    if let Some((low, high)) = ratio.interval {
        let [low, high] = [x(low), x(high)];
        canvas.line(&[(low, middle), (high, middle)], INK, 1.5)?;
        for end in [low, high] {
            canvas.line(&[(end, middle - 6.0), (end, middle + 6.0)], INK, 1.5)?;
        }
    }
    Ok(())
}

fn rectangle((left, right): (f64, f64), (top, bottom): (f64, f64)) -> [(f64, f64); 4] {
    [(left, top), (right, top), (right, bottom), (left, bottom)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_more_or_less_than_one_as_far_as_it_is_known() {
        let of = |value, interval, bound| Ratio { value, interval, hollow: false, bound }.is_more();
        assert_eq!(of(2.0, Some((1.5, 2.5)), ""), Some(true));
        assert_eq!(of(2.0, Some((0.9, 4.0)), ""), None);
        assert_eq!(of(2.0, Some((1.5, 2.5)), ">"), Some(true));
        assert_eq!(of(0.5, Some((0.4, 0.6)), ">"), None, "it may be more than 1 after all");
        assert_eq!(of(0.5, Some((0.4, 0.6)), "<"), Some(false));
        assert_eq!(of(2.0, Some((1.5, 2.5)), "?"), None);
        assert_eq!((of(2.0, None, ""), of(1.0, None, ""), of(0.7, None, ">")), (Some(true), None, None));
    }

    #[test]
    fn labels_of_ticks_do_not_touch_and_one_is_among_them() {
        let ticks = |labels: &[&str]| -> Vec<(f64, String)> {
            let last = labels.len() as f64 - 1.0;
            labels.iter().enumerate().map(|(i, label)| (i as f64 / last, (*label).to_string())).collect()
        };
        let labels = |labels: &[&str], width| -> Vec<String> {
            spread(ticks(labels), width).into_iter().map(|tick| tick.1).collect()
        };
        let decades = ["0.01", "0.1", "1", "10", "100", "1000"];
        assert_eq!(labels(&decades, 600.0), decades);
        assert_eq!(labels(&decades, 150.0), ["0.01", "1", "100"]);
        assert_eq!(labels(&["0.1", "1", "10", "100", "1000"], 40.0), ["1"]);
        assert_eq!(spread(vec![(0.5, "1".into())], 10.0).len(), 1);
    }
}
