//! Plain float64 versions of the kernels, written for reading: what tests compare with.

mod activation;
mod attention;
mod matmul;
mod norm;
mod rope;
mod sampling;

pub use activation::silu_mul;
pub use attention::attention;
pub use matmul::matmul;
pub use norm::rms_norm;
pub use rope::rope;
pub use sampling::distribution;
