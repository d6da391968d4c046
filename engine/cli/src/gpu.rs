//! A GPU while something is measured: what it could do, and its clocks.

mod utilisation;

use std::time::{Duration, Instant};

use quire_engine::{DeviceName, GpuPeak};
use quire_kernels::clocks::ClockSampler;

pub(crate) use quire_kernels::clocks::Clocks;
pub(crate) use utilisation::{Pass, Work};

/// Between readings of clocks: passes that are measured may take a second in all.
const READ_EVERY: Duration = Duration::from_millis(50);

/// What a GPU could do, and what reads its clocks.
pub(crate) struct Gpu {
    pub(crate) peak: GpuPeak,
    sampler: Option<ClockSampler>,
}

impl Gpu {
    /// None where the device is none.
    pub(crate) fn of(device: &DeviceName) -> Option<Self> {
        match device {
            DeviceName::Gpu { uuid, peak, .. } => {
                Some(Self { peak: *peak, sampler: ClockSampler::start(uuid, READ_EVERY) })
            }
            DeviceName::Cpu { .. } => None,
        }
    }

    /// Its clocks since `begin`, where something reads them.
    pub(crate) fn clocks_since(&self, begin: Instant) -> Option<Clocks> {
        self.sampler.as_ref()?.since(begin)
    }
}

/// A share as it is printed.
pub(crate) fn percent(share: Option<f64>) -> String {
    share.map_or("-".into(), |share| format!("{:.1}%", 100.0 * share))
}
