//! Matrix products with packed weights: `out = x * w^T + bias`.
//!
//! **Packing.** A matrix is cut into panels of 16 outputs. Inside a panel the outputs are interleaved, so that each
//! lane of a vector belongs to one output and an activation is broadcast to all of them: no sum over lanes, and the
//! weights are read once, front to back. Integer formats become unsigned values with one scale a group:
//! `w = scale * (u - offset)`, or `w = scale * u + min`, so that one kernel serves all formats of a width.
//!
//! **Activations** are copied into tiles of the rows that a kernel computes together, and for integer formats
//! quantized to 8 bits with one scale for each row and group of weights. The product of a group is exact in 32-bit
//! integers; groups are added in f32.
//!
//! **One order.** Each output is one chain of additions over the whole of `k`, in order, whatever the tile it is
//! computed in. `k` is never split. A row's result is therefore the same, to the bit, for any number of rows
//! computed with it and any number of threads. (It does differ between instruction sets.)
//!
//! The kernels are written once, over [`simd::Simd`], in `float.rs` and `int.rs`.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod float;
mod int;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod portable;
mod product;
mod simd;
mod tile;

pub use packed::PackedMatrix;
pub use product::{MatmulScratch, matmul};
