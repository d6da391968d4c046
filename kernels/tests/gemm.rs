//! Matrix products of every format, on every instruction set of this machine, against float64.

use quire_kernels::cpu::{Isa, MatmulScratch, PackedMatrix, ThreadPool, matmul};
use quire_kernels::{MatrixSource, WeightFormat, quant, reference};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::num::NonZeroUsize;

const FORMATS: [WeightFormat; 8] = [
    WeightFormat::F32,
    WeightFormat::F16,
    WeightFormat::Bf16,
    WeightFormat::Q8_0,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q4K,
    WeightFormat::Q6K,
];

/// `||out - exact|| / ||exact||` that a product may have against the decoded weights in float64. Activations
/// rounded to 8 bits by groups of 32 cost about 0.6 %; to bf16, about 0.2 %; f32 accumulation costs next to nothing.
fn tolerance(format: WeightFormat) -> f64 {
    match format {
        WeightFormat::F32 | WeightFormat::F16 => 2e-6,
        WeightFormat::Bf16 => 3e-3,
        WeightFormat::Q8_0
        | WeightFormat::Q4_0
        | WeightFormat::Q4_1
        | WeightFormat::Q4K
        | WeightFormat::Q6K => 1e-2,
    }
}

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(NonZeroUsize::new(threads).expect("threads"))
}

fn normal(rng: &mut StdRng) -> f32 {
    // The sum of twelve uniforms: as good as normal for this.
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

fn values(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| normal(rng)).collect()
}

/// Random weights in a format's bytes. Super-blocks are random bits under sane scales.
fn encode(rng: &mut StdRng, format: WeightFormat, elements: usize) -> Vec<u8> {
    let floats = values(rng, elements);
    match format {
        WeightFormat::F32 => quant::f32_to_f32_bytes(&floats),
        WeightFormat::F16 => quant::f32_to_f16_bytes(&floats),
        WeightFormat::Bf16 => quant::f32_to_bf16_bytes(&floats),
        WeightFormat::Q8_0 => quant::quantize_q8_0(&floats),
        WeightFormat::Q4_0 => quant::quantize_q4_0(&floats),
        WeightFormat::Q4_1 => quant::quantize_q4_1(&floats),
        WeightFormat::Q4K | WeightFormat::Q6K => {
            let mut bytes: Vec<u8> =
                (0..elements / 256 * format.block_bytes()).map(|_| rng.random()).collect();
            for block in bytes.chunks_exact_mut(format.block_bytes()) {
                let mut scale = || half::f16::from_f32(rng.random_range(0.001..0.01)).to_le_bytes();
                if format == WeightFormat::Q4K {
                    block[..2].copy_from_slice(&scale());
                    block[2..4].copy_from_slice(&scale());
                } else {
                    block[208..].copy_from_slice(&scale());
                }
            }
            bytes
        }
    }
}

struct Matrix {
    bytes: Vec<u8>,
    format: WeightFormat,
    rows: usize,
    cols: usize,
}

impl Matrix {
    fn random(rng: &mut StdRng, format: WeightFormat, rows: usize, cols: usize) -> Self {
        Self { bytes: encode(rng, format, rows * cols), format, rows, cols }
    }

    fn source(&self) -> MatrixSource<'_> {
        MatrixSource::new(self.format, self.rows, self.cols, &self.bytes).expect("the sizes fit")
    }

    fn decoded(&self) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.rows * self.cols];
        quant::dequantize(self.format, &self.bytes, &mut out).expect("the sizes fit");
        out
    }
}

/// `||out - exact|| / ||exact||`. Where a few terms cancel by chance, `||exact||` is taken to be what it would be for
/// unrelated vectors of these lengths.
fn relative_error(out: &[f32], exact: &[f64], x: &[f32], w: &[f32], cols: usize) -> f64 {
    assert_eq!(out.len(), exact.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let error = square(&mut out.iter().zip(exact).map(|(&o, &e)| f64::from(o) - e));
    let expected =
        square(&mut x.iter().map(|&v| f64::from(v))) * square(&mut w.iter().map(|&v| f64::from(v)));
    let size = square(&mut exact.iter().copied()).max(expected / cols as f64);
    (error / size).sqrt()
}

fn product(
    threads: usize,
    isa: Isa,
    x: &[f32],
    rows: usize,
    weights: &[PackedMatrix],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let n: usize = weights.iter().map(PackedMatrix::rows).sum();
    let mut out = vec![f32::NAN; rows * n];
    matmul(&pool(threads), isa, x, rows, weights, bias, &mut out, &mut MatmulScratch::new());
    out
}

/// Outputs and columns for a format: whole panels, ragged ones, one output, odd columns where there may be.
fn shapes(format: WeightFormat) -> Vec<(usize, usize)> {
    let block = format.block_elements();
    let mut shapes =
        vec![(64, 2 * block.max(32)), (1, block), (17, 3 * block), (33, block.max(32)), (95, 2 * block)];
    if block == 1 {
        shapes.extend([(31, 577), (48, 1), (16, 63)]);
    }
    shapes
}

#[test]
fn products_agree_with_float64() {
    let mut rng = StdRng::seed_from_u64(1);
    for isa in Isa::available() {
        for format in FORMATS {
            for (n, cols) in shapes(format) {
                let matrix = Matrix::random(&mut rng, format, n, cols);
                let packed = [PackedMatrix::pack(isa, matrix.source()).expect("available")];
                let decoded = matrix.decoded();
                for rows in [1, 2, 3, 5, 7, 13, 30] {
                    let x = values(&mut rng, rows * cols);
                    let bias = (rows % 2 == 1).then(|| values(&mut rng, n));
                    let out = product(2, isa, &x, rows, &packed, bias.as_deref());
                    let exact = reference::matmul(&x, &decoded, cols, bias.as_deref());
                    let error = relative_error(&out, &exact, &x, &decoded, cols);
                    // A single output averages out less.
                    let allowed = tolerance(format) * if n == 1 { 3.0 } else { 1.0 };
                    assert!(error <= allowed, "{isa:?} {format:?} {rows}x{n}x{cols}: {error:.2e}");
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_and_threads_around_it() {
    let mut rng = StdRng::seed_from_u64(2);
    for isa in Isa::available() {
        for format in FORMATS {
            let (n, cols) = (72, 256);
            let matrix = Matrix::random(&mut rng, format, n, cols);
            let packed = [PackedMatrix::pack(isa, matrix.source()).expect("available")];
            let most = 70;
            let x = values(&mut rng, most * cols);
            let alone: Vec<f32> =
                x.chunks_exact(cols).flat_map(|row| product(1, isa, row, 1, &packed, None)).collect();
            for rows in (1..=14).chain([20, 26, 33, most]) {
                for threads in [1, 3] {
                    let out = product(threads, isa, &x[..rows * cols], rows, &packed, None);
                    let same = out.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{isa:?} {format:?}: rows change with {rows} of them on {threads} threads");
                }
            }
        }
    }
}

#[test]
fn stacks_of_mixed_formats_are_the_products_side_by_side() {
    let mut rng = StdRng::seed_from_u64(3);
    let (cols, rows) = (256, 9);
    let parts: Vec<Matrix> = [
        (WeightFormat::Q4K, 40),
        (WeightFormat::Q4K, 7),
        (WeightFormat::Q6K, 33),
        (WeightFormat::F32, 16),
        (WeightFormat::Bf16, 5),
        (WeightFormat::Q8_0, 50),
    ]
    .into_iter()
    .map(|(format, n)| Matrix::random(&mut rng, format, n, cols))
    .collect();
    let sources: Vec<MatrixSource<'_>> = parts.iter().map(Matrix::source).collect();
    let x = values(&mut rng, rows * cols);
    let n: usize = parts.iter().map(|p| p.rows).sum();
    let bias = values(&mut rng, n);
    for isa in Isa::available() {
        let stack = PackedMatrix::pack_stack(isa, &sources).expect("available");
        assert_eq!(stack.iter().map(PackedMatrix::rows).collect::<Vec<_>>(), [47, 33, 16, 5, 50]);
        let out = product(2, isa, &x, rows, &stack, Some(&bias));
        let mut col = 0;
        for part in &parts {
            let packed = [PackedMatrix::pack(isa, part.source()).expect("available")];
            let side = product(2, isa, &x, rows, &packed, Some(&bias[col..col + part.rows]));
            for row in 0..rows {
                assert_eq!(
                    out[row * n + col..][..part.rows],
                    side[row * part.rows..][..part.rows],
                    "{isa:?}"
                );
            }
            col += part.rows;
        }
    }
}

#[test]
fn stacks_must_agree_in_columns() {
    let mut rng = StdRng::seed_from_u64(4);
    let parts = [32, 64].map(|cols| Matrix::random(&mut rng, WeightFormat::Q8_0, 4, cols));
    let sources = [parts[0].source(), parts[1].source()];
    let error = PackedMatrix::pack_stack(Isa::detect(), &sources).expect_err("columns differ");
    assert!(error.to_string().contains("columns"));
}

#[test]
fn packed_rows_decode_to_the_source() {
    let mut rng = StdRng::seed_from_u64(5);
    for format in FORMATS {
        let (rows, cols) =
            (37, 2 * format.block_elements().max(33).next_multiple_of(format.block_elements()));
        let matrix = Matrix::random(&mut rng, format, rows, cols);
        let packed = PackedMatrix::pack(Isa::detect(), matrix.source()).expect("available");
        assert_eq!((packed.rows(), packed.cols(), packed.format()), (rows, cols, format));
        let decoded = matrix.decoded();
        for (row, exact) in decoded.chunks_exact(cols).enumerate() {
            let mut out = vec![f32::NAN; cols];
            packed.dequantize_row(row, &mut out);
            // Only the two-level scales are rounded.
            let exactly = !matches!(format, WeightFormat::Q4K | WeightFormat::Q6K);
            for (o, e) in out.iter().zip(exact) {
                let near = if exactly { 1e-6 } else { 2e-3 };
                assert!((o - e).abs() <= near * (e.abs() + 1.0), "{format:?} row {row}: {o} for {e}");
            }
        }
    }
}

#[test]
fn a_nan_or_an_infinity_shows_in_its_row_alone() {
    let mut rng = StdRng::seed_from_u64(6);
    for isa in Isa::available() {
        for format in FORMATS {
            let matrix = Matrix::random(&mut rng, format, 20, 256);
            let packed = [PackedMatrix::pack(isa, matrix.source()).expect("available")];
            let mut x = values(&mut rng, 3 * 256);
            x[256 + 100] = if format == WeightFormat::F32 { f32::INFINITY } else { f32::NAN };
            let out = product(2, isa, &x, 3, &packed, None);
            for (row, out) in out.chunks_exact(20).enumerate() {
                assert_eq!(out.iter().all(|v| v.is_finite()), row != 1, "{isa:?} {format:?}");
                assert_eq!(out.iter().any(|v| v.is_finite()), row != 1, "{isa:?} {format:?}");
            }
        }
    }
}
