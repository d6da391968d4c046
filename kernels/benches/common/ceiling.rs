//! What this machine can do at most, measured: the ceilings that the benches print their shares of.
//!
//! Each figure is the best of several short runs on all threads of the pool: reading a buffer far larger than any
//! cache, and loops of independent multiply-adds that touch no memory.

use quire_kernels::cpu::{AlignedBuffer, Isa, ThreadPool};
use std::hint::black_box;
use std::time::Instant;

/// Bytes of the buffer read for the bandwidth: eight times a 32 MiB cache.
const READ_BYTES: usize = 256 << 20;
/// Words of 8 bytes that a task reads.
const READ_CHUNK: usize = (1 << 20) / 8;
/// Independent accumulators: enough to hide the latency of any multiply-add, few enough for the registers.
const CHAINS: usize = 12;
const ROUNDS: usize = 1 << 17;
const REPEATS: usize = 25;

/// The machine's ceilings, all threads together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ceiling {
    /// Reading memory, in GB/s.
    pub(crate) read_gbs: f64,
    /// f32 multiply-adds, in GFLOP/s (two operations each).
    pub(crate) f32_gflops: f64,
    /// `vdpbf16ps`, in GFLOP/s, where there is one.
    pub(crate) bf16_gflops: Option<f64>,
    /// `vpdpbusd`, in Gop/s, where there is one.
    pub(crate) i8_gops: Option<f64>,
}

impl Ceiling {
    /// Measures, in about a second.
    pub(crate) fn measure(pool: &ThreadPool) -> Self {
        let mut ceiling =
            Self { read_gbs: read_bandwidth(pool), f32_gflops: 0.0, bf16_gflops: None, i8_gops: None };
        match Isa::detect() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                // SAFETY: the instruction set was detected.
                ceiling.f32_gflops = rate(pool, 2 * 16, || unsafe { x86::fma512() });
                // SAFETY: as above.
                ceiling.bf16_gflops = Some(rate(pool, 2 * 32, || unsafe { x86::dpbf16() }));
                // SAFETY: as above.
                ceiling.i8_gops = Some(rate(pool, 2 * 64, || unsafe { x86::dpbusd() }));
            }
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instruction set was detected.
            Isa::Avx2 => ceiling.f32_gflops = rate(pool, 2 * 8, || unsafe { x86::fma256() }),
            _ => ceiling.f32_gflops = rate(pool, 2 * 8, portable_fma),
        }
        ceiling
    }
}

impl std::fmt::Display for Ceiling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ceilings: read {:.1} GB/s, f32 {:.0} GFLOP/s", self.read_gbs, self.f32_gflops)?;
        if let Some(bf16) = self.bf16_gflops {
            write!(f, ", bf16 {bf16:.0} GFLOP/s")?;
        }
        if let Some(i8) = self.i8_gops {
            write!(f, ", int8 {i8:.0} Gop/s")?;
        }
        Ok(())
    }
}

/// The shortest of `REPEATS` runs, in seconds.
fn shortest(mut run: impl FnMut()) -> f64 {
    let times = (0..REPEATS).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

fn read_bandwidth(pool: &ThreadPool) -> f64 {
    let buffer = AlignedBuffer::<u64>::zeroed(READ_BYTES / 8, "the bandwidth measurement").expect("256 MiB");
    let seconds = shortest(|| {
        pool.run(buffer.len() / READ_CHUNK, |chunk| {
            black_box(sum(&buffer[chunk * READ_CHUNK..][..READ_CHUNK]));
        });
    });
    READ_BYTES as f64 / seconds / 1e9
}

/// Reads `words` as four streams, each asking for what comes next: one core cannot have enough lines under way
/// otherwise.
fn sum(words: &[u64]) -> u64 {
    const LINE: usize = 8;
    const AHEAD: usize = 512;
    let quarter = words.len() / 4;
    let mut sums = [[0u64; LINE]; 4];
    for at in (0..quarter).step_by(LINE) {
        for (stream, sums) in sums.iter_mut().enumerate() {
            let line = &words[stream * quarter + at..][..LINE];
            prefetch(line.as_ptr().wrapping_add(AHEAD));
            for (s, &w) in sums.iter_mut().zip(line) {
                *s = s.wrapping_add(w);
            }
        }
    }
    sums.as_flattened().iter().fold(0, |a, &b| a.wrapping_add(b))
}

fn prefetch(at: *const u64) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching reads nothing, so any address will do.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Gop/s of `chains`, of which every call does `ROUNDS * CHAINS` instructions of `ops` operations.
fn rate(pool: &ThreadPool, ops: usize, chains: impl Fn() + Sync) -> f64 {
    let threads = pool.threads();
    let tasks = threads * 4;
    let seconds = shortest(|| pool.run(tasks, |_| chains()));
    (tasks * ROUNDS * CHAINS * ops) as f64 / seconds / 1e9
}

fn portable_fma() {
    let (a, b) = black_box((0.999f32, 0.001f32));
    let mut acc = [[1.0f32; 8]; CHAINS];
    for _ in 0..ROUNDS {
        for lane in acc.as_flattened_mut() {
            *lane = *lane * a + b;
        }
    }
    black_box(acc);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHAINS, ROUNDS, black_box};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fma256() {
        let (a, b) = black_box((_mm256_set1_ps(0.999), _mm256_set1_ps(0.001)));
        let mut acc = black_box([_mm256_set1_ps(1.0); CHAINS]);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fma512() {
        let (a, b) = black_box((_mm512_set1_ps(0.999), _mm512_set1_ps(0.001)));
        let mut acc = black_box([_mm512_set1_ps(1.0); CHAINS]);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dpbf16() {
        let pairs = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.001), _mm512_set1_ps(0.001));
        let pairs = black_box(pairs);
        let mut acc = black_box([_mm512_set1_ps(1.0); CHAINS]);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, pairs, pairs);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dpbusd() {
        let bytes = black_box(_mm512_set1_epi8(1));
        let mut acc = black_box([_mm512_setzero_si512(); CHAINS]);
        for _ in 0..ROUNDS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, bytes, bytes);
            }
        }
        black_box(acc);
    }
}
