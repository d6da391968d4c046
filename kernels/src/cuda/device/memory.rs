//! Memory that is freed with its owner: the device's, and pinned memory of the host.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result};

use super::captures::Captures;

/// Device memory of `len` elements.
pub(crate) struct DeviceVec<T> {
    context: Arc<CudaContext>,
    captures: Captures,
    ptr: u64,
    len: usize,
    element: PhantomData<T>,
}

impl<T> DeviceVec<T> {
    /// Owns what was allocated at `ptr`; nothing, where that is 0.
    pub(super) fn new(context: Arc<CudaContext>, captures: Captures, ptr: u64, len: usize) -> Self {
        Self { context, captures, ptr, len, element: PhantomData }
    }
    /// Its address.
    pub(crate) fn ptr(&self) -> u64 {
        self.ptr
    }
    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    /// Address of element `index`.
    pub(crate) fn at(&self, index: usize) -> u64 {
        assert!(index <= self.len, "element {index} of {}", self.len);
        self.ptr + (index * size_of::<T>()) as u64
    }
}

/// Makes a context the thread's. An error may be one that was kept from an earlier call, and is then told once.
fn bind(context: &CudaContext) -> bool {
    context.bind_to_thread().or_else(|_| context.bind_to_thread()).is_ok()
}

impl<T> Drop for DeviceVec<T> {
    fn drop(&mut self) {
        if self.ptr != 0 && bind(&self.context) {
            let _held_off = self.captures.hold_off();
            // SAFETY: allocated by `Device::alloc` and freed once; the driver waits for work that uses it.
            let _ = unsafe { result::free_sync(self.ptr) };
        }
    }
}

impl<T> std::fmt::Debug for DeviceVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceVec").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Pinned host memory, which the device reads without a copy in between.
pub(crate) struct Pinned<T> {
    context: Arc<CudaContext>,
    captures: Captures,
    ptr: *mut T,
    len: usize,
}

// SAFETY: owned memory, like a box.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: Copy> Pinned<T> {
    /// Owns what was allocated at `ptr`, all of whose `len` elements are values.
    pub(super) fn new(context: Arc<CudaContext>, captures: Captures, ptr: *mut T, len: usize) -> Self {
        Self { context, captures, ptr, len }
    }
    /// Elements.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
    /// Its address, which is the same for the host and for the device.
    pub(crate) fn address(&self) -> u64 {
        self.ptr as u64
    }
    /// The memory.
    pub(crate) fn values(&self) -> &[T] {
        // SAFETY: `len` initialized elements, owned.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
    /// The memory, to write.
    pub(crate) fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        if bind(&self.context) {
            let _held_off = self.captures.hold_off();
            // SAFETY: allocated by `Device::pinned` and freed once.
            let _ = unsafe { result::free_host(self.ptr.cast()) };
        }
    }
}

impl<T> std::fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("len", &self.len).finish_non_exhaustive()
    }
}
