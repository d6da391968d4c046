//! How fast a GPU ran while a cell was measured, and what it drew: cards lower their clocks at their limits of power and
//! temperature, and times follow them.

use std::ops::Range;
use std::time::{Duration, Instant};

use quire_kernels::clocks::ClockSampler;
use quire_workloads::Clock;
use serde::{Deserialize, Serialize};

use crate::metrics::Window;

/// Between readings. Cells take many seconds, and each reading takes time of the host's and the driver's.
const READ_EVERY: Duration = Duration::from_millis(200);

/// A GPU's clocks and power in the stationary window of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuUse {
    /// Mean clock of its multiprocessors, in MHz.
    pub sm_mhz: f64,
    /// The lowest reading of it.
    pub lowest_sm_mhz: f64,
    /// Mean power, in watts.
    pub watts: f64,
    /// The highest reading of it.
    pub highest_watts: f64,
}

/// Reads a GPU's clocks until it is dropped.
#[derive(Debug)]
pub(crate) struct GpuWatch {
    sampler: ClockSampler,
    /// Second 0 of the cell's clock.
    epoch: Instant,
}

impl GpuWatch {
    /// Begins, for a cell timed by `clock`; none where nothing can read this GPU.
    pub(crate) fn start(uuid: &str, clock: &dyn Clock) -> Option<Self> {
        let epoch = Instant::now().checked_sub(clock.now())?;
        Some(Self { sampler: ClockSampler::start(uuid, READ_EVERY)?, epoch })
    }

    /// What was read in `window`; none where nothing was.
    pub(crate) fn over(&self, window: &Window) -> Option<GpuUse> {
        let clocks = self.sampler.over(&[span(self.epoch, window)?])?;
        Some(GpuUse {
            sm_mhz: clocks.sm_mhz,
            lowest_sm_mhz: clocks.lowest_sm_mhz,
            watts: clocks.watts,
            highest_watts: clocks.highest_watts,
        })
    }
}

/// A window in time; none of a cell without requests, whose window has no end.
fn span(epoch: Instant, window: &Window) -> Option<Range<Instant>> {
    let at = |seconds| epoch.checked_add(Duration::try_from_secs_f64(seconds).ok()?);
    Some(at(window.start_s)?..at(window.end_s)?)
}

/// One line over cells; none without any.
pub(crate) fn describe(cells: &[GpuUse], gpus: u16) -> Option<String> {
    let mean = |value: fn(&GpuUse) -> f64| cells.iter().map(value).sum::<f64>() / cells.len() as f64;
    let lowest = cells.iter().map(|gpu| gpu.lowest_sm_mhz).fold(f64::INFINITY, f64::min);
    let highest = cells.iter().map(|gpu| gpu.highest_watts).fold(0.0, f64::max);
    (!cells.is_empty()).then(|| {
        format!(
            "{} in the windows: SM clock {} MHz on average, {} at the least; {} W on average, {} at the most.",
            if gpus == 1 { "GPU" } else { "The first GPU" },
            grouped(mean(|gpu| gpu.sm_mhz)),
            grouped(lowest),
            grouped(mean(|gpu| gpu.watts)),
            grouped(highest)
        )
    })
}

/// A whole number with a comma before its last three digits.
fn grouped(value: f64) -> String {
    let whole = value.round() as u64;
    match whole {
        0..1000 => whole.to_string(),
        _ => format!("{},{:03}", whole / 1000, whole % 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_a_stretch_of_the_cells_clock() {
        let epoch = Instant::now();
        let at = |seconds| epoch + Duration::from_secs(seconds);
        assert_eq!(span(epoch, &Window { start_s: 4.0, end_s: 11.0 }), Some(at(4)..at(11)));
        assert_eq!(span(epoch, &Window::stationary(&[], 0.1, 0.1)), None, "no requests");
        assert_eq!(span(epoch, &Window { start_s: -1.0, end_s: 1.0 }), None);
    }

    #[test]
    fn a_line_over_cells() {
        let cell = |sm_mhz, watts| GpuUse {
            sm_mhz,
            lowest_sm_mhz: sm_mhz - 300.0,
            watts,
            highest_watts: watts + 50.0,
        };
        assert_eq!(
            describe(&[cell(1900.0, 600.0), cell(1742.0, 692.4)], 1).unwrap(),
            "GPU in the windows: SM clock 1,821 MHz on average, 1,442 at the least; 646 W on average, 742 at the most."
        );
        assert!(describe(&[cell(1900.0, 600.0)], 2).unwrap().starts_with("The first GPU in the windows"));
        assert_eq!(describe(&[], 1), None);
        assert_eq!([0.4, 999.4, 999.6, 1005.0].map(grouped), ["0", "999", "1,000", "1,005"]);
    }
}
