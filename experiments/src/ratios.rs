//! Ratios to one system, as a table: what a configuration with `[figure] kind = "table"` shows, from records alone.

mod report;

pub use report::{markdown, text, write_ratios};
pub(crate) use report::{range, ratio_text, value_text};

use crate::claims::{Measured, measure_in};
use crate::config::{FigureConfig, Quantity, RateChoice, RateEnd};
use crate::metrics::{Better, Metric, SLO_SHARE, Slo};
use crate::run_data::RunData;
use crate::settings::Settings;

/// A table of ratios.
#[derive(Debug, Clone, PartialEq)]
pub struct Ratios {
    /// The system that the others are held against.
    pub over: String,
    /// A part a panel.
    pub panels: Vec<RatioPanel>,
}

/// The part of one panel.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioPanel {
    /// The panel's name.
    pub name: String,
    /// Its title.
    pub title: String,
    /// Mean lengths.
    pub subtitle: String,
    /// Quantities at one rate each, and last the rates that are sustained.
    pub bands: Vec<Band>,
}

/// Columns that belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct Band {
    /// Where they were measured.
    pub title: String,
    /// The rate, requests a second; none where the rate is what is measured.
    pub rate: Option<f64>,
    /// The quantities.
    pub columns: Vec<RatioColumn>,
    /// A row a system.
    pub rows: Vec<RatioRow>,
}

/// A quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioColumn {
    /// The metric; none for the rate within the SLO.
    pub metric: Option<Metric>,
    /// Which way is better.
    pub better: Better,
}

/// A system.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioRow {
    /// Its name.
    pub system: String,
    /// Its name in the figure.
    pub label: String,
    /// One for each column.
    pub cells: Vec<RatioCell>,
}

/// A quantity of a system.
#[derive(Debug, Clone, PartialEq)]
pub struct RatioCell {
    /// Mean over seeds, or why there is none.
    pub value: Result<Value, String>,
    /// Over that of the other system, paired by seed.
    pub ratio: Result<Value, String>,
}

/// A value over seeds, perhaps known from one side only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    /// The value; of ratios the geometric mean.
    pub value: f64,
    /// Ends of its interval over seeds; none with one seed.
    pub interval: Option<(f64, f64)>,
    /// Seeds.
    pub seeds: usize,
    /// `>` where it is this or more, `<` where it is this or less, else nothing.
    pub side: &'static str,
}

impl RatioColumn {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.metric.map_or("rate within the SLO", Metric::name)
    }

    /// Its unit.
    pub fn unit(&self) -> &'static str {
        self.metric.map_or("requests/s", Metric::unit)
    }

    /// Which way is better, in words.
    pub fn better(&self) -> &'static str {
        match self.better {
            Better::Higher => "more is better",
            Better::Lower => "less is better",
        }
    }
}

/// The table that a run's configuration asks for; none where its figure is another.
pub fn ratios(run: &RunData) -> Option<Ratios> {
    let settings = &run.manifest.settings;
    let FigureConfig::Table { over, columns, at } = &settings.figure else { return None };
    let panels = settings.selected_panels().map(|panel| {
        let rates = run.rates(&panel.name);
        let mut bands: Vec<Band> = Vec::new();
        for end in at {
            let rate = match end {
                RateEnd::Lowest => rates.first(),
                RateEnd::Highest => rates.last(),
            };
            // One rate is both of them.
            let Some(&rate) = rate.filter(|rate| bands.iter().all(|band| band.rate != Some(**rate))) else {
                continue;
            };
            let quantity = |&metric: &Metric| Quantity::Metric { metric, rate: RateChoice::At(rate) };
            let columns = columns.iter().map(|metric| (Some(*metric), quantity(metric))).collect();
            bands.push(band(run, &panel.name, over, Some(rate), columns));
        }
        if rates.len() > 1 {
            bands.push(band(run, &panel.name, over, None, vec![(None, Quantity::WithinSlo {})]));
        }
        RatioPanel {
            name: panel.name.clone(),
            title: panel.title.clone(),
            subtitle: run.panel_subtitle(&panel.name),
            bands,
        }
    });
    Some(Ratios { over: over.clone(), panels: panels.collect() })
}

fn band(
    run: &RunData,
    panel: &str,
    over: &str,
    rate: Option<f64>,
    columns: Vec<(Option<Metric>, Quantity)>,
) -> Band {
    let row = |system: &str, label: &str| RatioRow {
        system: system.to_owned(),
        label: label.to_owned(),
        cells: columns.iter().map(|(_, quantity)| cell(run, panel, quantity, system, over)).collect(),
    };
    Band {
        title: rate.map_or_else(|| "sustained".into(), |rate| format!("at {rate} requests/s")),
        rate,
        rows: run.manifest.settings.selected_systems().map(|s| row(&s.name, &s.label)).collect(),
        columns: columns
            .iter()
            .map(|(metric, _)| RatioColumn {
                metric: *metric,
                better: metric.map_or(Better::Higher, Metric::better),
            })
            .collect(),
    }
}

fn cell(run: &RunData, panel: &str, quantity: &Quantity, system: &str, over: &str) -> RatioCell {
    let of = |over| {
        let measured = measure_in(run, panel, quantity, system, over).map_err(|why| why.to_string());
        measured.and_then(value)
    };
    let value = of(None);
    let ratio = match &value {
        // To itself it is 1 by definition, also where it is known from one side only.
        Ok(own) if system == over => Ok(Value { value: 1.0, interval: None, side: "", ..*own }),
        _ => of(Some(over)),
    };
    RatioCell { value, ratio }
}

fn value(measured: Measured) -> Result<Value, String> {
    let estimate = measured.estimate.ok_or("known from such sides only that nothing follows")?;
    let side = measured.known.mark();
    Ok(Value { value: estimate.value, interval: estimate.interval, seeds: estimate.seeds, side })
}

/// What a rate within the SLO is, for captions.
pub(crate) fn describe_limits(settings: &Settings) -> String {
    let Slo { ttft_s, tpot_s } = settings.slo;
    format!(
        "Rate within the SLO: the highest at which {:.0} % of the requests have TTFT up to {ttft_s} s and TPOT up to {} ms, \
         on straight lines between measured rates. > and <: known from this side only (unfinished requests, or no rate \
         beyond the bound or within it).",
        SLO_SHARE * 100.0,
        tpot_s * 1e3
    )
}
