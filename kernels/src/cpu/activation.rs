//! SwiGLU (Shazeer 2020).

use super::disjoint::{Disjoint, for_row_ranges};
use super::lanes::{Kernel, Lanes, dispatch};
use super::{Isa, ThreadPool};

/// `out = silu(gate) * up` with rows of `n` gates, then `n` ups.
pub(crate) fn silu_mul(pool: &ThreadPool, isa: Isa, gate_up: &[f32], n: usize, out: &mut [f32]) {
    assert!(
        n > 0 && out.len().is_multiple_of(n) && gate_up.len() == 2 * out.len(),
        "rows of {n} and 2 x {n}"
    );
    let rows = out.len() / n;
    let out = Disjoint::new(out);
    for_row_ranges(pool, rows, n, |range| {
        // SAFETY: the ranges do not overlap.
        let out = unsafe { out.part(range.start * n, range.len() * n) };
        dispatch(isa, SiluMul { gate_up: &gate_up[2 * range.start * n..2 * range.end * n], n, out });
    });
}

struct SiluMul<'a> {
    gate_up: &'a [f32],
    n: usize,
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let one = l.splat(1.0);
        let minus_log2_e = l.splat(-std::f32::consts::LOG2_E);
        for (row, out) in self.gate_up.chunks_exact(2 * self.n).zip(self.out.chunks_exact_mut(self.n)) {
            let (gate, up) = row.split_at(self.n);
            for i in (0..self.n).step_by(L::N) {
                let count = (self.n - i).min(L::N);
                // SAFETY: `count` elements from `i` lie inside the three rows.
                unsafe {
                    let g = l.load_first(gate.as_ptr().add(i), count);
                    let u = l.load_first(up.as_ptr().add(i), count);
                    let denominator = l.add(one, l.exp2(l.mul(g, minus_log2_e)));
                    l.store_first(out.as_mut_ptr().add(i), count, l.mul(l.div(g, denominator), u));
                }
            }
        }
    }
}
