//! Matrix products by rows, format and shape: `cargo bench -p quire-kernels --bench gemm [-- FILTER]`.
//!
//! Up to 16 rows a product reads its weights more than it computes, and GB/s of weights are given against the
//! machine's read bandwidth (matrices that fit a cache go beyond it); above, GFLOP/s against the peak of the
//! instruction that the format's kernel is made of. `share` is of the lower of the two bounds of each case.

#[path = "common/ceiling.rs"]
mod ceiling;

use ceiling::Ceiling;
use criterion::{BenchmarkId, Criterion, Throughput};
use quire_kernels::cpu::{AlignedBuffer, Isa, MatmulScratch, PackedMatrix, ThreadPool, matmul};
use quire_kernels::{MatrixSource, WeightFormat, quant};
use std::time::{Duration, Instant};

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

/// Name, outputs and inputs: SmolLM2-135M's, then one of Llama-3.2-1B's and one of Llama-3.1-8B's.
const SHAPES: [(&str, usize, usize); 7] = [
    ("qkv", 960, 576),
    ("o", 576, 576),
    ("gate_up", 3072, 576),
    ("down", 576, 1536),
    ("lm_head", 49152, 576),
    ("1B-gate_up", 16384, 2048),
    ("8B-gate_up", 28672, 4096),
];
const ROWS: [usize; 5] = [1, 8, 32, 128, 512];
/// Cases beyond this many multiply-adds tell nothing that a smaller one does not.
const MOST_WORK: usize = 16 << 30;

fn main() {
    let pool = ThreadPool::new(ThreadPool::default_threads());
    let ceiling = Ceiling::measure(&pool);
    println!("{} threads, {}; {ceiling}", pool.threads(), Isa::detect().name());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args();
    for format in FORMATS {
        for (name, n, cols) in SHAPES {
            if cols.is_multiple_of(format.block_elements()) {
                bench_matrix(&mut criterion, &pool, &ceiling, format, name, n, cols);
            }
        }
    }
    criterion.final_summary();
}

fn bench_matrix(
    criterion: &mut Criterion,
    pool: &ThreadPool,
    ceiling: &Ceiling,
    format: WeightFormat,
    name: &str,
    n: usize,
    cols: usize,
) {
    let mut packed = None;
    for rows in ROWS.into_iter().filter(|rows| rows * n * cols <= MOST_WORK) {
        let mut group = criterion.benchmark_group("gemm");
        group.throughput(Throughput::Elements((2 * rows * n * cols) as u64));
        let id = BenchmarkId::new(format!("{format:?}/{name}"), rows);
        let mut seconds = None;
        let x: Vec<f32> = (0..rows * cols).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
        let mut out = AlignedBuffer::<f32>::zeroed(rows * n, "the product").expect("memory for the product");
        let mut scratch = MatmulScratch::new();
        group.bench_function(id, |bencher| {
            // Packed when the first case passes the filter.
            let weights = packed.get_or_insert_with(|| [pack(format, n, cols)]);
            bencher.iter_custom(|iterations| {
                let start = Instant::now();
                for _ in 0..iterations {
                    matmul(pool, Isa::detect(), &x, rows, weights, None, &mut out, &mut scratch);
                }
                let elapsed = start.elapsed();
                let each = elapsed.as_secs_f64() / iterations as f64;
                seconds = Some(seconds.map_or(each, |best: f64| best.min(each)));
                elapsed
            });
        });
        group.finish();
        if let (Some(seconds), Some(weights)) = (seconds, &packed) {
            report(ceiling, format, rows, &weights[0], seconds);
        }
    }
}

/// Weights of the format's bytes: what they are does not matter to the time.
fn pack(format: WeightFormat, n: usize, cols: usize) -> PackedMatrix {
    let row: Vec<f32> = (0..cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let row = match format {
        WeightFormat::F32 => quant::f32_to_f32_bytes(&row),
        WeightFormat::F16 => quant::f32_to_f16_bytes(&row),
        WeightFormat::Bf16 => quant::f32_to_bf16_bytes(&row),
        WeightFormat::Q8_0 => quant::quantize_q8_0(&row),
        WeightFormat::Q4_0 => quant::quantize_q4_0(&row),
        WeightFormat::Q4_1 => quant::quantize_q4_1(&row),
        WeightFormat::Q4K | WeightFormat::Q6K => vec![1; format.row_bytes(cols).expect("whole blocks")],
    };
    let bytes = row.repeat(n);
    let source = MatrixSource::new(format, n, cols, &bytes).expect("the sizes fit");
    PackedMatrix::pack(Isa::detect(), source).expect("memory for the matrix")
}

fn report(ceiling: &Ceiling, format: WeightFormat, rows: usize, weight: &PackedMatrix, seconds: f64) {
    let gflops = 2e-9 * (rows * weight.rows() * weight.cols()) as f64 / seconds;
    let gbs = 1e-9 * weight.bytes() as f64 / seconds;
    let peak = match format {
        WeightFormat::F32 | WeightFormat::F16 => ceiling.f32_gflops,
        WeightFormat::Bf16 => ceiling.bf16_gflops.unwrap_or(ceiling.f32_gflops),
        _ => ceiling.i8_gops.unwrap_or(ceiling.f32_gflops),
    };
    let (compute, memory) = (gflops / peak, gbs / ceiling.read_gbs);
    let micros = seconds * 1e6;
    if memory > compute {
        println!("    {micros:.1} us, {gbs:.1} GB/s of weights: {:.0} % of read bandwidth", 100.0 * memory);
    } else {
        println!(
            "    {micros:.1} us, {gflops:.0} GFLOP/s: {:.0} % of the multiply-add peak",
            100.0 * compute
        );
    }
}
