//! A paged-attention LLM serving engine in which every mechanism is a switch.

mod beam_search;
mod chat_template;
mod config;
mod cpu_executor;
#[cfg(feature = "cuda")]
mod cuda_executor;
pub mod dummy;
mod engine;
mod error;
mod executor;
pub mod kv;
pub mod load;
pub mod model;
mod model_executor;
mod parallel;
pub mod policy;
mod request;
mod sampling;
mod scheduler;
mod sequence;
mod service;
pub mod speculation;
mod stats;
mod tensor_parallel;
mod tokenizer;

pub use beam_search::{BeamSearch, EarlyStopping, Hypothesis, MAX_BEAM_WIDTH};
pub use chat_template::{ChatMessage, ChatTemplate};
pub use config::{EngineConfig, PreemptionConfig, SchedulerConfig};
pub use cpu_executor::{CpuExecutor, CpuExecutorOptions};
#[cfg(feature = "cuda")]
pub use cuda_executor::{CudaExecutor, CudaExecutorOptions};
pub use engine::{Engine, EngineParts, Progress, StepOutput};
pub use error::EngineError;
pub use executor::{
    Executor, FED, IN_FLIGHT, KvCopy, KvCopyKind, KvPlacement, SampleRow, Sampled, SampledQueue,
    ScheduledBatch, TokenLogprob,
};
pub use kv::{KvLayout, KvUsage, Reservation};
pub use model_executor::{DeviceName, GpuPeak, KvCapacity, ModelExecutor, ModelInfo};
pub use parallel::{MAX_SAMPLES, Parallel, ParallelSamples, Sample};
pub use policy::PolicyConfig;
pub use request::{Event, FinishReason, MAX_TOP_LOGPROBS, Refusal, Request, SamplingParams};
pub use service::{EngineService, TimedEvent};
pub use speculation::{DraftLength, DrafterConfig, SpeculationConfig};
pub use stats::{BatchStats, StepStats};
#[cfg(feature = "cuda")]
pub use tensor_parallel::executor_on_gpus;
pub use tensor_parallel::{MAX_RANKS, TensorParallel, check_ranks, executor_on_cpu};
pub use tokenizer::{TextStream, Tokenizer};
