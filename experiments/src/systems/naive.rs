//! The naive baseline as a serving system.

use std::sync::Arc;
use std::time::Duration;

use quire_baselines::naive::{NaiveOptions, NaiveServer};
use quire_engine::model::WeightDtype;
use quire_workloads::{SystemError, WallClock};
use serde::{Deserialize, Serialize};

use super::{Launched, Models, start_error};
use crate::config::KvPrecision;
use crate::settings::Settings;

/// Settings of the naive server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NaiveSystem {
    /// Requests in a batch.
    pub batch_size: u32,
    /// How long the oldest request waits for a batch to fill, milliseconds.
    pub timeout_ms: u64,
}

impl NaiveSystem {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.batch_size == 0 { Err("`batch_size` must be 1 or more".into()) } else { Ok(()) }
    }

    pub(super) fn launch(&self, settings: &Settings, models: &mut Models) -> Result<Launched, SystemError> {
        if settings.weights != WeightDtype::F32 || settings.kv_dtype != KvPrecision::F32 {
            let reason = "candle computes in f32 on a CPU: set `weights` and `kv_dtype` to \"f32\", so that all \
                          systems have the same precision, or leave this system out";
            return Err(start_error("naive", reason));
        }
        let model = models.naive(settings)?;
        let options = NaiveOptions {
            threads: usize::from(settings.threads),
            batch_size: self.batch_size as usize,
            batch_timeout: Duration::from_millis(self.timeout_ms),
            max_model_len: Some(settings.max_model_len as usize),
            kv_bytes: Some(settings.kv_bytes),
            ..NaiveOptions::default()
        };
        let clock = WallClock::start();
        let system = NaiveServer::start(model, &options, clock)?;
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}
