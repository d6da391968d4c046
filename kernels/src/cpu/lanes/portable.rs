//! Plain Rust over arrays, which the compiler vectorizes with what the target's base has (SSE2, NEON).

use super::{EXP2, Lanes, MAX_LANES};

const N: usize = 8;

/// Eight lanes in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; N];

#[inline(always)]
fn map(a: V, f: impl Fn(f32) -> f32) -> V {
    let mut out = a;
    for x in &mut out {
        *x = f(*x);
    }
    out
}

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    let mut out = a;
    for i in 0..N {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Lanes for Portable {
    const N: usize = N;
    const SCORE_QUERIES: usize = 2;
    const VALUE_QUERIES: usize = 2;
    const VALUE_UNITS: usize = 1;
    const PAIR_WORDS: usize = 2;
    type V = V;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; N]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller's `N` elements.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_first(self, p: *const f32, n: usize) -> V {
        let mut v = [0.0; N];
        // SAFETY: the caller's `n` elements.
        v[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(p, n) });
        v
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller's `N` elements.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, n: usize, v: V) {
        // SAFETY: the caller's `n` elements.
        unsafe { std::slice::from_raw_parts_mut(p, n) }.copy_from_slice(&v[..n]);
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // Unfused: without the instruction `mul_add` is a call.
        zip(zip(a, b, |a, b| a * b), c, |ab, c| ab + c)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn exp2(self, v: V) -> V {
        /// Adding this to a number of moderate size rounds it to a whole one.
        const ROUND: f32 = 12_582_912.0;
        // The bound comes first, so that NaN passes. At -127 the power's bits are those of zero, at 128 those of
        // infinity.
        let v = self.min([128.0; N], self.max([-127.0; N], v));
        map(v, |x| {
            let whole = (x + ROUND) - ROUND;
            let f = x - whole;
            let mut p = EXP2[0];
            for c in &EXP2[1..] {
                p = p * f + c;
            }
            let power = f32::from_bits(((whole + 127.0) as i32 as u32) << 23);
            let r = (p * f + 1.0) * power;
            if x < -126.0 { 0.0 } else { r }
        })
    }
    #[inline(always)]
    fn sum(self, v: V) -> f32 {
        let four = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
        (four[0] + four[2]) + (four[1] + four[3])
    }
    #[inline(always)]
    fn greatest(self, v: V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    fn even(self, units: V) -> V {
        map(units, |u| f32::from_bits(u.to_bits() << 16))
    }
    #[inline(always)]
    fn odd(self, units: V) -> V {
        map(units, |u| f32::from_bits(u.to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    fn interleave(self, even: V, odd: V) -> (V, V) {
        let (mut low, mut high) = (even, even);
        for i in 0..N / 2 {
            (low[2 * i], low[2 * i + 1]) = (even[i], odd[i]);
            (high[2 * i], high[2 * i + 1]) = (even[N / 2 + i], odd[N / 2 + i]);
        }
        (low, high)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, n: usize, v: V) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller's `n` elements.
            unsafe { p.add(i).write(half::bf16::from_f32(x).to_bits()) };
        }
    }
    #[inline(always)]
    unsafe fn pack_pairs(self, src: *const f32, n: usize, scale: f32, dst: *mut f32) {
        for i in 0..n {
            // SAFETY: the caller's `n` elements on both sides.
            unsafe { dst.add(i).write(src.add(i).read() * scale) };
        }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, acc: V, units: V, query: *const f32) -> V {
        // SAFETY: the caller's two words.
        let (even, odd) = unsafe { (query.read(), query.add(1).read()) };
        let acc = self.fma(self.even(units), [even; N], acc);
        self.fma(self.odd(units), [odd; N], acc)
    }
    #[inline(always)]
    unsafe fn transpose(self, rows: &[*const f32; MAX_LANES], n: usize, dst: *mut f32) {
        for (i, row) in rows.iter().enumerate().take(N) {
            for word in 0..n {
                // SAFETY: the caller's `n` words of each row and `n * N` words at `dst`.
                unsafe { dst.add(word * N + i).write(row.add(word).read()) };
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, _p: *const f32) {}
}
