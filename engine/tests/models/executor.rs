//! The executor under the engine: tokens do not depend on batching, layout, block size or preemption.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use quire_engine::load::ModelSource;
use quire_engine::model::WeightDtype;
use quire_engine::{
    CpuExecutor, CpuExecutorOptions, Engine, EngineConfig, Event, KvCapacity, KvLayout, PolicyConfig,
    PreemptionConfig, Request, Reservation, SamplingParams, SchedulerConfig,
};
use quire_kernels::KvDtype;

use crate::random_model::{exact_options, golden, load, write_folder};

/// Prompts, how many tokens each is to get, and how they are chosen.
type Workload = Vec<(Vec<u32>, u32, SamplingParams)>;

fn run(executor: CpuExecutor, config: &EngineConfig, workload: &Workload) -> (Vec<Vec<u32>>, u32) {
    let mut engine = Engine::new(executor, config).unwrap();
    let now = Instant::now();
    for (id, (prompt, tokens, sampling)) in workload.iter().enumerate() {
        let request = Request {
            id: id as u64,
            prompt: prompt.clone(),
            max_tokens: *tokens,
            true_output_len: Some(*tokens),
            stop_tokens: Arc::new([]),
            sampling: Arc::new(sampling.clone()),
            fork_of: None,
            beam: None,
            priority: 0,
            cache_salt: 0,
        };
        engine.submit(request, now);
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
    }
    (outputs, preempted)
}

fn config(policy: PolicyConfig, kv: KvLayout, token_budget: u32) -> EngineConfig {
    EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget, ..SchedulerConfig::default() },
        kv,
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: Some(64),
    }
}

fn workload() -> impl Strategy<Value = Workload> {
    let sampling = prop_oneof![
        2 => Just(SamplingParams::default()),
        1 => any::<u64>().prop_map(|seed| SamplingParams {
            temperature: 0.9, top_p: 0.95, top_k: 20, repetition_penalty: 1.1, seed, ..SamplingParams::default()
        }),
    ];
    prop::collection::vec((prop::collection::vec(0u32..96, 1..30), 1u32..20, sampling), 1..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn tokens_do_not_depend_on_how_they_are_computed(
        workload in workload(),
        model in prop_oneof![Just("llama3"), Just("qwen2"), Just("qwen3")],
        dtype in prop_oneof![Just(WeightDtype::Bf16), Just(WeightDtype::F16), Just(WeightDtype::Q8_0), Just(WeightDtype::Q4_1)],
    ) {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &golden(model)["config"], 1);
        let executor = |slots: usize, threads: usize| load(folder.path(), &CpuExecutorOptions {
            dtype,
            kv: KvCapacity::Slots(slots),
            kv_dtype: KvDtype::Bf16,
            max_model_len: Some(64),
            threads: NonZeroUsize::new(threads),
            ..exact_options()
        });
        let continuous = PolicyConfig::Continuous { watermark: 0.0 };
        // One request at a time, its prompt in one piece.
        let mut expected = Vec::new();
        for one in &workload {
            let alone = config(continuous.clone(), KvLayout::Paged { block_size: 16 }, 64);
            expected.extend(run(executor(256, 1), &alone, &vec![one.clone()]).0);
        }
        for block_size in [1, 7, 16, 64] {
            let paged = config(continuous.clone(), KvLayout::Paged { block_size }, 64);
            prop_assert_eq!(&run(executor(512, 2), &paged, &workload).0, &expected);
            // Prompts in pieces of at most 5 tokens, and memory for one sequence at a time.
            let chunked = config(continuous.clone(), KvLayout::Paged { block_size }, 5);
            prop_assert_eq!(&run(executor(64, 2), &chunked, &workload).0, &expected);
        }
        for reservation in [Reservation::Max, Reservation::Pow2, Reservation::Oracle] {
            let contiguous = config(continuous.clone(), KvLayout::Contiguous { reservation }, 64);
            prop_assert_eq!(&run(executor(256, 2), &contiguous, &workload).0, &expected);
        }
        let batches = PolicyConfig::Static { batch_size: 3, timeout_ms: 0 };
        let padded = config(batches, KvLayout::Contiguous { reservation: Reservation::Max }, 64);
        prop_assert_eq!(&run(executor(256, 2), &padded, &workload).0, &expected);
    }
}

#[test]
fn preemption_happens_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &golden("qwen3")["config"], 1);
    let workload: Workload = (0..5u32)
        .map(|i| ((0..8).map(|t| (i * 17 + t * 5) % 96).collect(), 24, SamplingParams::default()))
        .collect();
    let with = |slots| {
        let options =
            CpuExecutorOptions { kv: KvCapacity::Slots(slots), max_model_len: Some(64), ..exact_options() };
        let paged =
            config(PolicyConfig::Continuous { watermark: 0.0 }, KvLayout::Paged { block_size: 4 }, 64);
        run(load(folder.path(), &options), &paged, &workload)
    };
    let (expected, none) = with(256);
    let (tight, preempted) = with(64);
    assert_eq!(none, 0);
    assert!(preempted > 0, "the memory was meant to be too small for five sequences");
    assert_eq!(tight, expected);
}

#[test]
fn limits_are_told_with_what_to_change() {
    let source = ModelSource::parse("dummy:smollm2-135m").unwrap();
    let error = |options: CpuExecutorOptions| CpuExecutor::load(&source, &options).unwrap_err().to_string();
    let small = CpuExecutorOptions { kv: KvCapacity::Bytes(1000), ..exact_options() };
    assert!(error(small).contains("a token of this model takes 46080 bytes"));
    let long = CpuExecutorOptions { max_model_len: Some(10_000), ..exact_options() };
    assert!(error(long).contains("choose 1 to 8192"));
    let none = CpuExecutorOptions { max_batch_rows: 0, ..exact_options() };
    assert!(error(none).contains("at least one row"));
}
