//! Passes over the whole vocabulary.

use crate::cpu::Isa;
use crate::cpu::lanes::{Kernel, Lanes, dispatch};

/// Weights summed in single precision before double takes over.
pub(super) const RUN: usize = 1024;

/// Weight of a logit: `e^((logit - greatest) * inverse_temperature)`, zero below `cut`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weighting {
    pub(super) greatest: f32,
    pub(super) inverse_temperature: f32,
    pub(super) cut: f32,
}

/// Makes NaN minus infinity and plus infinity the greatest number, and gives the greatest logit.
pub(super) fn clean(isa: Isa, logits: &mut [f32]) -> f32 {
    dispatch(isa, Clean(logits))
}

/// Sum of the weights.
pub(super) fn total(isa: Isa, logits: &[f32], weighting: Weighting) -> f64 {
    let mut total = 0.0;
    dispatch(isa, Weigh { logits, weighting, weights: &mut [], sum: |sum| total += sum });
    total
}

/// The weights, and the sums of each [`RUN`] of them.
pub(super) fn weigh(
    isa: Isa,
    logits: &[f32],
    weighting: Weighting,
    weights: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) {
    weights.resize(logits.len(), 0.0);
    sums.clear();
    dispatch(isa, Weigh { logits, weighting, weights, sum: |sum| sums.push(sum) });
}

/// Weights of a few logits, in place.
pub(super) fn weigh_in_place(isa: Isa, logits: &mut [f32], weighting: Weighting) {
    dispatch(isa, WeighInPlace { logits, weighting });
}

/// The greatest logit of each block of `block` logits.
pub(super) fn block_greatest(isa: Isa, logits: &[f32], block: usize, out: &mut Vec<f32>) {
    out.clear();
    dispatch(isa, BlockGreatest { logits, block, out });
}

struct Clean<'a>(&'a mut [f32]);

impl Kernel for Clean<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> f32 {
        let (least, most) = (l.splat(f32::NEG_INFINITY), l.splat(f32::MAX));
        let mut greatest = [least; 4];
        let (whole, rest) = self.0.split_at_mut(self.0.len() - self.0.len() % (4 * L::N));
        for logits in whole.chunks_exact_mut(4 * L::N) {
            for (i, greatest) in greatest.iter_mut().enumerate() {
                // SAFETY: the chunk has four vectors.
                unsafe {
                    let p = logits.as_mut_ptr().add(i * L::N);
                    let v = l.min(l.max(l.load(p), least), most);
                    l.store(p, v);
                    *greatest = l.max(v, *greatest);
                }
            }
        }
        let greatest = l.max(l.max(greatest[0], greatest[1]), l.max(greatest[2], greatest[3]));
        let mut greatest = l.greatest(greatest);
        for logit in rest {
            *logit = if *logit > f32::NEG_INFINITY { logit.min(f32::MAX) } else { f32::NEG_INFINITY };
            greatest = greatest.max(*logit);
        }
        greatest
    }
}

/// Weights of a vector of logits; those of the lanes past the last logit are to be ignored.
#[inline(always)]
fn weights<L: Lanes>(l: L, logits: L::V, weighting: Weighting) -> L::V {
    let scale = l.splat(weighting.inverse_temperature * std::f32::consts::LOG2_E);
    l.exp2(l.mul(l.sub(logits, l.splat(weighting.greatest)), scale))
}

struct Weigh<'a, F> {
    logits: &'a [f32],
    weighting: Weighting,
    /// As long as the logits, or empty: not wanted.
    weights: &'a mut [f32],
    sum: F,
}

impl<F: FnMut(f64)> Kernel for Weigh<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let mut buffer = [0.0f32; RUN];
        let keep = !self.weights.is_empty();
        assert!(!keep || self.weights.len() == self.logits.len(), "a weight for every logit");
        for (run, logits) in self.logits.chunks(RUN).enumerate() {
            let out = if keep {
                &mut self.weights[run * RUN..][..logits.len()]
            } else {
                &mut buffer[..logits.len()]
            };
            (self.sum)(weigh_run(l, logits, self.weighting, out));
        }
    }
}

#[inline(always)]
fn weigh_run<L: Lanes>(l: L, logits: &[f32], weighting: Weighting, out: &mut [f32]) -> f64 {
    for i in (0..logits.len()).step_by(L::N) {
        let n = (logits.len() - i).min(L::N);
        // SAFETY: `n` elements from `i` lie inside both slices, which are of one length.
        unsafe {
            l.store_first(
                out.as_mut_ptr().add(i),
                n,
                weights(l, l.load_first(logits.as_ptr().add(i), n), weighting),
            )
        };
    }
    if weighting.cut > f32::NEG_INFINITY {
        for (weight, logit) in out.iter_mut().zip(logits) {
            *weight = if *logit < weighting.cut { 0.0 } else { *weight };
        }
    }
    let mut sum = l.splat(0.0);
    for i in (0..out.len()).step_by(L::N) {
        // SAFETY: as many elements from `i` as there are.
        sum = l.add(sum, unsafe { l.load_first(out.as_ptr().add(i), (out.len() - i).min(L::N)) });
    }
    f64::from(l.sum(sum))
}

struct WeighInPlace<'a> {
    logits: &'a mut [f32],
    weighting: Weighting,
}

impl Kernel for WeighInPlace<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for logits in self.logits.chunks_mut(L::N) {
            let (p, n) = (logits.as_mut_ptr(), logits.len());
            // SAFETY: the chunk's own elements.
            unsafe { l.store_first(p, n, weights(l, l.load_first(p, n), self.weighting)) };
        }
    }
}

struct BlockGreatest<'a> {
    logits: &'a [f32],
    block: usize,
    out: &'a mut Vec<f32>,
}

impl Kernel for BlockGreatest<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for block in self.logits.chunks(self.block) {
            let mut greatest = l.splat(f32::NEG_INFINITY);
            let whole = block.len() - block.len() % L::N;
            for i in (0..whole).step_by(L::N) {
                // SAFETY: `N` elements from `i` lie inside the block.
                greatest = l.max(unsafe { l.load(block.as_ptr().add(i)) }, greatest);
            }
            self.out.push(block[whole..].iter().copied().fold(l.greatest(greatest), f32::max));
        }
    }
}
