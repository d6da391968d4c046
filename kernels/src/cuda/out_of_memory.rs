//! What to do where a GPU's memory is full: the driver says only that it is.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

/// Advice where little or nothing of this program's is on the GPU yet, so that others fill it.
pub(super) const OTHERS: &str = ": the GPU's memory is full: end other programs on it, or choose another GPU by \
                                 CUDA_VISIBLE_DEVICES";

/// Advice where this program's KV memory may be what fills it.
pub(super) const OTHERS_OR_KV: &str = ": the GPU's memory is full: give the KV cache less, end other programs on the GPU, or \
                                       choose another by CUDA_VISIBLE_DEVICES";

/// An error that may say that the GPU's memory is full.
pub(super) trait OutOfMemory {
    /// Whether it says so.
    fn is_out_of_memory(&self) -> bool;
}

impl OutOfMemory for DriverError {
    fn is_out_of_memory(&self) -> bool {
        self.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
    }
}

impl OutOfMemory for CublasError {
    fn is_out_of_memory(&self) -> bool {
        self.0 == cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED
    }
}

/// `advice`, to be written after the error, where it is that memory is full; nothing else.
pub(super) fn if_full(error: &impl OutOfMemory, advice: &'static str) -> &'static str {
    if error.is_out_of_memory() { advice } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_for_full_memory_alone() {
        let driver = |code| if_full(&DriverError(code), OTHERS);
        assert_eq!(driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY), OTHERS);
        for other in
            [CUresult::CUDA_ERROR_INVALID_VALUE, CUresult::CUDA_ERROR_NO_DEVICE, CUresult::CUDA_ERROR_UNKNOWN]
        {
            assert_eq!(driver(other), "", "{other:?}");
        }
        let cublas = |code| if_full(&CublasError(code), OTHERS_OR_KV);
        assert_eq!(cublas(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED), OTHERS_OR_KV);
        assert_eq!(cublas(cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED), "");
        for advice in [OTHERS, OTHERS_OR_KV] {
            assert!(advice.contains("CUDA_VISIBLE_DEVICES") && !advice.contains("  "), "{advice}");
        }
    }
}
