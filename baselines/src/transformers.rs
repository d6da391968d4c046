//! The real Hugging Face Transformers, as a child process.
//!
//! `baselines/transformers/` is compiled into this crate and run by the Python that the options name; it speaks JSON
//! lines on standard input and output (described in the README there, typed in `protocol.rs`). It calls
//! `model.generate` on static batches with the same rules as the [naive server](crate::naive), or lets Transformers'
//! own continuous batching serve.
//!
//! An event's time is when its line was read here: what a client of that process would see.

mod child;
mod link;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

pub use server::TransformersServer;

/// One file as a module of the program. In a raw string of Python, so it may not hold its quotes.
macro_rules! module {
    ($name:literal) => {
        concat!(
            "module('",
            $name,
            "', r'''",
            include_str!(concat!("../transformers/", $name, ".py")),
            "''')\n"
        )
    };
}

/// The program, run as `python -c`: its files as modules, whose lines tracebacks can show.
const SCRIPT: &str = concat!(
    "import linecache, sys, types\n",
    "def module(name, text):\n",
    "    made = sys.modules[name] = types.ModuleType(name)\n",
    "    file = name + '.py'\n",
    "    linecache.cache[file] = len(text), None, text.splitlines(True), file\n",
    "    exec(compile(text, file, 'exec'), made.__dict__)\n",
    "    return made\n",
    module!("common"),
    module!("static"),
    module!("continuous"),
    "serve = ",
    module!("serve"),
    "sys.exit(serve.main())\n",
);

/// What to say when Python or its packages are not there.
const INSTALL: &str = "install Python 3.10 or newer and, best in a virtual environment, run \
                       `pip install torch transformers psutil`; then name its interpreter in the options";

/// Which weights it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransformersModel {
    /// A Hugging Face folder: `config.json` and weights.
    Folder(PathBuf),
    /// A shape with seeded random weights: N(0, 0.02), norms one, biases zero. Not the numbers of any other system's
    /// random weights, so its tokens agree with nobody's.
    Dummy {
        /// The text of a Hugging Face `config.json`.
        config: String,
        /// Seed of the weights.
        seed: u32,
    },
}

/// Precision of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TorchDtype {
    /// 32 bits.
    Float32,
    /// 16 bits, 8 of exponent.
    Bfloat16,
    /// 16 bits, 5 of exponent.
    Float16,
}

/// Where it computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TorchDevice {
    /// The processor.
    Cpu,
    /// The first CUDA device.
    Cuda,
}

/// How it batches requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransformersBatching {
    /// `model.generate` on one batch after another.
    Static {
        /// Requests in a batch.
        batch_size: usize,
        /// How long the oldest request waits for a batch to fill.
        timeout: Duration,
    },
    /// Its own continuous batching over a paged cache, whose size is [`TransformersOptions::kv_bytes`].
    Continuous {
        /// Tokens in a pass (`max_batch_tokens`).
        token_budget: usize,
        /// Requests in a pass (`max_requests_per_batch`).
        max_running: usize,
        /// Tokens in a block of the cache.
        block_size: usize,
    },
}

/// The smallest block that Transformers has.
const LEAST_BLOCK: usize = 4;

impl TransformersBatching {
    /// Checks what types cannot say.
    ///
    /// # Errors
    /// With the field that cannot be so.
    pub fn check(&self) -> Result<(), String> {
        let least = |name: &str, value: usize, least: usize| match value >= least {
            true => Ok(()),
            false => Err(format!("`{name}` must be {least} or more")),
        };
        match *self {
            Self::Static { batch_size, .. } => least("batch_size", batch_size, 1),
            Self::Continuous { token_budget, max_running, block_size } => {
                least("max_running", max_running, 1)?;
                least("block_size", block_size, LEAST_BLOCK)?;
                match max_running <= token_budget {
                    true => Ok(()),
                    false => Err("`max_running` must not be above `token_budget`: each takes a token".into()),
                }
            }
        }
    }
}

/// How Transformers runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransformersOptions {
    /// The Python interpreter, a path or a name to be found in `PATH`.
    pub python: PathBuf,
    /// Which weights.
    pub model: TransformersModel,
    /// Precision.
    pub dtype: TorchDtype,
    /// Device.
    pub device: TorchDevice,
    /// Threads that compute (`torch.set_num_threads`).
    pub threads: usize,
    /// How requests are batched.
    pub batching: TransformersBatching,
    /// The longest sequence, prompt and output; `None` for what the model was made for.
    pub max_model_len: Option<usize>,
    /// Memory for KV in bytes, by the rule of [`NaiveOptions::kv_bytes`](crate::naive::NaiveOptions::kv_bytes) in
    /// this `dtype`; `None` for no limit, which continuous batching cannot have.
    pub kv_bytes: Option<u64>,
    /// Whether to keep a step record a pass; they pile up until taken.
    pub record_steps: bool,
    /// How long loading may take.
    pub start_timeout: Duration,
}

impl TransformersOptions {
    /// `python3`, f32 on the processor with its cores, batches of 8 within 100 ms, ten minutes to load.
    pub fn new(model: TransformersModel) -> Self {
        Self {
            python: "python3".into(),
            model,
            dtype: TorchDtype::Float32,
            device: TorchDevice::Cpu,
            threads: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            batching: TransformersBatching::Static { batch_size: 8, timeout: Duration::from_millis(100) },
            max_model_len: None,
            kv_bytes: None,
            record_steps: true,
            start_timeout: Duration::from_secs(600),
        }
    }
}
