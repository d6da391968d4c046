//! The figures of a run, as pure functions of its records. `docs/metrics.md` defines them all.

mod capacity;
mod catalogue;
mod cell;
mod classes;
mod request;
mod window;

pub use capacity::{Capacity, Known, RatePoint, SLO_SHARE, rate_capacity, rate_within};
pub use catalogue::{Better, Metric};
pub use cell::{CellMetrics, LOSS_SHARE, StepMetrics, cell_metrics, step_metrics};
pub use classes::ClassMetrics;
pub use request::{Emission, Ending, Observed, Slo};
pub use window::{SATURATION_MIN_GROWTH, SATURATION_SHARE, Window, is_saturated, queue_growth};
