//! Models and their files: against candle, against golden logits, and against hostile bytes.

mod beams;
mod executor;
mod families;
mod gguf;
mod gguf_tokenizer;
mod golden;
mod hostile;
mod mechanisms;
mod random_model;
mod soak;
mod speculation;
mod tensor_parallel;
