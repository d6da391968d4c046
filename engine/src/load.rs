//! Loading models: Hugging Face folders and GGUF files, memory-mapped, and `dummy:` shapes.
//!
//! Files are hostile until checked: every number read from one is compared with the file's size before anything is
//! allocated or indexed by it, and an error names the file, the tensor or key, and the byte where that helps.

mod gguf;
mod gguf_config;
mod gguf_metadata;
mod gguf_tokenizer;
mod gguf_weights;
mod hf_config;
mod hf_folder;
mod mapped;
mod safetensors;
mod source;
mod write;

pub use gguf::{GgufHeader, GgufTensor};
pub use gguf_config::config_from_gguf;
pub use gguf_metadata::{GgufArray, GgufValue};
pub use gguf_tokenizer::tokenizer_from_gguf;
pub use gguf_weights::GgufWeights;
pub use hf_config::config_from_json;
pub use hf_folder::HfFolder;
pub(crate) use mapped::read_small;
pub use safetensors::{SafetensorsHeader, SafetensorsTensor};
pub use source::{Checkpoint, ModelSource};
pub use write::{config_to_json, write_dummy};
