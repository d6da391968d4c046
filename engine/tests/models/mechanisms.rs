//! Each mechanism, over an executor whose results do not depend on the batch: tokens are those without it. One body for the CPU
//! and, with `gpu-tests`, for a GPU.

mod drafts;
mod long_context;
mod turns;

use std::sync::Arc;
use std::time::Instant;

use quire_engine::load::ModelSource;
use quire_engine::speculation::{DraftModel, Drafter};
use quire_engine::{
    BeamSearch, CpuExecutor, CpuExecutorOptions, DraftLength, DrafterConfig, Engine, EngineConfig,
    EngineParts, Event, Executor, KvCapacity, KvLayout, ModelExecutor, PolicyConfig, PreemptionConfig,
    Progress, Request, SamplingParams, SchedulerConfig, SpeculationConfig, TensorParallel,
};
#[cfg(feature = "gpu-tests")]
use quire_engine::{CudaExecutor, CudaExecutorOptions, model::WeightDtype};
#[cfg(feature = "gpu-tests")]
use quire_kernels::KvDtype;
use tempfile::TempDir;

use crate::random_model::{exact_options, golden, load, write_folder};

/// Tokens of the longest sequence: prompts of up to 40, outputs of 24, and room.
const MODEL_LEN: u32 = 80;
/// KV slots that hold two or three sequences of the workload.
const TIGHT: usize = 160;
/// KV slots that hold them all.
const PLENTY: usize = 2048;
const BLOCK_SIZE: u32 = 8;
const TOKEN_BUDGET: u32 = 64;
/// Tokens an output has.
const OUTPUT: u32 = 24;

/// What a workload led to.
#[derive(Debug, Default)]
struct Served {
    /// Tokens by request.
    outputs: Vec<Vec<u32>>,
    /// Prompt tokens found in a cache, by request.
    found: Vec<u32>,
    /// Why requests were refused.
    refusals: Vec<(u64, String)>,
    preempted: u32,
    swapped: u32,
    drafted: u32,
    accepted: u32,
    /// Sequences whose proposals were refused.
    refused: u32,
    /// KV slots saved by sharing, summed over steps.
    shared: u64,
}

impl Served {
    /// Prompt tokens found in a cache.
    fn cached(&self) -> u32 {
        self.found.iter().sum()
    }
}

/// Prompts that begin alike and repeat themselves; greedy requests, drawn ones, drawn ones with penalties, and classes.
fn workload() -> Vec<Request> {
    (0..12u32)
        .map(|id| Request {
            id: u64::from(id),
            prompt: (0..18 + id * 2)
                .map(|at| if at < 17 { (at % 5) * 7 + 1 } else { (at % 3) * 11 + id })
                .collect(),
            max_tokens: OUTPUT,
            true_output_len: None,
            stop_tokens: Arc::new([]),
            sampling: Arc::new(SamplingParams {
                temperature: if id % 3 == 0 { 0.0 } else { 0.7 },
                repetition_penalty: if id % 3 == 2 { 1.2 } else { 1.0 },
                seed: u64::from(id),
                ..SamplingParams::default()
            }),
            fork_of: None,
            beam: None,
            priority: id as u8 % 3,
            cache_salt: 0,
        })
        .collect()
}

/// Three requests and three forks of each with seeds of their own.
fn forks() -> Vec<Request> {
    let sources = workload().into_iter().skip(1).take(3);
    let all = sources.flat_map(|source| {
        (0..4).map(move |copy| Request {
            fork_of: (copy > 0).then_some(source.id * 4),
            id: source.id * 4 + copy,
            sampling: Arc::new(SamplingParams {
                seed: source.id * 4 + copy,
                temperature: 1.0,
                ..SamplingParams::default()
            }),
            ..source.clone()
        })
    });
    all.enumerate()
        .map(|(place, request)| Request {
            id: place as u64,
            fork_of: request.fork_of.map(|id| id - 4),
            ..request
        })
        .collect()
}

/// Searches of several widths.
fn searches() -> Vec<Request> {
    let greedy = |request: Request| Request { sampling: Arc::default(), ..request };
    let beam =
        |request: Request| Request { beam: Some(BeamSearch::new(2 + request.id as u32 % 3)), ..request };
    workload().into_iter().take(5).map(greedy).map(beam).collect()
}

/// Everything off: one request at a time, its prompt in one piece.
fn nothing() -> EngineConfig {
    EngineConfig {
        scheduler: SchedulerConfig {
            policy: PolicyConfig::Continuous { watermark: 0.0 },
            token_budget: TOKEN_BUDGET,
            max_running: 1,
            overlap: Some(false),
            ..SchedulerConfig::default()
        },
        kv: KvLayout::Paged { block_size: BLOCK_SIZE },
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::Recompute {},
        speculation: None,
        max_model_len: Some(MODEL_LEN),
    }
}

/// Requests side by side.
fn batched() -> EngineConfig {
    let alone = nothing();
    EngineConfig { scheduler: SchedulerConfig { max_running: 16, overlap: None, ..alone.scheduler }, ..alone }
}

fn with_policy(policy: PolicyConfig) -> EngineConfig {
    let batched = batched();
    EngineConfig { scheduler: SchedulerConfig { policy, ..batched.scheduler }, ..batched }
}

fn with_drafter(drafter: DrafterConfig, length: DraftLength) -> EngineConfig {
    EngineConfig { speculation: Some(SpeculationConfig { drafter, length }), ..batched() }
}

fn swap() -> PreemptionConfig {
    PreemptionConfig::Swap { bytes: 1 << 26 }
}

fn serve<E: Executor>(
    executor: E,
    config: &EngineConfig,
    draft: Option<Box<dyn Drafter>>,
    requests: &[Request],
) -> (Served, E) {
    let parts = EngineParts { policy: None, drafter: draft };
    let mut engine = Engine::with_parts(executor, config, parts).unwrap();
    let served = drive(&mut engine, requests);
    (served, engine.into_executor())
}

/// Runs requests, whose ids are their places, to their ends.
fn drive<E: Executor>(engine: &mut Engine<E>, requests: &[Request]) -> Served {
    requests.iter().for_each(|request| engine.submit(request.clone(), Instant::now()));
    let empty = vec![Vec::new(); requests.len()];
    let mut served = Served { outputs: empty, found: vec![0; requests.len()], ..Served::default() };
    while engine.has_work() {
        let output = engine.step(Instant::now()).unwrap();
        engine.check_integrity();
        for event in output.events {
            match event {
                Event::Token { id, sampled } => served.outputs[id as usize].push(sampled.token),
                Event::Hypotheses { id, hypotheses } => {
                    served.outputs[id as usize] =
                        hypotheses.into_iter().flat_map(|found| found.tokens).collect();
                }
                Event::Finished { id, cached_tokens, .. } => served.found[id as usize] = cached_tokens,
                Event::Rejected { id, reason, .. } => served.refusals.push((id, reason)),
                Event::Cancelled { .. } => panic!("{event:?}"),
            }
        }
        if let Progress::Ran(stats) = output.progress {
            served.preempted += stats.batch.preempted;
            served.swapped += stats.batch.swapped_in;
            served.drafted += stats.batch.drafted_tokens;
            served.accepted += stats.batch.accepted_tokens;
            served.refused += stats.batch.refused_drafts;
            served.shared += stats.batch.kv.shared;
        }
    }
    served
}

/// Runs every mechanism over executors of the given numbers of KV slots, all of one model.
fn check<E: ModelExecutor + 'static>(new: impl Fn(usize) -> E) {
    let [mut plenty, mut tight] = [PLENTY, TIGHT].map(|slots| Some(new(slots)));
    let mut run =
        |slots: usize, config: &EngineConfig, draft: Option<Box<dyn Drafter>>, requests: &[Request]| {
            let executor = if slots == TIGHT { &mut tight } else { &mut plenty };
            let (served, back) = serve(executor.take().expect("given back"), config, draft, requests);
            *executor = Some(back);
            served
        };
    let without_sharing = |requests: &[Request]| {
        requests.iter().map(|request| Request { fork_of: None, ..request.clone() }).collect::<Vec<_>>()
    };
    let workloads = [("requests", workload()), ("forks", forks()), ("searches", searches())];
    let [requests, forks, searches] = workloads.map(|(what, requests)| {
        let alone = run(PLENTY, &nothing(), None, &without_sharing(&requests));
        assert!(alone.outputs.iter().all(|output| output.len() >= OUTPUT as usize), "{what}");
        (what, requests, alone.outputs)
    });
    let mut same = |name: &str,
                    slots: usize,
                    config: &EngineConfig,
                    draft: Option<Box<dyn Drafter>>,
                    (what, requests, expected): &(&str, Vec<Request>, Vec<Vec<u32>>)| {
        let served = run(slots, config, draft, requests);
        let differing: Vec<usize> =
            (0..requests.len()).filter(|&i| served.outputs[i] != expected[i]).collect();
        assert!(differing.is_empty(), "{name}: outputs {differing:?} of the {what} differ");
        println!(
            "{name}, {what}: preempted {}, swapped in {}, drafted {}, accepted {}, cached {}",
            served.preempted,
            served.swapped,
            served.drafted,
            served.accepted,
            served.cached()
        );
        served
    };

    for workload in [&requests, &forks, &searches] {
        let served = same("continuous batching", PLENTY, &batched(), None, workload);
        assert_eq!(served.shared > 0, workload.0 != "requests", "samples and beams share their prompts");
        let cached = EngineConfig { prefix_cache: true, ..batched() };
        assert!(same("prefix cache", PLENTY, &cached, None, workload).cached() > 0);
        assert!(same("preemption by recomputation", TIGHT, &batched(), None, workload).preempted > 0);
        let swapping = EngineConfig { preemption: swap(), ..batched() };
        assert!(same("preemption by swap", TIGHT, &swapping, None, workload).swapped > 0);
    }

    let watermark = 0.0;
    same("prefill first", PLENTY, &with_policy(PolicyConfig::PrefillFirst { watermark }), None, &requests);
    let classes = |chunked| with_policy(PolicyConfig::Priority { watermark, aging_ms: 10_000, chunked });
    for (name, chunked) in [("priority classes", true), ("priority classes, prompts first", false)] {
        assert!(same(name, TIGHT, &classes(chunked), None, &requests).preempted > 0);
    }
    same(
        "static batches",
        PLENTY,
        &with_policy(PolicyConfig::Static { batch_size: 5, timeout_ms: 0 }),
        None,
        &requests,
    );
    let few =
        EngineConfig { scheduler: SchedulerConfig { token_budget: 16, ..batched().scheduler }, ..batched() };
    same("chunks within 16 tokens", PLENTY, &few, None, &requests);

    let fixed = DraftLength::Fixed { tokens: 3 };
    for (name, drafter) in [
        ("n-grams", DrafterConfig::NGram { longest: 3, shortest: 1 }),
        ("suffixes", DrafterConfig::Suffix { depth: 8 }),
        ("early exit", DrafterConfig::EarlyExit { layers: 1 }),
    ] {
        for (length, slots) in [(fixed, PLENTY), (fixed, TIGHT), (DraftLength::Adaptive { most: 4 }, PLENTY)]
        {
            let served = same(name, slots, &with_drafter(drafter.clone(), length), None, &requests);
            assert!(served.drafted > 0, "{name}");
        }
    }
    let draft = || Some(Box::new(DraftModel::new(Box::new(new(PLENTY)))) as Box<dyn Drafter>);
    let served = same(
        "draft model (itself)",
        TIGHT,
        &with_drafter(DrafterConfig::Model {}, fixed),
        draft(),
        &requests,
    );
    assert!(served.accepted > served.drafted / 2, "a model accepts what it proposes");

    let all = |chunked| EngineConfig {
        prefix_cache: true,
        preemption: swap(),
        speculation: Some(SpeculationConfig {
            drafter: DrafterConfig::NGram { longest: 3, shortest: 1 },
            length: DraftLength::Adaptive { most: 4 },
        }),
        ..classes(chunked)
    };
    for workload in [&forks, &searches] {
        for (name, slots, preemption) in [
            ("nothing shared", PLENTY, PreemptionConfig::Recompute {}),
            ("nothing shared, preemption by recomputation", TIGHT, PreemptionConfig::Recompute {}),
            ("nothing shared, preemption by swap", TIGHT, swap()),
        ] {
            let config = EngineConfig { share_blocks: false, preemption, ..batched() };
            let served = same(name, slots, &config, None, workload);
            assert_eq!((served.shared, served.cached()), (0, 0), "{name}");
            assert!(slots == PLENTY || served.preempted > 0, "{name}");
        }
        // The cache may still find what others have.
        let cached = EngineConfig { share_blocks: false, prefix_cache: true, ..batched() };
        assert!(same("nothing but the prefix cache", PLENTY, &cached, None, workload).cached() > 0);
    }
    for workload in [&requests, &forks, &searches] {
        same("everything", TIGHT, &all(true), None, workload);
        same("everything but chunks", TIGHT, &all(false), None, workload);
    }
}

/// A folder with a small model of `tests/golden` for sequences of [`MODEL_LEN`].
fn folder(of: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = golden(of)["config"].clone();
    config["max_position_embeddings"] = MODEL_LEN.into();
    write_folder(folder.path(), &config, 1);
    folder
}

fn on_cpu(folder: &TempDir, slots: usize) -> CpuExecutor {
    load(folder.path(), &CpuExecutorOptions { kv: KvCapacity::Slots(slots), ..exact_options() })
}

#[test]
fn the_cpus_tokens_are_those_without_any() {
    let folder = folder("qwen3");
    check(|slots| on_cpu(&folder, slots));
}

#[test]
fn the_tokens_of_two_ranks_are_those_without_any() {
    let folder = folder("qwen3");
    let source =
        ModelSource::parse(folder.path().to_str().expect("a path of ASCII")).expect("a model of ours");
    check(|slots| {
        let options = CpuExecutorOptions { kv: KvCapacity::Slots(slots), ..exact_options() };
        TensorParallel::load_cpu(&source, &options, 2, &mut |_, _| {}).expect("heads and widths that divide")
    });
}

#[test]
fn the_cpus_tokens_are_those_without_another_model_that_proposes() {
    let (target, other) = (folder("qwen3"), folder("llama3"));
    let [accepted, refused] = drafts::check(|slots| on_cpu(&target, slots), |slots| on_cpu(&other, slots));
    assert!(accepted > 0 && refused > 0, "{accepted} accepted and {refused} refused");
}

#[test]
fn the_cpus_second_turns_find_the_first_ones_answers() {
    let folder = folder("qwen3");
    turns::check(|slots| on_cpu(&folder, slots));
}

#[test]
fn the_cpus_long_contexts_give_what_each_gives_alone() {
    let folder = long_context::folder();
    // A CPU's time for attention grows with the square of it.
    let model_len = long_context::MODEL_LEN / 8;
    long_context::check(model_len, |slots| {
        let options = CpuExecutorOptions {
            kv: KvCapacity::Slots(slots),
            max_model_len: Some(model_len as usize),
            max_batch_rows: long_context::ROWS as usize,
            ..exact_options()
        };
        load(folder.path(), &options)
    });
}

#[cfg(feature = "gpu-tests")]
fn gpu_options(slots: usize) -> CudaExecutorOptions {
    CudaExecutorOptions {
        dtype: WeightDtype::Bf16,
        kv: KvCapacity::Slots(slots),
        kv_dtype: KvDtype::Bf16,
        max_model_len: Some(MODEL_LEN as usize),
        max_batch_rows: TOKEN_BUDGET as usize,
        max_sequences: 16,
        batch_invariant: true,
        ..CudaExecutorOptions::default()
    }
}

#[cfg(feature = "gpu-tests")]
fn on_gpu(model: &str, options: &CudaExecutorOptions) -> CudaExecutor {
    CudaExecutor::load(&ModelSource::parse(model).expect("a model of ours"), options).expect("a GPU")
}

#[cfg(feature = "gpu-tests")]
#[test]
fn a_gpus_tokens_are_those_without_any() {
    for (dtype, kv_dtype) in [(WeightDtype::Bf16, KvDtype::Bf16), (WeightDtype::F16, KvDtype::F16)] {
        println!("{dtype}:");
        check(|slots| {
            on_gpu("dummy:smollm2-135m", &CudaExecutorOptions { dtype, kv_dtype, ..gpu_options(slots) })
        });
    }
}

#[cfg(feature = "gpu-tests")]
#[test]
#[ignore = "needs two GPUs: scripts/gpu-check --two"]
fn two_gpus_tokens_are_those_without_any() {
    let source = ModelSource::parse("dummy:qwen3-0.6b").expect("a known shape");
    check(|slots| {
        TensorParallel::load_cuda(&source, &gpu_options(slots), 2, &mut |_, _| {}).expect("two GPUs")
    });
}

#[cfg(feature = "gpu-tests")]
#[test]
fn a_gpus_tokens_are_those_without_another_model_that_proposes() {
    let [accepted, refused] = drafts::check(
        |slots| on_gpu("dummy:smollm2-135m", &gpu_options(slots)),
        |slots| on_gpu("dummy:smollm2-135m:1", &gpu_options(slots)),
    );
    // Of 49,152 tokens, two models with random weights may choose none alike.
    assert!(refused > 0, "{accepted} accepted and {refused} refused");
}

#[cfg(feature = "gpu-tests")]
#[test]
fn a_gpus_second_turns_find_the_first_ones_answers() {
    turns::check(|slots| on_gpu("dummy:smollm2-135m", &gpu_options(slots)));
}

#[cfg(feature = "gpu-tests")]
#[test]
fn a_gpus_long_contexts_give_what_each_gives_alone() {
    let folder = long_context::folder();
    let model = folder.path().to_str().expect("a path of ASCII");
    long_context::check(long_context::MODEL_LEN, |slots| {
        let options = CudaExecutorOptions {
            max_model_len: Some(long_context::MODEL_LEN as usize),
            max_batch_rows: long_context::ROWS as usize,
            ..gpu_options(slots)
        };
        on_gpu(model, &options)
    });
}
