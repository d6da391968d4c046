//! A table as a figure, and how it is laid out: panels below each other, in each its bands of columns.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::PlotError;
use super::canvas::{Canvas, GRID, INK, TextLook, text_width};
use super::page::{self, CAPTION, RIGHT, SMALL, TITLES, WIDTH};

/// What stands at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GridCell {
    /// What matters.
    pub main: String,
    /// Beside it, faintly.
    pub beside: String,
    /// Below it, faintly.
    pub below: String,
}

/// A row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GridRow {
    /// Its name.
    pub label: String,
    /// One for each of the band's heads.
    pub cells: Vec<GridCell>,
}

/// Columns under a title.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GridBand {
    /// The title.
    pub title: String,
    /// Of each column its name, and below that its unit and how to read it.
    pub heads: Vec<[String; 3]>,
    /// The rows.
    pub rows: Vec<GridRow>,
}

/// Bands of one workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GridPanel {
    /// Bold title.
    pub title: String,
    /// Line below it.
    pub subtitle: String,
    /// Its bands.
    pub bands: Vec<GridBand>,
}

/// A table, ready to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grid {
    /// Workloads.
    pub panels: Vec<GridPanel>,
    /// Lines below the table.
    pub caption: Vec<String>,
}

const LEFT: f64 = 24.0;
const HEAD: f64 = 84.0;
const ROW: f64 = 40.0;
/// What a line below a cell's first adds to its row.
const BELOW: f64 = 22.0;
const BAND_GAP: f64 = 22.0;
const PANEL_GAP: f64 = 16.0;
/// Room between what stands in a cell and what stands beside it.
const BESIDE_GAP: f64 = 10.0;
/// Room that a column keeps clear of the next.
const COLUMN_GAP: f64 = 14.0;
/// Sizes of what stands in a cell and beside it.
const CELL: [f64; 2] = [SMALL, CAPTION - 1.0];

impl GridBand {
    fn row_height(&self) -> f64 {
        let below = self.rows.iter().flat_map(|row| &row.cells).any(|cell| !cell.below.is_empty());
        if below { ROW + BELOW } else { ROW }
    }

    /// How a column of this width holds its cells, one below the other and clear of the next column's.
    fn fit(&self, column: usize, width: f64) -> Fit {
        let cells = self.rows.iter().filter_map(|row| row.cells.get(column));
        let [main, beside] = cells.fold([0.0, 0.0], |[main, beside]: [f64; 2], cell| {
            let own = [text_width(&cell.main, CELL[0], true), text_width(&cell.beside, CELL[1], false)];
            [main.max(own[0]), beside.max(own[1])]
        });
        let (room, needed) = (width - COLUMN_GAP, main + BESIDE_GAP + beside);
        let scale = (room / needed).min(1.0);
        Fit { scale, split: (width - scale * needed) / 2.0 + scale * main }
    }

    fn height(&self) -> f64 {
        HEAD + self.rows.len() as f64 * self.row_height() + BAND_GAP
    }
}

impl GridPanel {
    fn height(&self) -> f64 {
        TITLES + self.bands.iter().map(GridBand::height).sum::<f64>() + PANEL_GAP
    }
}

impl Grid {
    /// Width and height, in units.
    pub(crate) fn size(&self) -> (f64, f64) {
        let panels: f64 = self.panels.iter().map(GridPanel::height).sum();
        (WIDTH, panels + page::caption_height(&self.caption))
    }

    fn bands(&self) -> impl Iterator<Item = &GridBand> {
        self.panels.iter().flat_map(|panel| &panel.bands)
    }

    /// Where the first column begins, and how wide each is: the same in all bands, so that columns line up.
    fn columns(&self) -> (f64, f64) {
        let labels = self.bands().flat_map(|band| band.rows.iter().map(|row| &row.label));
        let longest = labels.map(|label| text_width(label, SMALL, false)).fold(0.0, f64::max);
        let left = (LEFT + longest + 16.0).clamp(120.0, 420.0);
        let most = self.bands().map(|band| band.heads.len()).max().unwrap_or(1).max(1);
        (left, (WIDTH - RIGHT - left) / most as f64)
    }

    /// Draws the table.
    pub(crate) fn draw<DB: DrawingBackend>(&self, canvas: &Canvas<'_, DB>) -> Result<(), PlotError> {
        let mut top = 0.0;
        for panel in &self.panels {
            let middle = (WIDTH / 2.0, top);
            page::draw_title(canvas, [&panel.title, &panel.subtitle], middle, WIDTH - 2.0 * LEFT)?;
            let mut band_top = top + TITLES;
            for band in &panel.bands {
                self.draw_band(canvas, band, band_top)?;
                band_top += band.height();
            }
            top += panel.height();
        }
        page::draw_caption(canvas, &self.caption, top - PANEL_GAP)
    }

    fn draw_band<DB: DrawingBackend>(
        &self,
        canvas: &Canvas<'_, DB>,
        band: &GridBand,
        top: f64,
    ) -> Result<(), PlotError> {
        let (left, width) = self.columns();
        let right = left + width * band.heads.len() as f64;
        canvas.text(&band.title, (LEFT, top + 18.0), TextLook::new(SMALL, HPos::Left).bold())?;
        for (c, head) in band.heads.iter().enumerate() {
            let middle = left + (c as f64 + 0.5) * width;
            canvas.text(&head[0], (middle, top + 18.0), TextLook::new(CAPTION, HPos::Center).bold())?;
            for (line, text) in head[1..].iter().enumerate() {
                let look = TextLook::new(CAPTION - 2.0, HPos::Center).faint();
                canvas.text(text, (middle, top + 42.0 + 21.0 * line as f64), look)?;
            }
        }
        let mut y = top + HEAD - 6.0;
        canvas.line(&[(LEFT, y), (right, y)], INK, 1.5)?;
        for row in &band.rows {
            let (size, label) = page::fit(&row.label, SMALL, false, left - LEFT - 8.0);
            canvas.text(&label, (LEFT, y + ROW / 2.0), TextLook::new(size, HPos::Left))?;
            for (c, cell) in row.cells.iter().enumerate() {
                let column = left + c as f64 * width;
                draw_cell(canvas, cell, (column + width / 2.0, y), column, band.fit(c, width))?;
            }
            y += band.row_height();
            canvas.line(&[(LEFT, y), (right, y)], GRID, 1.0)?;
        }
        Ok(())
    }
}

/// How the cells of a column are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fit {
    /// Factor on the sizes of text.
    scale: f64,
    /// Where what stands in a cell ends, from the column's left.
    split: f64,
}

fn draw_cell<DB: DrawingBackend>(
    canvas: &Canvas<'_, DB>,
    cell: &GridCell,
    (middle, top): (f64, f64),
    left: f64,
    Fit { scale, split }: Fit,
) -> Result<(), PlotError> {
    let (line, split) = (top + ROW / 2.0, left + split);
    canvas.text(&cell.main, (split, line), TextLook::new(scale * CELL[0], HPos::Right).bold())?;
    let look = TextLook::new(scale * CELL[1], HPos::Left).faint();
    canvas.text(&cell.beside, (split + scale * BESIDE_GAP, line), look)?;
    if cell.below.is_empty() {
        return Ok(());
    }
    let look = TextLook::new(CAPTION - 2.0, HPos::Center).faint();
    canvas.text(&cell.below, (middle, line + BELOW), look)
}

#[cfg(test)]
mod tests {
    use super::super::canvas::register_fonts;
    use super::*;

    /// The widest number of a column and the widest beside one need not stand in one row.
    #[test]
    fn cells_stay_in_their_column() {
        register_fonts();
        let row = |main: &str, beside: &str| GridRow {
            label: "a".into(),
            cells: vec![GridCell { main: main.into(), beside: beside.into(), below: String::new() }],
        };
        let rows = vec![row("<0.000233x", "0.013"), row("1.00x", ">0.00562")];
        let band = GridBand { title: String::new(), heads: Vec::new(), rows };
        for width in [90.0, 130.0, 400.0] {
            let Fit { scale, split } = band.fit(0, width);
            let [main, beside] =
                [text_width("<0.000233x", CELL[0], true), text_width(">0.00562", CELL[1], false)];
            assert!(split - scale * main >= COLUMN_GAP / 2.0 - 1e-9, "{width}");
            assert!(split + scale * (BESIDE_GAP + beside) <= width - COLUMN_GAP / 2.0 + 1e-9, "{width}");
            assert_eq!(scale == 1.0, width == 400.0);
        }
    }
}
