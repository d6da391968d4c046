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
//! candle computes matrix products through the `gemm` crate and softmax through rayon; both run in the rayon pool of
//! the calling thread. The server builds a pool of the asked size and runs its whole loop inside
//! (`ThreadPool::install`), so no more threads than that compute; the process-wide pool stays unused. How many pieces
//! a product is cut into is another number, which candle takes from `RAYON_NUM_THREADS` or else from the physical
//! cores: with fewer pieces than threads some threads idle, with more they queue. `gemm` also keeps products under
//! 590,000 multiply-adds, and so single-row products of small models, on one thread; element-wise operations are
//! serial. That is candle as it comes, and part of what the baseline shows.

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
