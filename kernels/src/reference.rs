//! Plain float64 versions of the kernels, written for reading: what tests compare with.

mod matmul;

pub use matmul::matmul;
