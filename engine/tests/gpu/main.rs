//! Whole models on the GPU against the CPU, and engines over it against each other. Needs a GPU: `scripts/gpu-check`.

mod choices;
mod logits;
mod several;

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, CudaExecutor, CudaExecutorOptions, Engine, EngineConfig, Event,
    Executor, KvCapacity, KvLayout, KvPlacement, MAX_TOP_LOGPROBS, ModelExecutor, PolicyConfig,
    PreemptionConfig, Request, Reservation, SamplingParams, ScheduledBatch, SchedulerConfig,
};
use quire_kernels::KvDtype;

use choices::Choices;

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

/// The same in float16, KV memory included.
fn in_f16(slots: usize) -> CudaExecutorOptions {
    CudaExecutorOptions { dtype: WeightDtype::F16, kv_dtype: KvDtype::F16, ..options(slots) }
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

/// Prompts, how many tokens each is to get, and how they are chosen.
type Workload = Vec<(Vec<u32>, u32, SamplingParams)>;

fn workload(requests: u32) -> Workload {
    (0..requests).map(|i| (tokens(3 + i * 37 % 200, i), 5 + i * 13 % 60, SamplingParams::default())).collect()
}

fn run(executor: CudaExecutor, config: &EngineConfig, workload: &Workload) -> (Vec<Vec<u32>>, u32) {
    let (outputs, preempted, _) = run_over(executor, config, workload);
    (outputs, preempted)
}

/// As [`run`]; gives the executor back.
fn run_over<E: Executor>(executor: E, config: &EngineConfig, workload: &Workload) -> (Vec<Vec<u32>>, u32, E) {
    let mut engine = Engine::new(executor, config).unwrap();
    let (outputs, preempted) = serve(&mut engine, workload);
    (outputs, preempted, engine.into_executor())
}

/// Tokens of each request, and how often one was preempted.
fn serve<E: Executor>(engine: &mut Engine<E>, workload: &Workload) -> (Vec<Vec<u32>>, u32) {
    for (id, (prompt, tokens, sampling)) in workload.iter().enumerate() {
        let request = Request {
            id: id as u64,
            prompt: prompt.clone(),
            max_tokens: *tokens,
            true_output_len: None,
            stop_tokens: Arc::new([]),
            sampling: Arc::new(sampling.clone()),
            fork_of: None,
            beam: None,
            priority: 0,
            cache_salt: 0,
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
    EngineConfig {
        scheduler,
        kv,
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: Some(512),
    }
}

#[test]
fn fast_choices_differ_only_where_the_reference_is_undecided() {
    let text = tokens(400, 7);
    for (gpu, kv_dtype, bound) in [(options(512), KvDtype::Bf16, 3e-2), (in_f16(512), KvDtype::F32, 4e-3)] {
        let cpu = CpuExecutorOptions {
            dtype: gpu.dtype,
            kv: KvCapacity::Slots(512),
            kv_dtype,
            max_batch_rows: 512,
            ..CpuExecutorOptions::default()
        };
        let what = format!("a prefill in {}", gpu.dtype);
        let mut cpu = CpuExecutor::load(&source("smollm2-135m"), &cpu).unwrap();
        let mut gpu = CudaExecutor::load(&source("smollm2-135m"), &gpu).unwrap();
        let vocab = cpu.vocab_size();
        let expected = cpu.score(&text).unwrap().into_owned();
        let logits = gpu.score(&text).unwrap();
        let mut choices = Choices::default();
        for (ours, reference) in logits.chunks_exact(vocab).zip(expected.chunks_exact(vocab)) {
            choices.add(ours, reference);
        }
        choices.check(&what, bound);
    }
}

/// A step of ranges of these texts' tokens, with the logits of each range's last. KV memory is in blocks of 16, those of a
/// text far from each other.
fn step_of(texts: &[Vec<u32>], ranges: impl IntoIterator<Item = (usize, Range<u32>)>) -> ScheduledBatch {
    let mut batch = ScheduledBatch::new(KvPlacement::Paged {
        block_size: 16,
        tables: Vec::new(),
        table_start: Vec::new(),
    });
    for (text, range) in ranges {
        let block = |index: u32| index * texts.len() as u32 + text as u32;
        batch.tokens.extend(&texts[text][range.start as usize..range.end as usize]);
        batch.positions.extend(range.clone());
        batch.slots.extend(range.clone().map(|at| block(at / 16) * 16 + at % 16));
        batch.query_start.push(batch.tokens.len() as u32);
        batch.context_len.push(range.end);
        batch.logit_rows.push(batch.tokens.len() as u32 - 1);
        if let KvPlacement::Paged { tables, table_start, .. } = &mut batch.kv {
            table_start.push(tables.len() as u32);
            tables.extend((0..range.end.div_ceil(16)).map(block));
        }
    }
    batch
}

/// Computes the first `prompts[i]` tokens of each text, then the next `steps` of all of them, one of each at a time. Gives
/// the logits of every such step.
fn decode(gpu: &mut dyn ModelExecutor, texts: &[Vec<u32>], prompts: &[u32], steps: u32) -> Vec<Vec<f32>> {
    gpu.prepare(KvLayout::Paged { block_size: 16 }, &mut |_, _| {}).unwrap();
    for (text, &prompt) in prompts.iter().enumerate() {
        gpu.forward(&step_of(texts, [(text, 0..prompt)])).unwrap();
    }
    let step = |step| {
        let next = prompts.iter().map(|prompt| prompt + step..prompt + step + 1);
        gpu.forward(&step_of(texts, next.enumerate())).unwrap();
        gpu.logits().unwrap().into_owned()
    };
    (0..steps).map(step).collect()
}

#[test]
fn decodes_are_the_cpus_within_bf16() {
    decodes_are_the_cpus(&options(8192), KvDtype::Bf16, 3e-2);
}

#[test]
fn batch_invariant_decodes_are_the_cpus_within_bf16() {
    decodes_are_the_cpus(
        &CudaExecutorOptions { batch_invariant: true, ..options(8192) },
        KvDtype::Bf16,
        3e-2,
    );
}

#[test]
fn decodes_in_f16_are_the_cpus_within_f16() {
    decodes_are_the_cpus(&in_f16(8192), KvDtype::F32, 4e-3);
}

/// Decodes of several sequences at once, each on its own within what `logits_are_the_cpus_within_bf16` allows a prefill, and
/// their choices by the rule for a prefill's.
fn decodes_are_the_cpus(options: &CudaExecutorOptions, cpu_kv: KvDtype, bound: f64) {
    // Into a second and a third block of all; contexts that are worth splitting, and some of a few tokens.
    const STEPS: u32 = 20;
    let prompts: Vec<u32> = (0..20).map(|i| (300 + 97 * i) % 311).collect();
    let texts: Vec<Vec<u32>> = prompts.iter().zip(20..).map(|(n, seed)| tokens(n + STEPS, seed)).collect();
    for shape in ["smollm2-135m", "qwen3-0.6b"] {
        let cpu = CpuExecutorOptions {
            dtype: options.dtype,
            kv: KvCapacity::Slots(512),
            kv_dtype: cpu_kv,
            max_batch_rows: 512,
            ..CpuExecutorOptions::default()
        };
        let mut cpu = CpuExecutor::load(&source(shape), &cpu).unwrap();
        let vocab = cpu.vocab_size();
        let expected: Vec<Vec<f32>> = texts
            .iter()
            .zip(&prompts)
            .map(|(text, &prompt)| cpu.score(text).unwrap()[prompt as usize * vocab..].to_vec())
            .collect();
        drop(cpu);
        let mut gpu = CudaExecutor::load(&source(shape), options).unwrap();
        let mut choices = Choices::default();
        // With a graph of their own, and padded to one.
        for sequences in [1, 3, 9, 20] {
            let steps = decode(&mut gpu, &texts[..sequences], &prompts[..sequences], STEPS);
            let mut greatest: f64 = 0.0;
            for (sequence, expected) in expected[..sequences].iter().enumerate() {
                let row = |step: &Vec<f32>| step[sequence * vocab..][..vocab].to_vec();
                let logits: Vec<f32> = steps.iter().flat_map(row).collect();
                assert_eq!(logits.len(), expected.len());
                for (ours, reference) in logits.chunks_exact(vocab).zip(expected.chunks_exact(vocab)) {
                    choices.add(ours, reference);
                }
                let error = distance(&logits, expected);
                greatest = greatest.max(error);
                let what = format!("{shape} in {}, {sequences} sequences", options.dtype);
                assert!(error < bound, "{what}: {error:.2e} after {} tokens", prompts[sequence]);
            }
            let dtype = options.dtype;
            println!("{shape} in {dtype}, decodes of {sequences}: greatest relative error {greatest:.2e}");
        }
        choices.check(&format!("{shape} in {}, decodes", options.dtype), bound);
    }
}

/// Logits of a decode of `sequences` sequences after prompts of 40 tokens.
fn decode_logits(options: CudaExecutorOptions, sequences: u32) -> Vec<f32> {
    let mut gpu = CudaExecutor::load(&source("smollm2-135m"), &options).unwrap();
    let texts: Vec<Vec<u32>> = (0..sequences).map(|sequence| tokens(41, sequence)).collect();
    let logits = decode(&mut gpu, &texts, &vec![40; texts.len()], 1).remove(0);
    assert_eq!(gpu.graph_launches(), u64::from(options.graphs), "the decode alone runs as a graph");
    logits
}

#[test]
fn graphs_compute_what_queued_operations_do() {
    // Other algorithms may have been chosen: some roundings to bfloat16 or float16 apart.
    for (options, bound) in [(options(8192), 2e-2), (in_f16(8192), 3e-3)] {
        // Sizes with a graph of their own, and those that are padded to one.
        for sequences in [1, 3, 5, 8, 17, 33] {
            let logits = |graphs| decode_logits(CudaExecutorOptions { graphs, ..options.clone() }, sequences);
            let error = distance(&logits(true), &logits(false));
            println!("{}, {sequences} sequences: relative difference {error:.2e}", options.dtype);
            assert!(error < bound, "{}, {sequences} sequences: {error:.2e}", options.dtype);
        }
    }
}

#[test]
fn steps_that_overlap_sample_what_others_do() {
    // Lengths end the requests, so that batches are the same either way, and so are the algorithms of one executor. Drawn
    // tokens and penalties on them are among them: what a step samples counts in the next before the host knows it.
    let executor = CudaExecutor::load(&source("smollm2-135m"), &options(16_384)).unwrap();
    overlapping_steps_sample_what_others_do(executor);
}

fn overlapping_steps_sample_what_others_do(mut executor: impl ModelExecutor) {
    let mut workload = workload(24);
    for (i, (_, _, sampling)) in workload.iter_mut().enumerate().filter(|(i, _)| i % 3 > 0) {
        let temperature = if i % 2 == 0 { 0.9 } else { 0.0 };
        let (repetition_penalty, frequency_penalty) = if i % 3 == 1 { (1.3, 0.4) } else { (1.0, 0.0) };
        let seed = i as u64;
        *sampling = SamplingParams {
            temperature,
            repetition_penalty,
            frequency_penalty,
            seed,
            ..SamplingParams::default()
        };
    }
    let paged = config(PolicyConfig::Continuous { watermark: 0.0 }, KvLayout::Paged { block_size: 16 }, 200);
    let mut outputs = Vec::new();
    for overlap in [false, true] {
        let scheduler = SchedulerConfig { overlap: Some(overlap), ..paged.scheduler.clone() };
        let (tokens, _, back) = run_over(executor, &EngineConfig { scheduler, ..paged.clone() }, &workload);
        outputs.push(tokens);
        executor = back;
    }
    assert!(outputs[0] == outputs[1], "overlapping steps sampled other tokens");
}

#[test]
fn serving_takes_no_memory() {
    // Everything that asks for room of its own: mixed and decode steps, penalties and their histories, draws, alternatives,
    // and KV memory so short that sequences are swapped.
    let mut workload = workload(24);
    for (i, (_, _, sampling)) in workload.iter_mut().enumerate() {
        *sampling = SamplingParams {
            temperature: if i % 2 == 0 { 0.9 } else { 0.0 },
            repetition_penalty: if i % 3 == 1 { 1.3 } else { 1.0 },
            top_logprobs: if i % 4 == 3 { MAX_TOP_LOGPROBS } else { 0 },
            logprobs: i % 4 == 3,
            seed: i as u64,
            ..SamplingParams::default()
        };
    }
    let paged = config(PolicyConfig::Continuous { watermark: 0.0 }, KvLayout::Paged { block_size: 16 }, 200);
    let config = EngineConfig { preemption: PreemptionConfig::Swap { bytes: 64 << 20 }, ..paged };
    let executor = CudaExecutor::load(&source("smollm2-135m"), &options(1024)).unwrap();
    let mut engine = Engine::new(executor, &config).unwrap();
    let before = engine.executor().allocations();
    let (_, preempted) = serve(&mut engine, &workload);
    assert!(preempted > 0, "the memory was meant to be too small");
    assert_eq!(engine.executor().allocations(), before, "blocks of memory were taken while serving");
}

#[test]
fn batch_invariant_tokens_do_not_depend_on_how_they_are_computed() {
    batch_invariant_tokens(options);
}

#[test]
fn nor_do_they_in_f16() {
    batch_invariant_tokens(in_f16);
}

fn batch_invariant_tokens(options: fn(usize) -> CudaExecutorOptions) {
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
        let batched = config(continuous.clone(), paged, 512);
        let (outputs, _, again) = run_over(executor(16_384), &batched, &workload);
        check("batched", &outputs);
        let in_turn = SchedulerConfig { overlap: Some(false), ..batched.scheduler.clone() };
        check("step by step", &run(again, &EngineConfig { scheduler: in_turn, ..batched }, &workload).0);
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
        // Logits are the same in every run, whatever algorithms are fastest in it.
        let options = CudaExecutorOptions { batch_invariant: true, ..options(4096) };
        let executor = CudaExecutor::load(&source("smollm2-135m"), &options).unwrap();
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
    assert!(error(CudaExecutorOptions { kv_dtype: KvDtype::F32, ..options(64) }).contains("fp8"));
    let huge = CudaExecutorOptions { kv: KvCapacity::Bytes(1 << 50), ..options(64) };
    assert!(error(huge).contains("KV"), "too much KV memory");
    let executor = CudaExecutor::load(&source("smollm2-135m"), &options(4096)).unwrap();
    let tiny = config(PolicyConfig::default(), KvLayout::Paged { block_size: 2 }, 512);
    assert!(Engine::new(executor, &tiny).unwrap_err().to_string().contains("8 to 256"));
}
