//! Workloads: when requests come, how long they are, and how they are sent.
//!
//! A [`WorkloadSpec`] with a seed and a model's [`ModelLimits`] gives a [`Workload`]; a [`LoadGenerator`] sends it to a
//! [`ServingSystem`] and gives one [`RequestRecord`] for each request, whatever became of it.
//! ```
//! use std::sync::atomic::AtomicBool;
//! use std::time::Duration;
//! use quire_workloads::mock::{ScriptedSystem, VirtualClock};
//! use quire_workloads::stats::StatsName;
//! use quire_workloads::*;
//!
//! let spec = WorkloadSpec {
//!     requests: 20,
//!     lengths: LengthSource::Stats { name: StatsName::AzureConv2023 },
//!     arrivals: ArrivalProcess::Poisson { rate: 2.0 },
//!     length_scale: 0.125,
//!     over_limit: OverLimit::Drop,
//!     shared_prefix: 0,
//!     conversations: None,
//!     classes: Vec::new(),
//!     decoding: Decoding::Single {},
//! };
//! let limits = ModelLimits { vocab_size: 49152, reserved_ids: 17, max_model_len: 1024 };
//! let workload = Workload::generate(&spec, 1, &limits)?;
//!
//! let clock = VirtualClock::new();
//! let mut system = ScriptedSystem::healthy(clock.clone(), Duration::from_millis(50), Duration::from_millis(10));
//! let generator = LoadGenerator::new(&workload, LoadOptions::default())?;
//! let result = generator.run(&mut system, &clock, &AtomicBool::new(false), &mut |_| {});
//! assert!(result.is_valid() && result.records.len() == 20);
//! # Ok::<(), WorkloadError>(())
//! ```

pub mod arrivals;
mod cdf;
mod clock;
pub mod conversations;
mod error;
mod hash;
pub mod lengths;
mod lines;
pub mod load;
pub mod mock;
mod random;
pub mod record;
pub mod spec;
pub mod stats;
mod system;
pub mod trace;
mod workload;

pub use arrivals::{ArrivalProcess, ThinkTime};
pub use clock::{Clock, WallClock};
pub use conversations::{ConversationSpec, LaterTurns, TurnCount};
pub use error::WorkloadError;
pub use hash::{TokenHasher, token_hash};
pub use lengths::LengthDistribution;
pub use load::{ConversationReport, LagReport, LoadGenerator, LoadOptions, LoadResult, Progress, VoidReason};
pub use record::{Outcome, RECORD_SCHEMA, RequestRecord, read_records};
pub use spec::{LengthSource, MAX_CLASSES, ModelLimits, OverLimit, TraceSource, Window, WorkloadSpec};
pub use system::{
    Decoding, EarlyStopping, EventKind, FinishReason, GenerationRequest, ServingSystem, StepRecord,
    SystemError, TokenEvent,
};
pub use trace::{Trace, TraceFormat, Turn};
pub use workload::{DrawnConversations, WORKLOAD_SCHEMA, Workload, WorkloadHeader, WorkloadRequest};
