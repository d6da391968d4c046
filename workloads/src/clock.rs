//! Time as the harness sees it: since the start of a run, real or scripted.

use std::time::{Duration, Instant};

/// A clock that all parts of one run share. Times are durations since its epoch.
pub trait Clock: Send + Sync {
    /// Time since the epoch.
    fn now(&self) -> Duration;
}

/// Real time since this value was made; copies share the epoch.
#[derive(Debug, Clone, Copy)]
pub struct WallClock {
    epoch: Instant,
}

impl WallClock {
    /// A clock whose epoch is now.
    pub fn start() -> Self {
        Self { epoch: Instant::now() }
    }

    /// The epoch, for code that times by [`Instant`].
    pub fn epoch(&self) -> Instant {
        self.epoch
    }
}

impl Clock for WallClock {
    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }
}
