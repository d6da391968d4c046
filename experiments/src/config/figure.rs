//! What a configuration's figure shows: its `[figure]` table.

use serde::{Deserialize, Serialize};

use super::RateEnd;
use crate::metrics::Metric;

/// Columns of a table that a figure has room for.
const MOST_COLUMNS: usize = 5;

/// What is drawn from a run's records. Left out, it is the figure of all of [`FigureConfig::DEFAULT_ROWS`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FigureConfig {
    /// Metrics against the request rate: a column a panel, a row a metric, a line a system.
    Rates {
        /// The rows.
        #[serde(default = "default_rows")]
        rows: Vec<Metric>,
    },
    /// Where the KV memory goes: a column a panel, a group of bars a rate, a bar a system.
    Memory {},
    /// Metrics against a metric: a column a panel, a row a metric, a line a system, a point a rate.
    Tradeoff {
        /// The horizontal one.
        x: Metric,
        /// The vertical ones.
        rows: Vec<Metric>,
    },
    /// What proposing tokens gains: how many times as fast as `over` a system gives tokens (TPOT), against the request rate
    /// and, at the lowest rate, against the acceptance of what was proposed.
    Speedup {
        /// The system that the others are held against.
        over: String,
    },
    /// Metrics against a setting, at one rate a panel: a column a panel, a row a metric, a line for each name that the
    /// systems' points have, a point a system.
    Sweep {
        /// Label of the horizontal axis: the setting and its unit.
        x: String,
        /// How its values are laid out.
        #[serde(default)]
        scale: SweepScale,
        /// The rows.
        rows: Vec<Metric>,
    },
    /// Metrics as ratios to those of the system `over`, at one rate a panel: a column a panel, a row a metric, a bar a
    /// system. For leaving one mechanism out at a time, among others.
    Ablation {
        /// The system that the others are held against.
        over: String,
        /// The rows.
        rows: Vec<Metric>,
    },
    /// Ratios to a system: a row a system, a column a quantity; in a band of its own each, the metrics at a rate, and the
    /// highest rates at which requests meet their limits.
    Table {
        /// The system that the others are held against.
        over: String,
        /// Metrics that have a column.
        #[serde(default = "default_columns")]
        columns: Vec<Metric>,
        /// At which of each panel's rates.
        #[serde(default = "default_ends")]
        at: Vec<RateEnd>,
    },
}

/// How the values of a setting are laid along an axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SweepScale {
    /// Evenly, from zero.
    #[default]
    Linear,
    /// By logarithm, with ticks at powers of two.
    Log2,
}

/// The kinds of figures; [`FigureKind::Traces`] and [`FigureKind::Micro`] have configurations of their own shapes, since nothing
/// is served for them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FigureKind {
    #[default]
    Rates,
    Memory,
    Tradeoff,
    Speedup,
    Sweep,
    Ablation,
    Table,
    Traces,
    Micro,
}

/// As much of a configuration as says of which shape it is.
#[derive(Debug, Deserialize)]
pub(crate) struct Head {
    #[serde(default)]
    figure: FigureHead,
}

#[derive(Debug, Default, Deserialize)]
struct FigureHead {
    #[serde(default)]
    kind: FigureKind,
}

impl Head {
    pub(crate) fn kind(&self) -> FigureKind {
        self.figure.kind
    }
}

fn default_rows() -> Vec<Metric> {
    FigureConfig::DEFAULT_ROWS.to_vec()
}

fn default_columns() -> Vec<Metric> {
    vec![Metric::Throughput, Metric::NormalizedLatency, Metric::Ttft, Metric::Tpot]
}

fn default_ends() -> Vec<RateEnd> {
    vec![RateEnd::Lowest, RateEnd::Highest]
}

impl Default for FigureConfig {
    fn default() -> Self {
        Self::Rates { rows: default_rows() }
    }
}

impl FigureConfig {
    /// What is shown against the request rate when the configuration names nothing.
    pub const DEFAULT_ROWS: [Metric; 7] = [
        Metric::NormalizedLatency,
        Metric::Ttft,
        Metric::Tpot,
        Metric::Goodput,
        Metric::Throughput,
        Metric::Running,
        Metric::KvUsed,
    ];

    /// Whether it is what a configuration without the table has; older manifests do not say.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The metrics that have a row of their own.
    pub fn rows(&self) -> &[Metric] {
        match self {
            Self::Rates { rows }
            | Self::Tradeoff { rows, .. }
            | Self::Sweep { rows, .. }
            | Self::Ablation { rows, .. } => rows,
            Self::Memory {} | Self::Table { .. } => &[],
            Self::Speedup { .. } => &[Metric::Tpot],
        }
    }

    /// The system that others are held against, if there is one.
    pub(crate) fn over(&self) -> Option<&str> {
        match self {
            Self::Speedup { over } | Self::Ablation { over, .. } | Self::Table { over, .. } => Some(over),
            Self::Rates { .. } | Self::Tradeoff { .. } | Self::Memory {} | Self::Sweep { .. } => None,
        }
    }

    /// Whether it shows one rate of each panel.
    pub(crate) fn has_one_rate(&self) -> bool {
        matches!(self, Self::Sweep { .. } | Self::Ablation { .. })
    }

    /// Checks what types cannot say.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Rates { rows }
            | Self::Tradeoff { rows, .. }
            | Self::Sweep { rows, .. }
            | Self::Ablation { rows, .. } => {
                if rows.is_empty() {
                    return Err("`rows` must name one metric or more".into());
                }
                let twice = rows.iter().enumerate().find(|(i, metric)| rows[..*i].contains(metric));
                twice.map_or(Ok(()), |(_, metric)| Err(format!("`rows` has {} twice", metric.name())))
            }
            Self::Table { columns, at, .. } => {
                let repeats = |i: usize| columns[..i].contains(&columns[i]);
                match (0..columns.len()).find(|&i| repeats(i)) {
                    _ if columns.is_empty() => Err("`columns` must name one metric or more".into()),
                    _ if columns.len() > MOST_COLUMNS => {
                        Err(format!("`columns` has room for {MOST_COLUMNS} metrics"))
                    }
                    Some(i) => Err(format!("`columns` has {} twice", columns[i].name())),
                    None if at.is_empty() || at.len() > 2 || (at.len() == 2 && at[0] == at[1]) => {
                        Err("`at` must be \"lowest\", \"highest\" or both".into())
                    }
                    None => Ok(()),
                }
            }
            Self::Memory {} | Self::Speedup { .. } => Ok(()),
        }
    }

    /// The field whose value [`Self::check`] is about.
    pub(crate) fn checked_field(&self) -> &'static str {
        match self {
            Self::Table { .. } => "columns",
            _ => "rows",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_without_rows_is_the_default() {
        let parsed: FigureConfig = toml::from_str("kind = \"rates\"").unwrap();
        assert!(parsed.is_default() && parsed.check().is_ok());
        let rows: FigureConfig =
            toml::from_str("kind = \"rates\"\nrows = [\"running\", \"itl_p99\"]").unwrap();
        assert_eq!(rows.rows(), [Metric::Running, Metric::ItlP99]);
        assert!(toml::from_str::<FigureConfig>("kind = \"memory\"\nrows = []").is_err());
    }

    #[test]
    fn rows_must_say_something_new() {
        let check = |rows: &[Metric]| FigureConfig::Rates { rows: rows.to_vec() }.check();
        assert!(check(&[]).is_err());
        assert!(check(&[Metric::Itl, Metric::Running, Metric::Itl]).unwrap_err().contains("ITL twice"));
    }
}
