//! Whole models on the GPU against the CPU, and engines over it against each other. Needs a GPU: `scripts/gpu-check`.

use std::sync::Arc;
use std::time::Instant;

use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, CudaExecutor, CudaExecutorOptions, Engine, EngineConfig, Event,
    KvCapacity, KvLayout, ModelExecutor, PolicyConfig, Request, Reservation, SamplingParams, SchedulerConfig,
};

fn source(shape: &str) -> ModelSource {
    ModelSource::parse(&format!("dummy:{shape}")).unwrap()
}

fn options(slots: usize) -> CudaExecutorOptions {
    CudaExecutorOptions {
        kv: KvCapacity::Slots(slots),
        max_model_len: Some(1024),
        max_batch_rows: 512,
        max_sequences: 64,
        ..CudaExecutorOptions::default()
    }
}

fn tokens(count: u32, seed: u32) -> Vec<u32> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 9) % 40_000).collect()
}

/// `||a - b|| / ||b||`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    (difference / b.iter().map(|&b| square(f64::from(b))).sum::<f64>()).sqrt()
}

#[test]
fn logits_are_the_cpus_within_bf16() {
    for shape in ["smollm2-135m", "qwen3-0.6b"] {
        let text = tokens(150, 1);
        let cpu = CpuExecutorOptions {
            dtype: WeightDtype::Bf16,
            kv: KvCapacity::Slots(256),
            max_batch_rows: 256,
            ..CpuExecutorOptions::default()
        };
        let mut cpu = CpuExecutor::load(&source(shape), &cpu).unwrap();
        let mut gpu = CudaExecutor::load(&source(shape), &options(256)).unwrap();
        let expected = cpu.score(&text).unwrap().into_owned();
        let error = distance(&gpu.score(&text).unwrap(), &expected);
        println!("{shape}: relative error of the logits {error:.2e}");
        // Activations are rounded to bfloat16 (2^-9 each) some hundred times on the way.
        assert!(error < 3e-2, "{shape}: {error:.2e}");
    }
}

/// Prompts, how many tokens each is to get, and how they are chosen.
type Workload = Vec<(Vec<u32>, u32, SamplingParams)>;

fn workload(requests: u32) -> Workload {
    (0..requests).map(|i| (tokens(3 + i * 37 % 200, i), 5 + i * 13 % 60, SamplingParams::default())).collect()
}

fn run(executor: CudaExecutor, config: &EngineConfig, workload: &Workload) -> (Vec<Vec<u32>>, u32) {
    let mut engine = Engine::new(executor, config).unwrap();
    for (id, (prompt, tokens, sampling)) in workload.iter().enumerate() {
        let request = Request {
            id: id as u64,
            prompt: prompt.clone(),
            max_tokens: *tokens,
            true_output_len: Some(*tokens),
            stop_tokens: Arc::new([]),
            sampling: Arc::new(sampling.clone()),
        };
        engine.submit(request, Instant::now());
    }
    let mut outputs = vec![Vec::new(); workload.len()];
    let mut preempted = 0;
    while engine.has_work() {
        for event in engine.step(Instant::now()).unwrap().events {
            match event {
                Event::Token { id, sampled } => outputs[id as usize].push(sampled.token),
                Event::Finished { preemptions, .. } => preempted += preemptions,
                other => panic!("{other:?}"),
            }
        }
        engine.check_integrity();
    }
    (outputs, preempted)
}

fn config(policy: PolicyConfig, kv: KvLayout, token_budget: u32) -> EngineConfig {
    let scheduler = SchedulerConfig { policy, token_budget, max_running: 64, ..SchedulerConfig::default() };
    EngineConfig { scheduler, kv, max_model_len: Some(512) }
}

#[test]
fn graphs_change_no_token() {
    let workload = workload(40);
    let continuous = PolicyConfig::Continuous { watermark: 0.0 };
    let paged = config(continuous, KvLayout::Paged { block_size: 16 }, 512);
    let with = |graphs| {
        let executor =
            CudaExecutor::load(&source("smollm2-135m"), &CudaExecutorOptions { graphs, ..options(16_384) });
        run(executor.unwrap(), &paged, &workload).0
    };
    let (captured, queued) = (with(true), with(false));
    let same = captured.iter().zip(&queued).filter(|(a, b)| a == b).count();
    println!("{same} of {} outputs are the same with graphs and without", workload.len());
    // A graph computes padding rows too, for which cuBLAS may choose another algorithm.
    assert!(same * 2 > workload.len(), "{same}");
}

#[test]
fn batch_invariant_tokens_do_not_depend_on_how_they_are_computed() {
    let workload = workload(24);
    let executor = |slots| {
        let options = CudaExecutorOptions { batch_invariant: true, ..options(slots) };
        CudaExecutor::load(&source("smollm2-135m"), &options).unwrap()
    };
    let continuous = PolicyConfig::Continuous { watermark: 0.0 };
    // One request at a time, its prompt in one piece.
    let alone = config(continuous.clone(), KvLayout::Paged { block_size: 16 }, 512);
    let mut alone_executor = Some(executor(2048));
    let mut expected = Vec::new();
    for one in &workload {
        let executor = alone_executor.take().unwrap_or_else(|| executor(2048));
        expected.extend(run(executor, &alone, &vec![one.clone()]).0);
    }
    let differing = |outputs: &[Vec<u32>]| {
        let different = outputs.iter().zip(&expected).enumerate().filter(|(_, (a, b))| a != b);
        different.map(|(i, _)| i).collect::<Vec<_>>()
    };
    let check = |what: &str, outputs: &[Vec<u32>]| {
        let different = differing(outputs);
        assert!(different.is_empty(), "{what}: outputs {different:?} differ");
    };
    for block_size in [8, 16, 64] {
        let paged = KvLayout::Paged { block_size };
        check("batched", &run(executor(16_384), &config(continuous.clone(), paged, 512), &workload).0);
        let (outputs, _) = run(executor(16_384), &config(continuous.clone(), paged, 70), &workload);
        check("in chunks of at most 70 rows", &outputs);
        let (outputs, preempted) = run(executor(1024), &config(continuous.clone(), paged, 512), &workload);
        assert!(preempted > 0, "the memory was meant to be too small");
        check("preempted", &outputs);
    }
    let contiguous = KvLayout::Contiguous { reservation: Reservation::Oracle };
    check("contiguous", &run(executor(16_384), &config(continuous, contiguous, 512), &workload).0);
    let batches = PolicyConfig::Static { batch_size: 6, timeout_ms: 0 };
    let max = KvLayout::Contiguous { reservation: Reservation::Max };
    check("static batches", &run(executor(16_384), &config(batches, max, 512), &workload).0);
}

#[test]
fn sampling_follows_its_rules_on_the_gpu() {
    let text = tokens(60, 3);
    let sampled = |sampling: SamplingParams| {
        let executor = CudaExecutor::load(&source("smollm2-135m"), &options(4096)).unwrap();
        let paged =
            config(PolicyConfig::Continuous { watermark: 0.0 }, KvLayout::Paged { block_size: 16 }, 512);
        let workload: Workload =
            (0..6).map(|i| (text.clone(), 30, SamplingParams { seed: i, ..sampling.clone() })).collect();
        run(executor, &paged, &workload).0
    };
    let greedy = sampled(SamplingParams::default());
    assert!(greedy.iter().all(|output| *output == greedy[0]), "greedy ignores the seed");
    let one = SamplingParams { temperature: 1.0, top_k: 1, ..SamplingParams::default() };
    assert_eq!(sampled(one), greedy, "one candidate is the greedy choice");
    let warm = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
    let outputs = sampled(warm.clone());
    assert!(outputs.iter().skip(1).all(|output| *output != outputs[0]), "seeds draw differently");
    assert_eq!(outputs, sampled(warm), "and the same seed the same");
    let penalized = SamplingParams { frequency_penalty: 1e4, ..SamplingParams::default() };
    for output in sampled(penalized) {
        let distinct: std::collections::HashSet<_> = output.iter().collect();
        assert_eq!(distinct.len(), output.len(), "a penalty that large forbids every repeat");
    }
}

#[test]
fn what_cannot_be_is_said() {
    let error = |options: CudaExecutorOptions| {
        CudaExecutor::load(&source("smollm2-135m"), &options).unwrap_err().to_string()
    };
    assert!(error(CudaExecutorOptions { device: 77, ..options(64) }).contains("no GPU 77"));
    assert!(error(CudaExecutorOptions { dtype: WeightDtype::Q8_0, ..options(64) }).contains("bf16"));
    let huge = CudaExecutorOptions { kv: KvCapacity::Bytes(1 << 50), ..options(64) };
    assert!(error(huge).contains("KV"), "too much KV memory");
    let executor = CudaExecutor::load(&source("smollm2-135m"), &options(4096)).unwrap();
    let tiny = config(PolicyConfig::default(), KvLayout::Paged { block_size: 2 }, 512);
    assert!(Engine::new(executor, &tiny).unwrap_err().to_string().contains("8 to 256"));
}
