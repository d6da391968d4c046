//! The models: the Llama family, written once over `quire_kernels::Backend`.

mod config;
mod dtype;
mod llama;
mod rope;
mod weights;

pub use config::{Architecture, ModelConfig};
pub use dtype::WeightDtype;
pub(crate) use dtype::{convert, encode_rows};
pub use llama::{LlamaModel, LoadOptions};
pub use rope::{Rope, RopeScaling};
pub use weights::{HostMatrix, LayerWeight, WeightRole, WeightSource};
