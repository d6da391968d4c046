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

/// Shape of a series' points.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
    TriangleDown,
    Pentagon,
    Cross,
    Plus,
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
}

type Drawn = Result<(), PlotError>;

impl<'a, DB: DrawingBackend> Canvas<'a, DB> {
    pub(crate) fn new(area: &'a DrawingArea<DB, Shift>, scale: f64) -> Self {
        Self { area, scale }
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

    pub(crate) fn polygon(&self, points: &[(f64, f64)], colour: RGBAColor) -> Drawn {
        let points: Vec<_> = points.iter().map(|&p| self.px(p)).collect();
        Self::done(self.area.draw(&Polygon::new(points, colour.filled())))
    }

    pub(crate) fn text(&self, text: &str, at: (f64, f64), look: TextLook) -> Drawn {
        let style = if look.bold { FontStyle::Bold } else { FontStyle::Normal };
        let turn = if look.upwards { FontTransform::Rotate270 } else { FontTransform::None };
        let font = FontDesc::new(FontFamily::Name(FAMILY), look.size * self.scale, style).transform(turn);
        let style = TextStyle::from(font).color(&look.colour).pos(Pos::new(look.horizontal, VPos::Center));
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
            Marker::Cross => return self.strokes(at, size, 45.0, colour, hollow),
            Marker::Plus => return self.strokes(at, size * 1.15, 0.0, colour, hollow),
        };
        let mut points: Vec<_> = outline.iter().map(|(x, y)| (at.0 + x * size, at.1 + y * size)).collect();
        let inside = if hollow { WHITE } else { colour };
        self.polygon(&points, inside.to_rgba())?;
        points.push(points[0]);
        self.line(&points, if hollow { colour } else { WHITE }, if hollow { 2.0 } else { 1.0 })
    }

    fn strokes(&self, at: (f64, f64), size: f64, turn: f64, colour: RGBColor, hollow: bool) -> Drawn {
        for angle in [turn, turn + 90.0] {
            let (sin, cos) = angle.to_radians().sin_cos();
            let ends = [-1.0, 1.0].map(|side| (at.0 + side * cos * size, at.1 + side * sin * size));
            self.line(&ends, colour, if hollow { 1.5 } else { 3.5 })?;
        }
        Ok(())
    }
}

/// Corners of a regular polygon around the origin, the first at `turn` degrees.
fn regular(corners: usize, radius: f64, turn: f64) -> Vec<(f64, f64)> {
    (0..corners)
        .map(|i| (turn + 360.0 * i as f64 / corners as f64).to_radians())
        .map(|angle| (radius * angle.cos(), radius * angle.sin()))
        .collect()
}
