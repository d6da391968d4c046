//! RMSNorm (Zhang & Sennrich 2019).

use super::disjoint::{Disjoint, for_row_ranges};
use super::lanes::{Kernel, Lanes, dispatch};
use super::{Isa, ThreadPool};

/// `out = x / rms(x) * weight`, row by row; a row has as many elements as `weight`.
pub(crate) fn rms_norm(pool: &ThreadPool, isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let cols = weight.len();
    assert!(x.len() == out.len() && x.len().is_multiple_of(cols), "rows of {cols} elements");
    let rows = x.len() / cols;
    let out = Disjoint::new(out);
    for_row_ranges(pool, rows, cols, |range| {
        let (start, len) = (range.start * cols, range.len() * cols);
        // SAFETY: the ranges do not overlap.
        let out = unsafe { out.part(start, len) };
        dispatch(isa, NormRows { x: &x[start..start + len], weight, eps, out });
    });
}

/// `residual += delta`, then `out = rms_norm(residual)`.
pub(crate) fn add_rms_norm(
    pool: &ThreadPool,
    isa: Isa,
    residual: &mut [f32],
    delta: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let cols = weight.len();
    assert!(
        residual.len() == delta.len() && residual.len() == out.len() && out.len().is_multiple_of(cols),
        "rows of {cols} elements"
    );
    let rows = out.len() / cols;
    let (residual, out) = (Disjoint::new(residual), Disjoint::new(out));
    for_row_ranges(pool, rows, cols, |range| {
        let (start, len) = (range.start * cols, range.len() * cols);
        // SAFETY: the ranges do not overlap.
        let (residual, out) = unsafe { (residual.part(start, len), out.part(start, len)) };
        dispatch(isa, AddNormRows { residual, delta: &delta[start..start + len], weight, eps, out });
    });
}

struct NormRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for NormRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            // SAFETY: rows of `cols` elements.
            unsafe { norm_row(l, x.as_ptr(), self.weight, self.eps, out.as_mut_ptr()) };
        }
    }
}

struct AddNormRows<'a> {
    residual: &'a mut [f32],
    delta: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for AddNormRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let cols = self.weight.len();
        let rows = self.residual.chunks_exact_mut(cols).zip(self.delta.chunks_exact(cols));
        for ((residual, delta), out) in rows.zip(self.out.chunks_exact_mut(cols)) {
            for i in (0..cols).step_by(L::N) {
                let n = (cols - i).min(L::N);
                // SAFETY: `n` elements from `i` lie inside the rows.
                unsafe {
                    let sum = l.add(
                        l.load_first(residual.as_ptr().add(i), n),
                        l.load_first(delta.as_ptr().add(i), n),
                    );
                    l.store_first(residual.as_mut_ptr().add(i), n, sum);
                }
            }
            // SAFETY: rows of `cols` elements.
            unsafe { norm_row(l, residual.as_ptr(), self.weight, self.eps, out.as_mut_ptr()) };
        }
    }
}

/// Normalizes one row of `weight.len()` elements; `x` and `out` may be the same.
///
/// # Safety
/// `x` is readable and `out` writable for a row.
#[inline(always)]
pub(super) unsafe fn norm_row<L: Lanes>(l: L, x: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    let cols = weight.len();
    // Four sums hide the latency of the addition; which element goes to which depends on its column alone.
    let mut sums = [l.splat(0.0); 4];
    let whole = cols - cols % (4 * L::N);
    for i in (0..whole).step_by(4 * L::N) {
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `4 N` elements from `i` lie inside the row.
            let v = unsafe { l.load(x.add(i + j * L::N)) };
            *sum = l.fma(v, v, *sum);
        }
    }
    for i in (whole..cols).step_by(L::N) {
        // SAFETY: as many elements from `i` as the row has.
        let v = unsafe { l.load_first(x.add(i), (cols - i).min(L::N)) };
        sums[0] = l.fma(v, v, sums[0]);
    }
    let squares = l.sum(l.add(l.add(sums[0], sums[1]), l.add(sums[2], sums[3])));
    let scale = l.splat(1.0 / (squares / cols as f32 + eps).sqrt());
    for i in (0..cols).step_by(L::N) {
        let n = (cols - i).min(L::N);
        // SAFETY: `n` elements from `i` lie inside the row and the weights.
        unsafe {
            let v = l.mul(l.load_first(x.add(i), n), scale);
            l.store_first(out.add(i), n, l.mul(v, l.load_first(weight.as_ptr().add(i), n)));
        }
    }
}
