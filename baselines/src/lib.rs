//! What people write first, and what they compare with: serving systems to hold the engine against.
//!
//! * [`naive`]: static batches on candle, padded to the longest, KV grown by concatenation. It shares no code with
//!   the engine, so it also serves as an independent opinion on the tokens.
//! * [`transformers`]: the real Hugging Face Transformers in a child process, when Python has it.
//! * [`openai`]: any server that speaks OpenAI's completions over HTTP, wherever it runs.
//!
//! All implement `quire_workloads::ServingSystem`, so the load generator drives them as it drives the engine.

mod error;
pub mod naive;
pub mod openai;
pub mod transformers;

pub use error::BaselineError;
