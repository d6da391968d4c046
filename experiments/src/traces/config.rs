//! The configuration of a figure of traces.

use std::collections::HashSet;

use quire_workloads::stats::StatsName;
use serde::Deserialize;

use super::Axis;
use crate::config::{ConfigError, Source, Step, check_bounds};
use crate::names;

/// The configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesConfig {
    /// Name of the figure: its folder under `results/` and its file name.
    pub name: String,
    figure: TracesFigure,
    /// What papers found.
    #[serde(default)]
    pub claim: Vec<TraceClaim>,
}

/// The `[figure]` table; its kind says which configurations are of this shape.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum TracesFigure {
    Traces { source: Vec<SourceConfig> },
}

/// A column of the figure.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SourceConfig {
    /// Name, for `--trace` and claims.
    pub(super) name: String,
    /// Title in the figure.
    pub(super) title: String,
    /// The carried statistics that stand for it.
    pub(super) fit: Option<StatsName>,
    /// Or the panel whose requests do.
    pub(super) panel: Option<PanelRef>,
}

/// A panel of another configuration, whose lengths and conversations were computed from a trace.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PanelRef {
    /// That configuration, in the folder of this one.
    pub(super) config: String,
    /// The panel's name.
    pub(super) name: String,
    /// What it was computed from, in words.
    pub(super) fitted_to: String,
    /// Requests that it was computed from.
    pub(super) fitted_requests: u64,
}

/// A finding of a paper about lengths.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceClaim {
    /// What the paper found, in a sentence.
    pub says: String,
    /// Which paper, and where in it.
    pub source: String,
    /// About which source of the figure.
    pub trace: String,
    /// About which distribution.
    pub of: Axis,
    /// What of it.
    pub statistic: Statistic,
    /// The claim holds from here on.
    pub at_least: Option<f64>,
    /// The claim holds up to here.
    pub at_most: Option<f64>,
}

/// A number of a distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Statistic {
    /// Mean.
    Mean,
    /// Median.
    Median,
    /// 95th percentile.
    P95,
}

impl Statistic {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::Median => "median",
            Self::P95 => "P95",
        }
    }
}

impl TracesConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// With the line that is wrong.
    pub fn parse(source: &Source) -> Result<Self, ConfigError> {
        use Step::{Index, Key};
        let config: Self = source.parse()?;
        let check_name = |name: &str, path: &[Step<'_>]| {
            names::check("`name`", name).map_err(|message| source.error(path, message))
        };
        check_name(&config.name, &[Key("name")])?;
        if config.sources().is_empty() {
            return Err(
                source.error(&[Key("figure"), Key("source")], "no [[figure.source]]: nothing is shown")
            );
        }
        let mut known = HashSet::new();
        for (i, entry) in config.sources().iter().enumerate() {
            let at = [Key("figure"), Key("source"), Index(i), Key("name")];
            check_name(&entry.name, &at)?;
            if !known.insert(&entry.name) {
                return Err(source.error(&at, "another source has this name"));
            }
            if entry.fit.is_some() == entry.panel.is_some() {
                let message = "`fit` or `panel` must say, one of them, what stands for the trace";
                return Err(source.error(&[Key("figure"), Key("source"), Index(i)], message));
            }
        }
        for (i, claim) in config.claim.iter().enumerate() {
            let at = |key| [Key("claim"), Index(i), Key(key)];
            if !known.contains(&claim.trace) {
                return Err(source.error(&at("trace"), format!("no source `{}`", claim.trace)));
            }
            if let Err(message) = check_bounds(claim.at_least, claim.at_most) {
                return Err(source.error(&at("at_least"), message));
            }
        }
        Ok(config)
    }

    pub(super) fn sources(&self) -> &[SourceConfig] {
        let TracesFigure::Traces { source } = &self.figure;
        source
    }
}
