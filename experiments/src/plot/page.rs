//! What all figures have in common: their width, sizes of text, titles above and the caption below.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::canvas::{Canvas, Marker, TextLook, fitted, text_width};

/// Okabe and Ito's palette, which colour-blind readers can tell apart, each with its own marker. Every marker has an inside,
/// which is white where a point is hollow.
const STYLES: [(RGBColor, Marker); 8] = [
    (RGBColor(0, 0, 0), Marker::Star),
    (RGBColor(230, 159, 0), Marker::Square),
    (RGBColor(213, 94, 0), Marker::TriangleDown),
    (RGBColor(204, 121, 167), Marker::Diamond),
    (RGBColor(0, 158, 115), Marker::Triangle),
    (RGBColor(0, 114, 178), Marker::Circle),
    (RGBColor(86, 180, 233), Marker::Pentagon),
    (RGBColor(120, 120, 120), Marker::TriangleLeft),
];

/// Colour, marker and whether the line is dashed of a series: no two of 64 have the same.
pub(super) fn style(series: usize) -> (RGBColor, Marker, bool) {
    let round = series / STYLES.len();
    let (colour, _) = STYLES[series % STYLES.len()];
    let (_, marker) = STYLES[(series + round) % STYLES.len()];
    (colour, marker, round % 2 == 1)
}

/// Width of every figure, in units.
pub(super) const WIDTH: f64 = 1000.0;
pub(super) const RIGHT: f64 = 14.0;
/// Height of the titles of columns.
pub(super) const TITLES: f64 = 74.0;
/// Height of the tick labels and the label below an axis.
pub(super) const X_LABELS: f64 = 74.0;
/// Height of a line of the legend.
pub(super) const LEGEND_LINE: f64 = 36.0;
/// Sizes of text.
pub(super) const TEXT: f64 = 27.0;
pub(super) const SMALL: f64 = 23.0;
pub(super) const CAPTION: f64 = 21.0;

const CAPTION_LINE: f64 = 25.0;

/// The smallest size, as a share of its own, that a title is drawn in before it is shortened.
const SMALLEST: f64 = 0.75;

/// A text's size and the text itself, as they fit into `room`: smaller first, then with an ellipsis.
pub(super) fn fit(text: &str, size: f64, bold: bool, room: f64) -> (f64, String) {
    let share = (room / text_width(text, size, bold).max(1.0)).clamp(SMALLEST, 1.0);
    (size * share, fitted(text, size * share, bold, room))
}

/// Bold title and faint line of a column whose middle is `middle`, in so much room.
pub(super) fn draw_title<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    [title, subtitle]: [&str; 2],
    (middle, top): (f64, f64),
    room: f64,
) -> Result<(), PlotError> {
    let (size, title) = fit(title, TEXT + 2.0, true, room);
    canvas.text(&title, (middle, top + 18.0), TextLook::new(size, HPos::Center).bold())?;
    let (size, subtitle) = fit(subtitle, SMALL, false, room);
    canvas.text(&subtitle, (middle, top + 48.0), TextLook::new(size, HPos::Center).faint())
}

/// Height of a caption.
pub(super) fn caption_height(caption: &[String]) -> f64 {
    caption_lines(caption).len() as f64 * CAPTION_LINE + 8.0
}

/// Draws a caption below `top`.
pub(super) fn draw_caption<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    caption: &[String],
    top: f64,
) -> Result<(), PlotError> {
    for (i, line) in caption_lines(caption).iter().enumerate() {
        let at = (20.0, top + 22.0 + i as f64 * CAPTION_LINE);
        canvas.text(line, at, TextLook::new(CAPTION, HPos::Left).faint())?;
    }
    Ok(())
}

/// The caption's lines, broken to the figure's width.
fn caption_lines(caption: &[String]) -> Vec<String> {
    // The shipped font's letters are less than half an em wide on average.
    let letters = ((WIDTH - 40.0) / (CAPTION / 1.24 * 0.45)) as usize;
    caption.iter().flat_map(|line| break_line(line, letters)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_two_series_look_the_same() {
        let looks: HashSet<String> = (0..64).map(|series| format!("{:?}", style(series))).collect();
        assert_eq!(looks.len(), 64);
    }
}
