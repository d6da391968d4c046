//! A mutable slice whose parts are handed to the tasks of one parallel region.

use std::marker::PhantomData;

use super::ThreadPool;

/// A mutable slice that several threads write, each its own part.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` split among threads; `part` demands that the parts do not overlap.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), lifetime: PhantomData }
    }

    /// Elements `start .. start + len`.
    ///
    /// # Panics
    /// When they are not all inside.
    ///
    /// # Safety
    /// No two parts alive at a time overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the slice is split, and the caller keeps the parts apart")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        let end = start.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "{len} at {start} of {}", self.len);
        // SAFETY: inside the slice, and the caller keeps the parts apart.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// Elements below which a parallel region costs more than it saves.
const PARALLEL_ELEMENTS: usize = 32 << 10;

/// Runs `body` over ranges that cover `0..rows`, in parallel when `rows * cols` elements are worth it.
pub(crate) fn for_row_ranges(
    pool: &ThreadPool,
    rows: usize,
    cols: usize,
    body: impl Fn(std::ops::Range<usize>) + Sync,
) {
    if rows * cols < PARALLEL_ELEMENTS || pool.threads() == 1 || rows < 2 {
        return body(0..rows);
    }
    let tasks = rows.min(4 * pool.threads());
    pool.run(tasks, |task| body(rows * task / tasks..rows * (task + 1) / tasks));
}
