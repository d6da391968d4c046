//! The CPU: a thread pool, the instruction sets chosen at run time, and the kernels over them.

mod activation;
mod all_reduce;
mod alloc;
mod attention;
mod backend;
mod disjoint;
mod embed;
mod gemm;
mod isa;
pub(crate) mod lanes;
mod norm;
mod pool;
mod rope;

pub use all_reduce::CpuGroup;
pub use alloc::{AlignedBuffer, Plain};
pub use backend::{Buffer, CpuBackend, CpuOptions, KvCache, Vector, Weight};
pub use gemm::{MatmulScratch, PackedMatrix, matmul};
pub use isa::Isa;
pub use pool::ThreadPool;
pub use rope::RopeTable;
