//! The kernel for integer weights.

#![allow(clippy::needless_range_loop)] // Plain counted loops unroll; the accumulators stay in registers.

use super::simd::Simd;
use super::tile::{Kernel, TileArgs, load_step, prefetch_out, store};

/// Unsigned weights of `BITS` bits in groups of `GROUP`, with a minimum for each group or (`MIN` false) one offset.
///
/// For each group and output, with `a` the activations' 8-bit values and `s` their scale:
/// `out += scale * s * (sum u a - offset sum a)`, or `out += scale * s * sum u a + min * s sum a`.
/// 4-bit weights lie two to a byte: the low nibbles are the first half of a group, the high ones the second.
pub(super) struct Int<const BITS: usize, const GROUP: usize, const MIN: bool>;

impl<const BITS: usize, const GROUP: usize, const MIN: bool> Kernel for Int<BITS, GROUP, MIN> {
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const P: usize>(args: &TileArgs) {
        let loads = if BITS == 4 { GROUP / 8 } else { GROUP / 4 };
        let metas = if MIN { 2 } else { 1 };
        // SAFETY: the panels hold `cols / GROUP` groups of `metas` vectors of 16 f16 and `loads` of 64 bytes; the
        // activations hold GROUP bytes, a scale and a sum for each group and row.
        unsafe {
            prefetch_out::<S, R, P>(args);
            let mut acc = [[S::zero(); P]; R];
            for g in 0..args.cols / GROUP {
                let mut ints = [[S::splat_int(0); P]; R];
                if !MIN {
                    for r in 0..R {
                        ints[r] = [S::splat_int(*args.sums.add(g * R + r) as i32); P];
                    }
                }
                let acts = args.acts.add(g * GROUP * R).cast::<i32>();
                for j in 0..loads {
                    let bytes = load_step::<S, P>(args, g * loads + j);
                    if BITS == 4 {
                        let (mut low, mut high) = (bytes, bytes);
                        for p in 0..P {
                            low[p] = S::low_nibbles(bytes[p]);
                            high[p] = S::high_nibbles(bytes[p]);
                        }
                        step::<S, R, P, BITS>(&mut ints, &low, acts.add(j * R));
                        step::<S, R, P, BITS>(&mut ints, &high, acts.add((j + loads) * R));
                    } else {
                        step::<S, R, P, BITS>(&mut ints, &bytes, acts.add(j * R));
                    }
                }
                for p in 0..P {
                    let meta = args.panels[p].add(g * metas * 32);
                    let scale = S::load_f16(meta);
                    for r in 0..R {
                        let product = S::mul(S::to_float(ints[r][p]), scale);
                        acc[r][p] = S::fma(product, S::splat(*args.scales.add(g * R + r)), acc[r][p]);
                    }
                    if MIN {
                        let min = S::load_f16(meta.add(32));
                        for r in 0..R {
                            let sum = f32::from_bits(*args.sums.add(g * R + r));
                            acc[r][p] = S::fma(min, S::splat(sum), acc[r][p]);
                        }
                    }
                }
            }
            store::<S, R, P>(args, &acc);
        }
    }
}

/// Four elements of `k`.
///
/// # Safety
/// The machine has the instruction set; `acts` holds R elements.
#[inline(always)]
unsafe fn step<S: Simd, const R: usize, const P: usize, const BITS: usize>(
    ints: &mut [[S::I; P]; R],
    weights: &[S::B; P],
    acts: *const i32,
) {
    for r in 0..R {
        // SAFETY: as the caller promises.
        unsafe {
            let act = S::splat_int(acts.add(r).read_unaligned());
            for p in 0..P {
                ints[r][p] = if BITS == 8 {
                    S::dot(ints[r][p], weights[p], act)
                } else {
                    S::dot_small(ints[r][p], weights[p], act)
                };
            }
        }
    }
}
