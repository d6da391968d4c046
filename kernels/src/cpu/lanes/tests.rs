use super::{Kernel, Lanes, MAX_LANES, dispatch};
use crate::cpu::Isa;

/// Runs `body` on every instruction set of this machine.
fn every_isa(body: impl Fn(Isa)) {
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512] {
        if isa.is_available() {
            body(isa);
        }
    }
}

struct Exp2<'a>(&'a mut [f32]);

impl Kernel for Exp2<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for chunk in self.0.chunks_mut(L::N) {
            // SAFETY: the chunk's own elements.
            unsafe {
                let v = l.exp2(l.load_first(chunk.as_ptr(), chunk.len()));
                l.store_first(chunk.as_mut_ptr(), chunk.len(), v);
            }
        }
    }
}

#[test]
fn exp2_is_close_to_float64() {
    every_isa(|isa| {
        let x: Vec<f32> = (0..200_003).map(|i| -126.0 + 253.0 * i as f32 / 200_003.0).collect();
        let mut y = x.clone();
        dispatch(isa, Exp2(&mut y));
        for (x, y) in x.iter().zip(&y) {
            let exact = f64::from(*x).exp2();
            assert!(((f64::from(*y) - exact) / exact).abs() < 2.5e-7, "{isa:?}: 2^{x} is {exact}, not {y}");
        }
    });
}

#[test]
fn exp2_at_the_edges() {
    every_isa(|isa| {
        let mut y = [f32::NEG_INFINITY, -1e30, -130.0, -0.0, 0.0, 1.0, 1e30, f32::INFINITY, f32::NAN];
        dispatch(isa, Exp2(&mut y));
        assert_eq!(y[..8], [0.0, 0.0, 0.0, 1.0, 1.0, 2.0, f32::INFINITY, f32::INFINITY], "{isa:?}");
        assert!(y[8].is_nan(), "{isa:?}");
    });
}

struct Transpose<'a>(&'a [f32], usize, &'a mut [f32]);

impl Kernel for Transpose<'_> {
    type Output = usize;
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> usize {
        let mut rows = [self.0.as_ptr(); MAX_LANES];
        for (i, row) in rows.iter_mut().enumerate().take(L::N) {
            *row = self.0[i * self.1..].as_ptr();
        }
        assert!(self.2.len() >= self.1 * L::N);
        // SAFETY: `rows` hold `self.1` words each, and the output was just checked.
        unsafe { l.transpose(&rows, self.1, self.2.as_mut_ptr()) };
        L::N
    }
}

#[test]
fn transpose_moves_every_word() {
    every_isa(|isa| {
        for n in 1..=8 {
            let n = if isa == Isa::Avx512 { 2 * n } else { n };
            let source: Vec<f32> = (0..n * MAX_LANES).map(|i| i as f32).collect();
            let mut out = vec![f32::NAN; n * MAX_LANES];
            let lanes = dispatch(isa, Transpose(&source, n, &mut out));
            for word in 0..n {
                for row in 0..lanes {
                    assert_eq!(out[word * lanes + row], source[row * n + word], "{isa:?}, {n} words");
                }
            }
        }
    });
}

struct Pairs<'a>(&'a [u32], &'a mut [f32]);

impl Kernel for Pairs<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        for (units, out) in self.0.chunks_exact(L::N).zip(self.1.chunks_exact_mut(2 * L::N)) {
            // SAFETY: whole chunks of `N` units and `2 N` elements.
            unsafe {
                let v = l.load(units.as_ptr().cast());
                let (low, high) = l.interleave(l.even(v), l.odd(v));
                l.store(out.as_mut_ptr(), low);
                l.store(out.as_mut_ptr().add(L::N), high);
            }
        }
    }
}

#[test]
fn even_and_odd_interleave_back() {
    every_isa(|isa| {
        let elements: Vec<half::bf16> = (0..96).map(|i| half::bf16::from_f32(i as f32 - 40.0)).collect();
        let units: Vec<u32> = elements
            .chunks_exact(2)
            .map(|p| u32::from(p[0].to_bits()) | u32::from(p[1].to_bits()) << 16)
            .collect();
        let mut out = vec![f32::NAN; 96];
        dispatch(isa, Pairs(&units, &mut out));
        for (e, o) in elements.iter().zip(&out) {
            assert_eq!(e.to_f32(), *o, "{isa:?}");
        }
    });
}
