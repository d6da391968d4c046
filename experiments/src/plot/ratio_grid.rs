//! Ratios to one system: table1.

use super::caption::caption;
use super::grid::{Grid, GridBand, GridCell, GridPanel, GridRow};
use super::rates::label;
use crate::ratios::{Band, RatioCell, RatioColumn, range, ratio_text, ratios, value_text};
use crate::run_data::RunData;

/// Builds the figure of a run's table.
pub(super) fn ratio_grid(run: &RunData) -> Grid {
    let table = ratios(run);
    let panels = table.iter().flat_map(|table| &table.panels).map(|panel| GridPanel {
        title: panel.title.clone(),
        subtitle: panel.subtitle.clone(),
        bands: panel.bands.iter().map(band).collect(),
    });
    Grid { panels: panels.collect(), caption: caption(run) }
}

fn band(band: &Band) -> GridBand {
    let row = |label: &str, cells: &[RatioCell]| GridRow {
        label: label.to_owned(),
        cells: cells.iter().map(cell).collect(),
    };
    GridBand {
        title: match band.rate {
            Some(_) => band.title[..1].to_uppercase() + &band.title[1..],
            None => "Sustained".into(),
        },
        heads: band.columns.iter().map(head).collect(),
        rows: band.rows.iter().map(|r| row(&r.label, &r.cells)).collect(),
    }
}

fn head(column: &RatioColumn) -> [String; 3] {
    let [name, unit] = match column.metric {
        Some(metric) => label(metric),
        None => ["Rate within SLO".into(), column.unit().into()],
    };
    [name, unit, column.better().into()]
}

fn cell(cell: &RatioCell) -> GridCell {
    GridCell {
        main: cell.ratio.as_ref().map_or("-".into(), ratio_text),
        beside: cell.value.as_ref().map_or(String::new(), value_text),
        below: cell.ratio.as_ref().ok().and_then(range).unwrap_or_default(),
    }
}
