//! The kernels of a GPU, timed by its own events: products, attention paged and contiguous, operations, sampling (with
//! the way of the rules there and of the tokens back). Says of each the median of its samples, the fastest of them, and what
//! share of a measured ceiling the median is; and of each group the clocks and the power that it ran at.
//!
//! Operands change from run to run so that weights, keys and values come from memory, as they do in a model. They are made
//! for the benchmarks that the command line chooses alone.

mod attention;

use std::cell::{LazyCell, RefCell};
use std::ops::Range;
use std::time::{Duration, Instant};

use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use quire_kernels::clocks::ClockSampler;
use quire_kernels::cuda::{
    ActivationDtype, CudaBackend, CudaBuffer, CudaOptions, DeviceSampler, SampleRequest,
};
use quire_kernels::sampling::SamplingRule;
use quire_kernels::{
    AttentionBatch, Backend, GeneratedMatrix, HeadShape, KvDtype, KvIndex, NO_SLOT, WeightFormat,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Llama-3.1-8B.
const HEADS: HeadShape = HeadShape { heads: 32, kv_heads: 8, head_dim: 128 };
const HIDDEN: usize = 4096;
const FFN: usize = 14_336;
const VOCAB: usize = 128_256;
/// Bytes gone through before any is read again: several times the second-level cache of any card so far.
const COLD_BYTES: usize = 512 << 20;
/// Rows of the largest step.
const ROWS: usize = 16_384;
/// Launches timed together: a single one is too short for the events.
const TOGETHER: u64 = 8;
/// Samples of a benchmark.
const SAMPLES: usize = 10;
/// For how long a benchmark runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(60);
/// Between readings of clocks and power: a benchmark runs for a fifth of a second.
const READ_EVERY: Duration = Duration::from_millis(50);

/// What the card can do at most, measured at the start.
#[derive(Debug, Clone, Copy)]
struct Ceiling {
    /// Copying memory, bytes read and written, GB/s.
    gbs: f64,
    /// A large bfloat16 product, GFLOP/s.
    gflops: f64,
}

/// What an iteration does.
#[derive(Debug, Clone, Copy)]
enum Work {
    Bytes(f64),
    Flops(f64),
}

struct Bench<'a> {
    backend: &'a CudaBackend,
    ceiling: Ceiling,
    clocks: Option<&'a ClockSampler>,
    /// When the benchmarks of the group ran. Between them the GPU waits for operands.
    ran: RefCell<Vec<Range<Instant>>>,
}

impl<'a> Bench<'a> {
    fn new(backend: &'a CudaBackend, ceiling: Ceiling, clocks: Option<&'a ClockSampler>) -> Self {
        Self { backend, ceiling, clocks, ran: RefCell::default() }
    }

    /// Measures `body`, which is given what `make` makes and the number of the run, and prints its times and its rate.
    fn run<T>(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        id: &str,
        work: Work,
        make: impl Fn() -> T,
        mut body: impl FnMut(&mut T, usize),
    ) {
        let mut samples: Vec<f64> = Vec::new();
        let mut ran: Option<Range<Instant>> = None;
        let mut runs = 0..;
        // Seconds of a run, of several together.
        let mut time = |operands: &mut T| {
            let timed = self.backend.device().time(|| {
                runs.by_ref().take(TOGETHER as usize).for_each(|run| body(operands, run));
            });
            timed.expect("the GPU works") / TOGETHER as f64
        };
        let mut operands = None;
        group.bench_function(id, |bencher| {
            let operands = operands.get_or_insert_with(|| {
                let mut operands = make();
                // Criterion takes the time of making them for warming up.
                let began = Instant::now();
                while began.elapsed() < WARM_UP {
                    time(&mut operands);
                }
                operands
            });
            bencher.iter_custom(|iterations| {
                let began = Instant::now();
                let elapsed = (0..iterations).map(|_| time(operands)).sum::<f64>();
                samples.push(elapsed / iterations as f64);
                ran = Some(ran.as_ref().map_or(began, |before| before.start)..Instant::now());
                Duration::from_secs_f64(elapsed)
            });
        });
        // None where the command line leaves it out. Those of the warm-up come first.
        let samples = &mut samples.split_off(samples.len().saturating_sub(SAMPLES));
        let Some([median, fastest]) = median_and_fastest(samples) else { return };
        self.ran.borrow_mut().extend(ran);
        let (amount, ceiling, unit) = match work {
            Work::Bytes(bytes) => (bytes, self.ceiling.gbs, "GB/s"),
            Work::Flops(flops) => (flops, self.ceiling.gflops, "GFLOP/s"),
        };
        let rate = amount / median / 1e9;
        let share = 100.0 * rate / ceiling;
        let [median, fastest] = [median, fastest].map(|seconds| 1e6 * seconds);
        println!(
            "    {id}: {median:.1} us (fastest {fastest:.1}), {rate:.0} {unit}, {share:.0} % of the ceiling"
        );
    }

    /// Ends a group, and prints the clocks and the power that its benchmarks ran at.
    fn end(&self, group: BenchmarkGroup<'_, WallTime>, name: &str) {
        group.finish();
        let ran = self.ran.take();
        if let Some(clocks) = self.clocks.and_then(|clocks| clocks.over(&ran)) {
            println!(
                "  {name}: SM clock {:.0} MHz on average, {:.0} at the least; {:.0} W on average, {:.0} at the most",
                clocks.sm_mhz, clocks.lowest_sm_mhz, clocks.watts, clocks.highest_watts
            );
        }
    }
}

/// The median and the least of `samples`, which are sorted; none without any.
fn median_and_fastest(samples: &mut [f64]) -> Option<[f64; 2]> {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    let upper = *samples.get(middle)?;
    let median = if samples.len() % 2 == 1 { upper } else { (samples[middle - 1] + upper) / 2.0 };
    Some([median, samples[0]])
}

/// A group with short measurements: there are many.
fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(SAMPLES).warm_up_time(WARM_UP).measurement_time(Duration::from_millis(150));
    group
}

fn backend(heads: HeadShape, kv_dtype: KvDtype) -> Result<CudaBackend, quire_kernels::KernelError> {
    CudaBackend::new(CudaOptions {
        device: 0,
        activations: ActivationDtype::Bf16,
        heads,
        kv_dtype,
        max_rows: ROWS,
        max_sequences: 256,
        max_blocks: 65_536,
        batch_invariant: false,
    })
}

fn buffer(backend: &CudaBackend, rows: usize, cols: usize) -> CudaBuffer {
    let mut buffer = backend.buffer(rows, cols).expect("memory");
    backend.set_rows(&mut buffer, rows);
    // Of random numbers: regular ones draw less power, and a product of them runs at a higher clock than a model's.
    let mut rng = StdRng::seed_from_u64(7);
    let values: Vec<f32> = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
    backend.fill(&values, &mut buffer).expect("the GPU works");
    buffer
}

fn ceiling(backend: &CudaBackend) -> Ceiling {
    // Rows are read and written once each; what they hold does not matter.
    let (from, mut to) = (buffer(backend, ROWS, FFN), buffer(backend, ROWS, FFN));
    let all: Vec<u32> = (0..ROWS as u32).collect();
    let batch = AttentionBatch {
        positions: &vec![0; ROWS],
        slots: &vec![NO_SLOT; ROWS],
        query_start: &[0],
        context_len: &[],
        kv: KvIndex::Contiguous { start: &[] },
        window: None,
    };
    let input = quire_kernels::StepInput { tokens: &[], batch, logit_rows: &all };
    let step = backend.begin_step(input).expect("a step of the backend's size");
    let (n, k) = (8192, 8192);
    let weight = generated(backend, n, k, 1);
    let (x, mut out) = (buffer(backend, 8192, k), buffer(backend, 8192, n));
    let mut best = Ceiling { gbs: 0.0, gflops: 0.0 };
    for _ in 0..8 {
        let copied = backend.device().time(|| backend.gather_rows(&from, &step, &mut to));
        best.gbs = best.gbs.max(4.0 * (ROWS * FFN) as f64 / copied.expect("the GPU works") / 1e9);
        let multiplied = backend.device().time(|| backend.linear(&x, &weight, None, &mut out));
        let flops = 2.0 * (8192 * n * k) as f64;
        best.gflops = best.gflops.max(flops / multiplied.expect("the GPU works") / 1e9);
    }
    best
}

fn generated(backend: &CudaBackend, rows: usize, cols: usize, key: u64) -> quire_kernels::cuda::CudaWeight {
    let made = backend.generate_matrix(
        WeightFormat::Bf16,
        &[GeneratedMatrix { key, rows, cols, first_row: 0, first_col: 0 }],
    );
    made.expect("memory").expect("a GPU generates weights")
}

fn products(criterion: &mut Criterion, bench: &Bench<'_>) {
    let mut group = group(criterion, "product");
    for (name, n, k) in [
        ("QKV", 6144, HIDDEN),
        ("output", HIDDEN, HIDDEN),
        ("gate and up", 2 * FFN, HIDDEN),
        ("down", HIDDEN, FFN),
        ("logits", VOCAB, HIDDEN),
    ] {
        let copies = (COLD_BYTES / (2 * n * k)).clamp(1, 16);
        let make = || (0..copies as u64).map(|key| generated(bench.backend, n, k, key)).collect::<Vec<_>>();
        let weights = LazyCell::new(make);
        for rows in [1, 8, 32, 128, 256, 1024, 2048] {
            if n == VOCAB && rows > 256 {
                continue;
            }
            let make = || {
                let mut out = match n {
                    VOCAB => bench.backend.logits_buffer(rows, n),
                    _ => bench.backend.buffer(rows, n),
                }
                .expect("memory");
                bench.backend.set_rows(&mut out, rows);
                (buffer(bench.backend, rows, k), out)
            };
            let work = match rows {
                0..=128 => Work::Bytes((2 * (n * k + rows * (n + k))) as f64),
                _ => Work::Flops(2.0 * (rows * n * k) as f64),
            };
            let id = format!("{name} {n} x {k}, {rows} rows");
            bench.run(&mut group, &id, work, make, |(x, out), run| {
                bench.backend.linear(x, &weights[run % copies], None, out);
            });
        }
    }
    bench.end(group, "product");
}

fn operations(criterion: &mut Criterion, bench: &Bench<'_>) {
    let mut group = group(criterion, "operation");
    let b = bench.backend;
    for rows in [1, 256, 2048] {
        let copies = (COLD_BYTES / (6 * rows * HIDDEN)).clamp(1, 16);
        let buffers = |cols| (0..copies).map(|_| buffer(b, rows, cols)).collect::<Vec<_>>();
        let weight = || b.load_vector(&[1.0; HIDDEN]).expect("memory");
        let bytes = |per_element: usize| Work::Bytes((per_element * rows * HIDDEN) as f64);
        let make = || (buffers(HIDDEN), buffers(HIDDEN), weight());
        bench.run(
            &mut group,
            &format!("rms_norm, {rows} rows"),
            bytes(4),
            make,
            |(xs, outs, weight), run| {
                b.rms_norm(&xs[run % copies], weight, 1e-5, &mut outs[run % copies]);
            },
        );
        let make = || (buffers(HIDDEN), buffers(HIDDEN), buffers(HIDDEN), weight());
        bench.run(
            &mut group,
            &format!("add_rms_norm, {rows} rows"),
            bytes(8),
            make,
            |(xs, residuals, outs, weight), run| {
                let at = run % copies;
                b.add_rms_norm(&mut residuals[at], &xs[at], weight, 1e-5, &mut outs[at]);
            },
        );
        let gates = || (0..copies.min(4)).map(|_| buffer(b, rows, 2 * FFN)).collect::<Vec<_>>();
        let make = || (gates(), buffer(b, rows, FFN));
        let work = Work::Bytes((6 * rows * FFN) as f64);
        bench.run(&mut group, &format!("silu_mul, {rows} rows"), work, make, |(gates, out), run| {
            b.silu_mul(&gates[run % gates.len()], out);
        });
    }
    bench.end(group, "operation");
}

fn sampling(criterion: &mut Criterion, bench: &Bench<'_>) {
    let mut group = group(criterion, "sample");
    let random = SamplingRule { temperature: 0.8, ..SamplingRule::default() };
    let device = bench.backend.device();
    for rows in [1, 32, 256] {
        let make = || {
            let mut logits = bench.backend.logits_buffer(rows, VOCAB).expect("memory");
            bench.backend.set_rows(&mut logits, rows);
            let mut rng = StdRng::seed_from_u64(9);
            let values: Vec<f32> = (0..rows * VOCAB).map(|_| rng.random_range(0.0..17.0)).collect();
            bench.backend.fill(&values, &mut logits).expect("the GPU works");
            (logits, DeviceSampler::new(device, rows, VOCAB).expect("memory"))
        };
        for (name, rule, top) in [
            ("greedy", SamplingRule::default(), 0),
            ("greedy with the 20 most probable", SamplingRule::default(), 20),
            ("temperature", random, 0),
            ("top-k 50, top-p 0.9", SamplingRule { top_k: 50, top_p: 0.9, ..random }, 0),
        ] {
            let requests: Vec<_> = (0..rows)
                .map(|row| SampleRequest {
                    rule,
                    history: &[],
                    prompt_len: 0,
                    uniform: (row as f64 + 0.5) / rows as f64,
                    logprob: false,
                    top,
                })
                .collect();
            let work = Work::Bytes((4 * rows * VOCAB) as f64);
            let id = format!("{name}, {rows} rows of {VOCAB}");
            bench.run(&mut group, &id, work, make, |(logits, sampler), _| {
                sampler.begin(device, logits, &requests).expect("the GPU works");
                sampler.collect(device).expect("the GPU works");
            });
        }
    }
    bench.end(group, "sample");
}

fn main() {
    let first = match backend(HEADS, KvDtype::Bf16) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("no GPU to measure: {error}");
            std::process::exit(1);
        }
    };
    let info = first.device().info();
    let sampler = ClockSampler::start(&info.uuid, READ_EVERY);
    let clocks = sampler.as_ref();
    let ceiling = ceiling(&first);
    println!(
        "{}; ceilings: copy {:.0} GB/s, bf16 product {:.0} TFLOP/s",
        info.name,
        ceiling.gbs,
        ceiling.gflops / 1e3
    );
    let mut criterion = Criterion::default().configure_from_args();
    let bench = Bench::new(&first, ceiling, clocks);
    products(&mut criterion, &bench);
    attention::all(&mut criterion, &bench, KvDtype::Bf16);
    operations(&mut criterion, &bench);
    sampling(&mut criterion, &bench);
    drop(first);
    for kv in [KvDtype::F16, KvDtype::Fp8] {
        let backend = backend(HEADS, kv).expect("as before");
        attention::all(&mut criterion, &Bench::new(&backend, ceiling, clocks), kv);
    }
    for head_dim in [64, 80, 96, 256] {
        let heads = HeadShape { head_dim, ..HEADS };
        let backend = backend(heads, KvDtype::Bf16).expect("as before");
        let bench = Bench::new(&backend, ceiling, clocks);
        attention::decode(
            &mut criterion,
            &bench,
            KvDtype::Bf16,
            heads,
            &[[32, 2048], [256, 1024]],
            &[Some(16)],
        );
        let prompts = [[16, 1024, 1024], [4, 4096, 4096]];
        attention::prefill(&mut criterion, &bench, KvDtype::Bf16, heads, &prompts, &[Some(16)]);
    }
    criterion.final_summary();
}
