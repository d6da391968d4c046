//! The table of ratios as text, Markdown and CSV.

use std::fmt::Write;
use std::path::Path;

use super::{Band, RatioCell, Ratios, Value, describe_limits, ratios};
use crate::frame::{FrameError, column, frame, write_csv};
use crate::run_data::RunData;
use crate::text_table::{number, render};

/// The table for a terminal; empty where the figure is another.
pub fn text(run: &RunData) -> String {
    let Some(table) = ratios(run) else { return String::new() };
    let mut out = String::new();
    for panel in &table.panels {
        let _ = writeln!(out, "{}: ratios to {}, and the system's own mean", panel.title, table.over);
        for band in &panel.bands {
            let columns = band.columns.iter().map(|c| format!("{} ({})", c.name(), c.better()));
            let header: Vec<String> = [band.title.clone()].into_iter().chain(columns).collect();
            let header: Vec<&str> = header.iter().map(String::as_str).collect();
            let row = |name: &str, cells: &[RatioCell]| -> Vec<String> {
                [name.to_owned()].into_iter().chain(cells.iter().map(shown)).collect()
            };
            let rows: Vec<_> = band.rows.iter().map(|r| row(&r.system, &r.cells)).collect();
            out.push_str(&render(&header, &rows, 1));
            for why in missing(band) {
                let _ = writeln!(out, "  - {why}");
            }
            out.push('\n');
        }
    }
    let _ = writeln!(out, "{}", describe_limits(&run.manifest.settings));
    out
}

/// The table as Markdown; none where the figure is another.
pub fn markdown(run: &RunData) -> Option<String> {
    let table = ratios(run)?;
    let mut out = String::new();
    for panel in &table.panels {
        let _ = writeln!(
            out,
            "**{}** ({}): ratios to {}, and the system's own mean\n",
            panel.title, panel.subtitle, table.over
        );
        for band in &panel.bands {
            let heads: Vec<String> =
                band.columns.iter().map(|c| format!("{}, {} ({})", c.name(), c.unit(), c.better())).collect();
            let _ = writeln!(out, "| {} | {} |", band.title, heads.join(" | "));
            let _ = writeln!(out, "|---|{}", "---:|".repeat(heads.len()));
            for row in &band.rows {
                let cells: Vec<String> = row.cells.iter().map(shown).collect();
                let _ = writeln!(out, "| {} | {} |", row.label.replace('|', "\\|"), cells.join(" | "));
            }
            out.push('\n');
        }
    }
    let _ = writeln!(out, "{}", describe_limits(&run.manifest.settings));
    Some(out)
}

/// Ratio, its interval, and the value itself.
fn shown(cell: &RatioCell) -> String {
    let ratio = match &cell.ratio {
        Ok(ratio) => {
            format!("{}{}", ratio_text(ratio), range(ratio).map_or(String::new(), |r| format!(" ({r})")))
        }
        Err(_) => "-".into(),
    };
    match &cell.value {
        Ok(value) => format!("{ratio}, {}", value_text(value)),
        Err(_) => ratio,
    }
}

/// A ratio with its side.
pub(crate) fn ratio_text(ratio: &Value) -> String {
    format!("{}{}x", ratio.side, number(Some(ratio.value)))
}

/// A value with its side.
pub(crate) fn value_text(value: &Value) -> String {
    format!("{}{}", value.side, number(Some(value.value)))
}

/// The interval of a ratio that has one.
pub(crate) fn range(ratio: &Value) -> Option<String> {
    ratio.interval.map(|(low, high)| format!("{} to {}", number(Some(low)), number(Some(high))))
}

/// Why cells are empty, each reason once.
fn missing(band: &Band) -> Vec<&str> {
    let cells = band.rows.iter().flat_map(|row| &row.cells);
    let mut reasons: Vec<&str> = Vec::new();
    for why in cells.filter_map(|cell| cell.ratio.as_ref().err()) {
        if !reasons.contains(&why.as_str()) {
            reasons.push(why);
        }
    }
    reasons
}

/// Writes ratios.csv (a row a number) and ratios.md into `folder`; nothing where the figure is another.
///
/// # Errors
/// When a file cannot be written.
pub fn write_ratios(run: &RunData, folder: &Path) -> Result<(), FrameError> {
    let (Some(table), Some(text)) = (ratios(run), markdown(run)) else { return Ok(()) };
    let path = folder.join("ratios.md");
    std::fs::write(&path, text).map_err(|e| FrameError::new(&path, e))?;
    let mut table = flat(&table);
    write_csv(&folder.join("ratios.csv"), &mut table)
}

fn flat(table: &Ratios) -> polars::prelude::DataFrame {
    let rows: Vec<_> = table
        .panels
        .iter()
        .flat_map(|panel| panel.bands.iter().map(move |band| (panel, band)))
        .flat_map(|(panel, band)| band.rows.iter().map(move |row| (panel, band, row)))
        .flat_map(|(panel, band, row)| {
            band.columns.iter().zip(&row.cells).map(move |(column, cell)| (panel, band, row, column, cell))
        })
        .collect();
    type Of<'a, T> = &'a dyn Fn(&RatioCell) -> T;
    let number = |of: Of<'_, Option<f64>>| rows.iter().map(|(.., cell)| of(cell)).collect::<Vec<_>>();
    let text = |of: Of<'_, String>| rows.iter().map(|(.., cell)| of(cell)).collect::<Vec<_>>();
    let ratio = |cell: &RatioCell| cell.ratio.as_ref().ok().copied();
    let value = |cell: &RatioCell| cell.value.as_ref().ok().copied();
    let columns = vec![
        column("panel", rows.iter().map(|(panel, ..)| panel.name.clone()).collect::<Vec<_>>()),
        column("system", rows.iter().map(|(_, _, row, ..)| row.system.clone()).collect::<Vec<_>>()),
        column("quantity", rows.iter().map(|(.., column, _)| column.name()).collect::<Vec<_>>()),
        column("unit", rows.iter().map(|(.., column, _)| column.unit()).collect::<Vec<_>>()),
        column("better", rows.iter().map(|(.., column, _)| column.better()).collect::<Vec<_>>()),
        column("rate", rows.iter().map(|(_, band, ..)| band.rate).collect::<Vec<_>>()),
        column("value", number(&|cell| Some(value(cell)?.value))),
        column("value_side", text(&|cell| value(cell).map_or("", |v| v.side).into())),
        column("over", vec![table.over.clone(); rows.len()]),
        column("ratio", number(&|cell| Some(ratio(cell)?.value))),
        column("ratio_side", text(&|cell| ratio(cell).map_or("", |r| r.side).into())),
        column("low", number(&|cell| Some(ratio(cell)?.interval?.0))),
        column("high", number(&|cell| Some(ratio(cell)?.interval?.1))),
        column(
            "seeds",
            rows.iter().map(|(.., cell)| ratio(cell).map_or(0, |r| r.seeds as u32)).collect::<Vec<_>>(),
        ),
        column("why", text(&|cell| cell.ratio.as_ref().err().cloned().unwrap_or_default())),
    ];
    frame(rows.len(), columns)
}
