//! One test body for every device: each instruction set of the CPU and, with the feature `gpu-tests`, the GPU
//! (`scripts/gpu-check`), computing in bfloat16 and in float16, as fast as it can and batch-invariant. Inputs are numbers
//! that both types hold, so that no device rounds them, and no two calls see the same ones; results are compared with
//! float64 within what the device's own precision allows.

mod attention;
mod model;
mod operations;
mod sampling;
mod swap;

use std::num::NonZeroUsize;

use quire_kernels::cpu::{CpuBackend, CpuOptions, Isa};
#[cfg(feature = "gpu-tests")]
use quire_kernels::cuda::{ActivationDtype, CudaBackend, CudaOptions};
use quire_kernels::{Backend, HeadShape, KvDtype, WeightFormat, quant};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A device under test.
pub(crate) struct Device<B> {
    pub(crate) backend: B,
    pub(crate) name: String,
    /// Relative error of a result that is rounded to what the device holds.
    pub(crate) rounding: f64,
    /// The greatest number that it holds.
    pub(crate) most: f32,
    /// Weights that it takes as they lie.
    pub(crate) weights: WeightFormat,
    /// What its KV cache holds.
    pub(crate) kv: KvDtype,
}

pub(crate) fn cpu(isa: Isa) -> Device<CpuBackend> {
    let options = CpuOptions { threads: NonZeroUsize::new(2), isa: Some(isa) };
    let backend = CpuBackend::new(options).expect("an available instruction set");
    Device {
        backend,
        name: format!("{isa:?}"),
        rounding: 2e-6,
        most: f32::MAX,
        weights: WeightFormat::Bf16,
        kv: KvDtype::Bf16,
    }
}

/// The GPU, with steps of up to 4,096 rows of 64 sequences of up to 8,192 tokens.
#[cfg(feature = "gpu-tests")]
pub(crate) fn gpu(
    heads: HeadShape,
    activations: ActivationDtype,
    kv: KvDtype,
    batch_invariant: bool,
) -> Device<CudaBackend> {
    let options = CudaOptions {
        device: 0,
        activations,
        heads,
        kv_dtype: kv,
        max_rows: 4096,
        max_sequences: 64,
        max_blocks: 65_536,
        batch_invariant,
    };
    let backend = CudaBackend::new(options).expect("a GPU, which this feature needs");
    let mode = if batch_invariant { "batch-invariant" } else { "fast" };
    let card = &backend.device().info().name;
    let name = format!("{card} in {}, KV of {}, {mode}", activations.name(), kv.name());
    // Half a unit in the last of bfloat16's 8 bits or a half's 11, relative to the least number of its exponent.
    let (rounding, most) = match activations {
        ActivationDtype::Bf16 => (2f64.powi(-8), f32::MAX),
        ActivationDtype::F16 => (2f64.powi(-11), 65504.0),
    };
    Device { backend, name, rounding, most, weights: activations.weight_format(), kv }
}

/// What a GPU may compute in.
#[cfg(feature = "gpu-tests")]
pub(crate) const ACTIVATIONS: [ActivationDtype; 2] = [ActivationDtype::Bf16, ActivationDtype::F16];

/// Runs a generic function of a device on every device, a GPU in both of its modes and with KV of what its activations are.
macro_rules! on_every_device {
    ($heads:expr, $body:path $(, $argument:expr)*) => {{
        let _ = $heads;
        for isa in quire_kernels::cpu::Isa::available() {
            $body(&$crate::cpu(isa) $(, $argument)*);
        }
        #[cfg(feature = "gpu-tests")]
        for activations in $crate::ACTIVATIONS {
            for batch_invariant in [false, true] {
                $body(&$crate::gpu($heads, activations, activations.kv(), batch_invariant) $(, $argument)*);
            }
        }
    }};
}
pub(crate) use on_every_device;

/// As [`on_every_device`], and again for every other type that a GPU's KV cache may hold.
macro_rules! on_every_cache {
    ($heads:expr, $body:path $(, $argument:expr)*) => {{
        $crate::on_every_device!($heads, $body $(, $argument)*);
        #[cfg(feature = "gpu-tests")]
        for activations in $crate::ACTIVATIONS {
            use quire_kernels::KvDtype;
            for kv in [KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8] {
                for batch_invariant in [false, true] {
                    if kv != activations.kv() {
                        $body(&$crate::gpu($heads, activations, kv, batch_invariant) $(, $argument)*);
                    }
                }
            }
        }
    }};
}
pub(crate) use on_every_cache;

/// Generators of a test's shapes and data, seeded with each of `usual`, or with what `QUIRE_TEST_SEED` says. The seed is
/// printed, which a test that fails shows. All devices draw from one generator, one after the other, so that each call has
/// data of its own; a seed repeats a failure where the devices are the same.
pub(crate) fn seeds(usual: &[u64]) -> impl Iterator<Item = StdRng> {
    let asked = std::env::var("QUIRE_TEST_SEED").ok();
    let asked = asked.map(|seed| vec![seed.parse().expect("QUIRE_TEST_SEED is a number")]);
    let seeds = asked.unwrap_or_else(|| usual.to_vec());
    seeds.into_iter().map(|seed| {
        println!("random shapes and data of QUIRE_TEST_SEED={seed}");
        StdRng::seed_from_u64(seed)
    })
}

/// Numbers in -2..2 that bfloat16 and float16 hold exactly.
pub(crate) fn random(n: usize, rng: &mut StdRng) -> Vec<f32> {
    (0..n).map(|_| round(rng.random_range(-2.0..2.0))).collect()
}

/// Elements of heads that a GPU has kernels for.
pub(crate) const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

/// Query heads of a KV head, and up to three of those: fewer where they are large, for the reference takes its time.
pub(crate) fn random_heads(head_dim: usize, rng: &mut StdRng) -> HeadShape {
    let group = [1, 2, 3, 4, 5, 7, 8, 16, 20][rng.random_range(0..9)].min(1536 / head_dim);
    let kv_heads = rng.random_range(1..=3).min(1024 / (group * head_dim)).max(1);
    HeadShape { heads: kv_heads * group, kv_heads, head_dim }
}

/// To a number near `x`, of up to 65,504, that both hold: to bfloat16, and to zero what is too small for a half of 8 bits.
pub(crate) fn round(x: f32) -> f32 {
    if x.abs() < 2f32.powi(-17) { 0.0 } else { half::bf16::from_f32(x).to_f32() }
}

/// What a cache of this type holds in place of `x`.
pub(crate) fn held(x: f32, kv: KvDtype) -> f32 {
    match kv {
        KvDtype::F32 => x,
        KvDtype::Bf16 => half::bf16::from_f32(x).to_f32(),
        KvDtype::F16 => half::f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32(),
        KvDtype::Fp8 => {
            // Three bits of mantissa down to 2^-6, and steps of 2^-9 below.
            let step = 2f32.powi(x.abs().max(2f32.powi(-6)).log2().floor() as i32 - 3);
            ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
        }
    }
}

#[test]
fn e4m3_is_rounded_to() {
    for (x, expected) in [
        (0.0, 0.0),
        (1.0, 1.0),
        (1.0625, 1.0),
        (1.1875, 1.25),
        (-1.9, -1.875),
        (500.0, 448.0),
        (-0.001, -0.001_953_125),
        (0.000_976_562_5, 0.0),
        (0.016, 0.015_625),
    ] {
        assert_eq!(held(x, KvDtype::Fp8), expected, "{x}");
    }
}

/// Values as weights of 16 bits.
pub(crate) fn weight_bytes(format: WeightFormat, values: &[f32]) -> Vec<u8> {
    match format {
        WeightFormat::F16 => quant::f32_to_f16_bytes(values),
        WeightFormat::Bf16 => quant::f32_to_bf16_bytes(values),
        other => panic!("{other:?} is not of 16 bits"),
    }
}

impl<B: Backend> Device<B> {
    /// Relative error of a number in the KV cache.
    pub(crate) fn stored(&self) -> f64 {
        2f64.powi(match self.kv {
            KvDtype::F32 => -24,
            KvDtype::Bf16 => -8,
            KvDtype::F16 => -11,
            KvDtype::Fp8 => -4,
        })
    }

    /// A buffer of these rows, with poisoned rows after them.
    pub(crate) fn filled(&self, cols: usize, values: &[f32]) -> B::Buffer {
        let rows = values.len() / cols;
        let b = &self.backend;
        let mut buffer = b.buffer(rows + 1, cols).expect("small");
        b.set_rows(&mut buffer, rows + 1);
        b.fill(&vec![f32::NAN; (rows + 1) * cols], &mut buffer).expect("the device works");
        b.set_rows(&mut buffer, rows);
        b.fill(values, &mut buffer).expect("the device works");
        buffer
    }

    /// A buffer whose results are all still to be written.
    pub(crate) fn poisoned(&self, rows: usize, cols: usize) -> B::Buffer {
        self.filled(cols, &vec![f32::NAN; rows * cols])
    }

    pub(crate) fn read(&self, buffer: &B::Buffer) -> Vec<f32> {
        let values = self.backend.to_host(buffer).into_owned();
        self.backend.check().expect("the device works");
        values
    }

    /// `||out - expected|| / ||expected||` is within `factor` roundings of this device.
    pub(crate) fn assert_close(&self, out: &[f32], expected: &[f64], factor: f64, what: &str) {
        let error = relative_error(out, expected);
        let bound = factor * self.rounding;
        assert!(error <= bound, "{}: {what}: relative error {error:.2e}, allowed {bound:.2e}", self.name);
    }
}

pub(crate) fn relative_error(out: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(out.len(), expected.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut out.iter().zip(expected).map(|(&a, b)| f64::from(a) - b));
    difference / norm(&mut expected.iter().copied()).max(f64::MIN_POSITIVE)
}

#[test]
fn an_error_is_measured() {
    assert!((relative_error(&[1.0, 0.0], &[1.0, 0.1]) - 0.1 / 1.01f64.sqrt()).abs() < 1e-9);
}
