//! A GPU while something is measured: what it could do, and its clocks.

mod clocks;
mod utilisation;

use std::time::Instant;

use quire_engine::{DeviceName, GpuPeak};

pub(crate) use clocks::Clocks;
use clocks::Sampler;
pub(crate) use utilisation::{Pass, Work};

/// What a GPU could do, and what reads its clocks.
pub(crate) struct Gpu {
    pub(crate) peak: GpuPeak,
    sampler: Option<Sampler>,
}

impl Gpu {
    /// None where the device is none.
    pub(crate) fn of(device: &DeviceName) -> Option<Self> {
        match device {
            DeviceName::Gpu { uuid, peak, .. } => Some(Self { peak: *peak, sampler: Sampler::start(uuid) }),
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
