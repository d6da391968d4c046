//! Buffers aligned for vector loads, on huge pages where they are large.

use crate::KernelError;
use std::alloc::{Layout, alloc, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A cache line, and the widest vector.
const LINE: usize = 64;
/// A huge page on x86-64 and most of 64-bit Arm.
const HUGE_PAGE: usize = 2 << 20;

mod sealed {
    pub trait Sealed {}
}

/// Element types of an [`AlignedBuffer`]: plain numbers, for which all-zero bytes are a value.
pub trait Plain: sealed::Sealed + Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($t:ty),*) => { $(impl sealed::Sealed for $t {} impl Plain for $t {})* };
}
plain!(u8, i8, u16, i32, u32, u64, f32, half::f16, half::bf16);

/// A slice of `T` of fixed length, aligned to 64 bytes. From 2 MiB on it is aligned to huge pages and the system is
/// asked to use them: a weight matrix read front to back then costs a 512th of the address translations.
pub struct AlignedBuffer<T: Plain> {
    start: NonNull<T>,
    len: usize,
    layout: Layout,
}

// SAFETY: the buffer owns its memory, as a Vec does, and T is Send.
unsafe impl<T: Plain> Send for AlignedBuffer<T> {}
// SAFETY: shared access only reads, and T is Sync.
unsafe impl<T: Plain> Sync for AlignedBuffer<T> {}

impl<T: Plain> AlignedBuffer<T> {
    /// `len` zeros. `what` names the buffer in the error.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] when the memory cannot be had.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<T>());
        let out_of_memory = || KernelError::OutOfMemory { what, bytes };
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        // At least one line, so that the layout is never of size zero.
        let layout = Layout::from_size_align(bytes.max(LINE), align).map_err(|_| out_of_memory())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or_else(out_of_memory)?;
        if align == HUGE_PAGE {
            advise_huge_pages(start, layout.size());
        }
        // SAFETY: the allocation is `layout.size()` bytes long. Zeroing follows the advice, so that the pages are
        // huge when they are first touched.
        unsafe { start.as_ptr().write_bytes(0, layout.size()) };
        Ok(Self { start: start.cast(), len, layout })
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(start: NonNull<u8>, bytes: usize) {
    // SAFETY: the range is one allocation of ours and the advice does not change its contents. A kernel without
    // huge pages refuses, which loses nothing.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_: NonNull<u8>, _: usize) {}

impl<T: Plain> Drop for AlignedBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) };
    }
}

impl<T: Plain> Deref for AlignedBuffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated and are initialized.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for AlignedBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> std::fmt::Debug for AlignedBuffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuffer<{}>[{}]", std::any::type_name::<T>(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 63, 4096, (HUGE_PAGE >> 2) + 5] {
            let buffer = AlignedBuffer::<f32>::zeroed(len, "a test").expect("small");
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % LINE, 0);
            assert!(buffer.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn absurd_sizes_are_errors() {
        for len in [usize::MAX, usize::MAX / 8, 1 << 50] {
            let error = AlignedBuffer::<f32>::zeroed(len, "a test").expect_err("too large");
            assert!(error.to_string().contains("a test"));
        }
    }
}
