//! A paged-attention LLM serving engine in which every mechanism is a switch.

mod error;
mod executor;
mod request;

pub use error::EngineError;
pub use executor::{Executor, KvPlacement, SampleRow, Sampled, ScheduledBatch};
pub use request::{Event, FinishReason, Request, SamplingParams};
