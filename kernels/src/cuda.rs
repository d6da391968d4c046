//! An NVIDIA GPU: kernels in CUDA C++ (`kernels/cuda/`), matrix products of many rows by cuBLASLt.
//!
//! Driver, cuBLASLt and NVRTC are opened when they are first needed, so a program built with this starts on any
//! machine, and [`Device::open`] says in one sentence what is missing.

mod activations;
mod attention;
mod backend;
mod choices;
mod device;
mod gemm;
mod graph;
mod libraries;
mod load;
mod memory;
mod modules;
mod nccl;
mod ops;
mod out_of_memory;
mod sampling;
mod skinny;
mod step;
mod swap;
mod upload;

pub use activations::ActivationDtype;
pub use backend::{CudaBackend, CudaOptions};
pub use device::{Device, DeviceInfo};
pub use graph::Graph;
pub use memory::{CudaBuffer, CudaKvCache, CudaRope, CudaVector, CudaWeight};
pub use nccl::NcclGroup;
pub use sampling::{DeviceSampler, RowChoice, SampleRequest};
pub use step::CudaStep;
pub use swap::CudaKvHost;
