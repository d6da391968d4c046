//! The server that people write first.
//!
//! Requests wait until there is a batch of them or a timeout has passed; prompts are padded on the left to the
//! longest; one forward pass computes all of them, and then each pass one token for every row, the KV of all rows
//! growing by `Tensor::cat`; the batch ends when its longest sequence does, and only then does the next one start.
//!
//! # Precision
//! Everything is f32, candle's default on a CPU. It is also the fastest there: candle 0.11 has no bf16 matrix kernel
//! for CPUs (`matmul` takes f16, f32 and f64; bf16 is widened around every product).
//!
//! # Threads
//! candle computes matrix products through the `gemm` crate, and softmax, norms and rotation through rayon; all of
//! them run in the rayon pool of the calling thread. The server builds a pool of the asked size and runs its whole
//! loop inside (`ThreadPool::install`), so no more threads than that compute them; rayon's process-wide pool stays
//! unused. Two numbers are candle's alone, from `RAYON_NUM_THREADS` or else the physical cores, and the same for the
//! whole process ([`candle_threads`]; `CANDLE_NUM_THREADS` overrides the second): into how many pieces a product is
//! cut, and how many threads (the caller included, but outside the pool) share an element-wise operation of 65,536
//! elements or more. They agree with the options where those ask for all cores. With one thread asked for on 2 cores
//! of an AMD EPYC (Zen 4), 7 % more processor time than wall time went by, on four prompts of 200 tokens with
//! SmolLM2-135M's shape. `gemm` also keeps products of at most 589,824 multiply-adds on one thread, and so some
//! single-row products of small models. That is candle as it comes, and part of what the baseline shows.

mod batch;
mod config;
mod layer;
mod model;
mod queue;
mod rotary;
mod server;
mod weights;
mod worker;

pub use batch::{StaticBatch, StepOutput, StepTimes};
pub use config::{NaiveConfig, RopeScaling};
pub use model::{KvCache, NaiveModel};
pub use server::{NaiveOptions, NaiveServer};

/// Threads that candle takes where it does not ask the caller's pool; see [the module](self#threads). A run whose
/// options ask for fewer lets this baseline have more in part, and should say so.
pub fn candle_threads() -> usize {
    candle_core::utils::get_num_threads()
}
