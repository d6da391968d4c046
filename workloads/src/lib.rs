//! Workloads: when requests come, how long they are, and how they are sent.

mod clock;
mod system;

pub use clock::{Clock, WallClock};
pub use system::{
    EventKind, FinishReason, GenerationRequest, ServingSystem, StepRecord, SystemError, TokenEvent,
};
