//! What is launched: a kernel, how large, and with what.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::CudaFunction;
use cudarc::driver::sys::CUfunction_attribute as FunctionAttribute;

use super::device_error;
use crate::KernelError;

/// A kernel, ready to launch.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    pub(super) function: CudaFunction,
    /// May start while the kernel before it ends.
    pub(super) overlaps: bool,
    /// Bytes of shared memory that a block may have.
    pub(super) most_shared: u32,
}

impl Kernel {
    /// Allows `bytes` of dynamic shared memory a block, which beyond 48 KB must be asked for.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<(), KernelError> {
        if bytes > self.most_shared {
            return Err(KernelError::Device(format!(
                "{bytes} bytes of shared memory for a block: the card has {}",
                self.most_shared
            )));
        }
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // Several models of a process have this function, and none is to take away what another has asked for.
        static ASKING: Mutex<()> = Mutex::new(());
        let _one = ASKING.lock().unwrap_or_else(PoisonError::into_inner);
        let set = self.function.get_attribute(attribute).and_then(|allowed| match bytes as i32 > allowed {
            true => self.function.set_attribute(attribute, bytes as i32),
            false => Ok(()),
        });
        set.map_err(|e| device_error(&format!("{bytes} bytes of shared memory for a block"), e))
    }
}

/// Size of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) blocks: [u32; 3],
    pub(crate) threads: u32,
    pub(crate) shared_bytes: u32,
}

impl Grid {
    /// `blocks` by `rows` blocks of `threads` threads.
    pub(crate) fn of(blocks: u32, rows: u32, threads: u32) -> Self {
        Self { blocks: [blocks, rows, 1], threads, shared_bytes: 0 }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    /// An address in device memory, or 0.
    Ptr(u64),
    U32(u32),
    U64(u64),
    F32(f32),
}

impl Arg {
    pub(super) fn address(&self) -> *mut c_void {
        match self {
            Self::Ptr(value) | Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
        }
    }
}
