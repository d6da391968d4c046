//! What stands for a trace where there is none.

use anyhow::{Result, anyhow};
use quire_workloads::stats::{ArrivalStats, LengthModel, LengthSummary};
use quire_workloads::{ModelLimits, Workload};

use super::config::{PanelRef, SourceConfig};
use super::{Axis, SEED};
use crate::config::{Config, ConfigError, Source};

/// Requests that are drawn where that alone tells how long they are.
const DRAWN: u32 = 10_000;

/// A fit: how long requests are, and when they come.
pub(super) struct Fit {
    /// What it was computed from, in words.
    pub(super) source: String,
    /// Requests that it was computed from; 0 when it was not computed from data.
    pub(super) requests: u64,
    /// Requests drawn, where its functions are counted in those.
    pub(super) drawn: Option<u64>,
    /// Arrivals of its own, where it has any.
    pub(super) arrivals: Option<ArrivalStats>,
    lengths: Lengths,
}

enum Lengths {
    Model {
        model: LengthModel,
        input: LengthSummary,
        output: LengthSummary,
    },
    /// Sorted.
    Drawn {
        inputs: Vec<u32>,
        outputs: Vec<u32>,
    },
}

impl Fit {
    pub(super) fn of(source: &SourceConfig, config: &Source) -> Result<Self> {
        match (&source.fit, &source.panel) {
            (Some(name), _) => {
                let stats = name.stats();
                let (input, output) = (stats.input, stats.output);
                Ok(Self {
                    source: stats.source,
                    requests: stats.requests,
                    drawn: None,
                    arrivals: stats.arrivals,
                    lengths: Lengths::Model { model: stats.lengths, input, output },
                })
            }
            (None, Some(panel)) => draw(panel, config),
            (None, None) => unreachable!("checked: one of them is there"),
        }
    }

    /// The share of requests of up to so many tokens.
    pub(super) fn up_to(&self, of: Axis, tokens: u32) -> f64 {
        match (&self.lengths, of) {
            (Lengths::Model { model, .. }, Axis::Output) => model.outputs_up_to(tokens),
            (Lengths::Model { model, .. }, _) => model.inputs_up_to(tokens),
            (Lengths::Drawn { inputs, outputs }, _) => {
                let values = if of == Axis::Output { outputs } else { inputs };
                values.partition_point(|&value| value <= tokens) as f64 / values.len() as f64
            }
        }
    }

    pub(super) fn summary(&self, of: Axis) -> LengthSummary {
        match (&self.lengths, of) {
            (Lengths::Model { output, .. }, Axis::Output) => *output,
            (Lengths::Model { input, .. }, _) => *input,
            (Lengths::Drawn { outputs, .. }, Axis::Output) => summary(outputs),
            (Lengths::Drawn { inputs, .. }, _) => summary(inputs),
        }
    }

    /// What its functions are, in words.
    pub(super) fn what(&self) -> String {
        match (self.drawn, self.requests) {
            (Some(drawn), n) => format!("{drawn} requests drawn as fitted to {n}"),
            (None, 0) => "log-normal fit to a stated mean".into(),
            (None, n) => format!("table of quantiles of {n} requests"),
        }
    }
}

/// Draws the requests of a panel, unscaled: of conversations, what a request brings along has no function to write down.
fn draw(panel: &PanelRef, config: &Source) -> Result<Fit> {
    let config: Config =
        config.beside(&panel.config).and_then(|c| c.parse()).map_err(|e: ConfigError| anyhow!("{e}"))?;
    let found = config.panel.iter().find(|known| known.name == panel.name);
    let found = found.ok_or_else(|| anyhow!("{} has no panel `{}`", panel.config, panel.name))?;
    let mut spec = found.spec(DRAWN, 1.0);
    spec.length_scale = 1.0;
    // Nothing is too long for it.
    let limits = ModelLimits { vocab_size: 1, reserved_ids: 0, max_model_len: u32::MAX };
    let lengths = Workload::draw_lengths(&spec, SEED, &limits)?;
    let sorted = |get: fn(&(u32, u32)) -> u32| {
        let mut values: Vec<u32> = lengths.iter().map(get).collect();
        values.sort_unstable();
        values
    };
    Ok(Fit {
        source: format!("{} (panel {} of {})", panel.fitted_to, panel.name, panel.config),
        requests: panel.fitted_requests,
        drawn: Some(lengths.len() as u64),
        // Later turns come when the answers before them have ended.
        arrivals: None,
        lengths: Lengths::Drawn { inputs: sorted(|pair| pair.0), outputs: sorted(|pair| pair.1) },
    })
}

fn summary(sorted: &[u32]) -> LengthSummary {
    let at = |share: f64| f64::from(sorted[(share * (sorted.len() - 1) as f64).round() as usize]);
    let mean = sorted.iter().map(|&tokens| f64::from(tokens)).sum::<f64>() / sorted.len() as f64;
    LengthSummary { mean, p50: at(0.5), p95: at(0.95) }
}
