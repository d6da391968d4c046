//! A drawing surface in the figure's own units, the same for SVG and PNG.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, FontTransform, register_font};
use std::sync::Once;

use super::PlotError;

/// Listed as an SVG reader would look them up; the first is the shipped one.
const FAMILY: &str = "Roboto, Arial, sans-serif";
static REGULAR: &[u8] = include_bytes!("../../assets/Roboto-Regular-subset.ttf");
static BOLD: &[u8] = include_bytes!("../../assets/Roboto-Bold-subset.ttf");

/// Black text, white paper, light grid lines.
pub(crate) const INK: RGBColor = RGBColor(30, 30, 30);
pub(crate) const FAINT: RGBColor = RGBColor(110, 110, 110);
pub(crate) const GRID: RGBColor = RGBColor(228, 228, 228);

/// Makes the shipped font known to the plotting library, once.
pub(crate) fn register_fonts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for (style, bytes) in [(FontStyle::Normal, REGULAR), (FontStyle::Bold, BOLD)] {
            // Its error type says nothing; the bytes are ours.
            assert!(register_font(FAMILY, style, bytes).is_ok(), "the shipped font is not readable");
        }
    });
}

/// A style element that brings the shipped font along, so that an SVG looks the same everywhere.
pub(crate) fn embedded_fonts() -> String {
    let face = |weight: &str, bytes: &[u8]| {
        let data = base64(bytes);
        format!("@font-face{{font-family:Roboto;font-weight:{weight};src:url(data:font/ttf;base64,{data})}}")
    };
    format!("<style>{}{}</style>", face("normal", REGULAR), face("bold", BOLD))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i) & 63) as usize];
            text.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// Shape of a series' points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
    TriangleDown,
    Pentagon,
    TriangleLeft,
    Star,
}

/// Which way text lies and where its anchor is.
#[derive(Clone, Copy)]
pub(crate) struct TextLook {
    pub(crate) size: f64,
    pub(crate) bold: bool,
    pub(crate) horizontal: HPos,
    pub(crate) colour: RGBColor,
    pub(crate) upwards: bool,
}

impl TextLook {
    pub(crate) fn new(size: f64, horizontal: HPos) -> Self {
        Self { size, bold: false, horizontal, colour: INK, upwards: false }
    }
    pub(crate) fn bold(mut self) -> Self {
        self.bold = true;
        self
    }
    pub(crate) fn faint(mut self) -> Self {
        self.colour = FAINT;
        self
    }
    pub(crate) fn upwards(mut self) -> Self {
        self.upwards = true;
        self
    }
}

/// Draws in units; `scale` pixels make one.
pub(crate) struct Canvas<'a, DB: DrawingBackend> {
    area: &'a DrawingArea<DB, Shift>,
    scale: f64,
    drop: f64,
}

type Drawn = Result<(), PlotError>;

impl<'a, DB: DrawingBackend> Canvas<'a, DB> {
    /// `drop` lowers text by this share of its size: the bitmap backend centres letters too high.
    pub(crate) fn new(area: &'a DrawingArea<DB, Shift>, scale: f64, drop: f64) -> Self {
        Self { area, scale, drop }
    }

    fn px(&self, (x, y): (f64, f64)) -> (i32, i32) {
        ((x * self.scale).round() as i32, (y * self.scale).round() as i32)
    }

    fn stroke(&self, colour: RGBAColor, width: f64) -> ShapeStyle {
        ShapeStyle {
            color: colour,
            filled: false,
            stroke_width: ((width * self.scale).round() as u32).max(1),
        }
    }

    fn done<E: std::error::Error + Send + Sync>(result: Result<(), DrawingAreaErrorKind<E>>) -> Drawn {
        result.map_err(|e| PlotError::Draw(e.to_string()))
    }

    pub(crate) fn fill(&self, colour: RGBColor) -> Drawn {
        Self::done(self.area.fill(&colour))
    }

    pub(crate) fn line(&self, points: &[(f64, f64)], colour: RGBColor, width: f64) -> Drawn {
        let points: Vec<_> = points.iter().map(|&p| self.px(p)).collect();
        Self::done(self.area.draw(&PathElement::new(points, self.stroke(colour.to_rgba(), width))))
    }

    /// A dashed line through `points`; dashes go on around corners.
    pub(crate) fn dashed(&self, points: &[(f64, f64)], colour: RGBColor, width: f64) -> Drawn {
        dashes(points).iter().try_for_each(|dash| self.line(dash, colour, width))
    }

    pub(crate) fn polygon(&self, points: &[(f64, f64)], colour: RGBAColor) -> Drawn {
        let points: Vec<_> = points.iter().map(|&p| self.px(p)).collect();
        Self::done(self.area.draw(&Polygon::new(points, colour.filled())))
    }

    pub(crate) fn text(&self, text: &str, at: (f64, f64), look: TextLook) -> Drawn {
        let style = if look.bold { FontStyle::Bold } else { FontStyle::Normal };
        let turn = if look.upwards { FontTransform::Rotate270 } else { FontTransform::None };
        let font = FontDesc::new(FontFamily::Name(FAMILY), look.size * self.scale, style).transform(turn);
        let style = TextStyle::from(font).color(&look.colour).pos(Pos::new(look.horizontal, VPos::Center));
        let down = self.drop * look.size;
        let at = if look.upwards { (at.0 + down, at.1) } else { (at.0, at.1 + down) };
        Self::done(self.area.draw(&Text::new(text.to_string(), self.px(at), style)))
    }

    /// A point; hollow ones are white inside.
    pub(crate) fn marker(
        &self,
        marker: Marker,
        at: (f64, f64),
        size: f64,
        colour: RGBColor,
        hollow: bool,
    ) -> Drawn {
        let outline: Vec<(f64, f64)> = match marker {
            Marker::Circle => regular(24, 1.0, 0.0),
            Marker::Square => regular(4, 1.25, 45.0),
            Marker::Diamond => regular(4, 1.3, 0.0),
            Marker::Triangle => regular(3, 1.35, -90.0),
            Marker::TriangleDown => regular(3, 1.35, 90.0),
            Marker::Pentagon => regular(5, 1.15, -90.0),
            Marker::TriangleLeft => regular(3, 1.35, 180.0),
            Marker::Star => star(1.6),
        };
        let mut points: Vec<_> = outline.iter().map(|(x, y)| (at.0 + x * size, at.1 + y * size)).collect();
        let inside = if hollow { WHITE } else { colour };
        self.polygon(&points, inside.to_rgba())?;
        points.push(points[0]);
        self.line(&points, if hollow { colour } else { WHITE }, if hollow { 2.0 } else { 1.0 })
    }
}

/// Width of `text` as it is drawn, in units; about that where the font cannot tell.
pub(crate) fn text_width(text: &str, size: f64, bold: bool) -> f64 {
    // Measured larger than it is drawn: widths come in whole pixels.
    const LARGER: f64 = 4.0;
    let style = if bold { FontStyle::Bold } else { FontStyle::Normal };
    let font = FontDesc::new(FontFamily::Name(FAMILY), size * LARGER, style);
    let about = || text.chars().count() as f64 * size * 0.46;
    font.box_size(text).map_or_else(|_| about(), |(width, _)| f64::from(width) / LARGER)
}

/// `text` with an ellipsis in the place of what does not fit into `room` units.
pub(crate) fn fitted(text: &str, size: f64, bold: bool, room: f64) -> String {
    if text_width(text, size, bold) <= room {
        return text.to_string();
    }
    let mut short = text.to_string();
    while short.pop().is_some() {
        let with = format!("{}…", short.trim_end());
        if text_width(&with, size, bold) <= room {
            return with;
        }
    }
    "…".into()
}

/// Lengths of a dash and of the gap after it.
const DASH: [f64; 2] = [11.0, 7.0];

/// The pieces of a line through `points` that a dashed one shows.
fn dashes(points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    let mut pieces = Vec::new();
    let mut piece: Vec<(f64, f64)> = points.iter().take(1).copied().collect();
    // Whether a dash is being drawn, and what is left of it or of the gap.
    let (mut on, mut left) = (true, DASH[0]);
    for pair in points.windows(2) {
        let (mut from, to) = (pair[0], pair[1]);
        loop {
            let length = (to.0 - from.0).hypot(to.1 - from.1);
            if length <= left {
                left -= length;
                if on {
                    piece.push(to);
                }
                break;
            }
            let share = left / length;
            from = (from.0 + share * (to.0 - from.0), from.1 + share * (to.1 - from.1));
            if on {
                piece.push(from);
                pieces.push(std::mem::take(&mut piece));
            } else {
                piece.push(from);
            }
            on = !on;
            left = DASH[usize::from(!on)];
        }
    }
    pieces.extend((piece.len() > 1).then_some(piece));
    pieces
}

/// Corners of a star of five points around the origin. The first is between two points: where an outline begins and ends, its
/// corner is not drawn sharp.
fn star(radius: f64) -> Vec<(f64, f64)> {
    let [inner, outer] =
        [(radius * 0.5, -54.0), (radius, -18.0)].map(|(radius, turn)| regular(5, radius, turn));
    inner.into_iter().zip(outer).flat_map(|(between, point)| [between, point]).collect()
}

/// Corners of a regular polygon around the origin, the first at `turn` degrees.
fn regular(corners: usize, radius: f64, turn: f64) -> Vec<(f64, f64)> {
    (0..corners)
        .map(|i| (turn + 360.0 * i as f64 / corners as f64).to_radians())
        .map(|angle| (radius * angle.cos(), radius * angle.sin()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{base64, dashes, fitted, register_fonts, text_width};

    #[test]
    fn text_that_has_no_room_is_shortened() {
        register_fonts();
        let (whole, room) = ("A title that is rather long", 150.0);
        assert_eq!(fitted(whole, 27.0, true, 1000.0), whole);
        let short = fitted(whole, 27.0, true, room);
        assert!(short.starts_with("A ti") && short.ends_with('…'), "{short}");
        assert!(text_width(&short, 27.0, true) <= room && text_width(whole, 27.0, true) > room);
        assert!(text_width("iiii", 27.0, false) < text_width("MMMM", 27.0, false), "letters have widths");
    }

    #[test]
    fn dashes_go_on_around_corners() {
        let pieces = dashes(&[(0.0, 0.0), (10.0, 0.0), (10.0, 20.0)]);
        assert_eq!(pieces[0], [(0.0, 0.0), (10.0, 0.0), (10.0, 1.0)]);
        assert_eq!(pieces[1], [(10.0, 8.0), (10.0, 19.0)]);
        assert_eq!(pieces.len(), 2);
        assert!(dashes(&[]).is_empty() && dashes(&[(1.0, 1.0)]).is_empty());
    }

    #[test]
    fn base64_by_the_standards_examples() {
        let pairs = [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")];
        for (plain, encoded) in pairs {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
