//! The CPU: a thread pool, the instruction sets chosen at run time, and the kernels over them.

mod alloc;
mod gemm;
mod isa;
mod pool;

pub use alloc::{AlignedBuffer, Plain};
pub use gemm::{MatmulScratch, PackedMatrix, matmul};
pub use isa::Isa;
pub use pool::ThreadPool;
