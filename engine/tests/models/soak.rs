//! A randomized soak: engines of random settings, one after the other over one executor, under random arrivals,
//! cancellations, lengths and sampling rules. The invariants are checked in every step, and where results do not depend
//! on the batch, requests are run again alone and must come out the same.
//!
//! `QUIRE_SOAK_SECONDS` says for how long (default 5): `scripts/gpu-check --soak` runs it for eight minutes on a GPU.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_engine::speculation::{DraftModel, Drafter};
use quire_engine::{
    BeamSearch, CpuExecutorOptions, DraftLength, DrafterConfig, Engine, EngineConfig, EngineParts, Event,
    Executor, FinishReason, Hypothesis, KvCapacity, KvLayout, PolicyConfig, PreemptionConfig, Progress,
    Request, Reservation, Sampled, SamplingParams, SchedulerConfig, SpeculationConfig,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::random_model::{exact_options, golden, load, write_folder};

/// Sequences that run together at most.
const SEQUENCES: u32 = 48;
/// Rows of a batch at most.
const ROWS: u32 = 256;
/// Turns of the loop in which requests come.
const TURNS: u32 = 150;
/// Turns within which the rest must have ended.
const DRAIN: u32 = 200_000;
/// Requests of a round that are run again alone.
const AGAIN: usize = 6;
/// Blocks of the KV memory in which they are: every subject takes this size.
const AGAIN_BLOCK: u32 = 16;

/// What is to be soaked.
#[derive(Debug, Clone, Copy)]
struct Subject {
    /// Block sizes that it takes.
    blocks: &'static [u32],
    /// Whether a request's tokens depend on nothing but the request.
    invariant: bool,
    /// The longest sequence.
    model_len: u32,
    /// KV slots: few enough that sequences are preempted.
    slots: u32,
    /// Size of the vocabulary.
    vocab: u32,
}

/// What has become of a request.
#[derive(Debug)]
struct Fate {
    request: Request,
    sampled: Vec<Sampled>,
    cancelled: bool,
    end: Option<Event>,
}

/// What was seen, to say at the end.
#[derive(Debug, Default)]
struct Seen {
    rounds: u32,
    steps: u64,
    tokens: u64,
    finished: u64,
    cancelled: u64,
    rejected: u64,
    preemptions: u64,
    cached_tokens: u64,
    beams: u64,
    /// Rounds in which a draft model proposed.
    draft_models: u32,
    drafted: u64,
    accepted: u64,
    again: u64,
}

fn duration() -> Duration {
    let seconds =
        std::env::var("QUIRE_SOAK_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
    Duration::from_secs(seconds.unwrap_or(5))
}

/// `draft` loads another model, which proposes in some rounds.
fn soak<E: Executor, D: Executor + 'static>(
    mut executor: E,
    draft: impl Fn() -> D,
    subject: Subject,
    until: Instant,
    seed: u64,
) -> Seen {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut seen = Seen::default();
    while Instant::now() < until || seen.rounds == 0 {
        let config = random_config(&mut rng, subject);
        let context = format!("round {} of seed {seed} with {config:?}", seen.rounds);
        let (fates, back) = round(executor, &draft, &config, subject, &mut rng, &mut seen, &context);
        executor = back;
        for fate in &fates {
            check(fate, &config, subject, &context);
        }
        if subject.invariant {
            executor = run_again(executor, &config, &fates, &mut seen, &context);
        }
        seen.rounds += 1;
    }
    // What it is there for must have come about, where there was time: three rounds in ten have drafters at most, and one in
    // four of these a draft model.
    let occurred = [
        (10, seen.preemptions.min(seen.beams).min(seen.cancelled).min(seen.finished).min(seen.cached_tokens)),
        (30, seen.accepted),
        (100, u64::from(seen.draft_models)),
    ];
    for (rounds, least) in occurred {
        assert!(seen.rounds < rounds || least > 0, "not in {rounds} rounds: {seen:?}");
    }
    seen
}

fn random_config(rng: &mut StdRng, subject: Subject) -> EngineConfig {
    let kv = match rng.random_range(0..6) {
        0 => KvLayout::Contiguous { reservation: Reservation::Max },
        1 => KvLayout::Contiguous { reservation: Reservation::Pow2 },
        2 => KvLayout::Contiguous { reservation: Reservation::Oracle },
        _ => KvLayout::Paged { block_size: subject.blocks[rng.random_range(0..subject.blocks.len())] },
    };
    let is_paged = matches!(kv, KvLayout::Paged { .. });
    let few = rng.random_bool(0.3);
    let token_budget = rng.random_range(if few { 1..16 } else { 16..ROWS + 1 });
    let max_running = rng.random_range(1..SEQUENCES + 1);
    let policy = if rng.random_bool(0.2) {
        let batch_size = rng.random_range(1..9).min(max_running).min(token_budget);
        PolicyConfig::Static { batch_size, timeout_ms: rng.random_range(0..3) }
    } else {
        let spare = rng.random_range(0.0..0.1);
        let watermark = if is_paged { spare } else { 0.0 };
        match rng.random_range(0..5) {
            0 => PolicyConfig::PrefillFirst { watermark },
            1 | 2 => PolicyConfig::Priority {
                watermark,
                aging_ms: rng.random_range(0..3),
                chunked: rng.random_bool(0.5),
            },
            _ => PolicyConfig::Continuous { watermark },
        }
    };
    let prefix_cache = is_paged && rng.random_bool(0.5);
    let share_blocks = !is_paged || rng.random_bool(0.7);
    let is_static = matches!(policy, PolicyConfig::Static { .. });
    let speculation = (!is_static && rng.random_bool(0.3)).then(|| random_speculation(rng));
    let overlap = speculation.is_none().then(|| rng.random_bool(0.7));
    let scheduler = SchedulerConfig { policy, token_budget, max_running, max_waiting: 64, overlap };
    EngineConfig {
        scheduler,
        kv,
        prefix_cache,
        share_blocks,
        preemption: match is_static || rng.random_bool(0.5) {
            true => PreemptionConfig::Recompute {},
            // A token of the largest model takes 23,040 bytes; less than one is refused.
            false => PreemptionConfig::Swap { bytes: 1 << rng.random_range(15..22) },
        },
        speculation,
        max_model_len: Some(rng.random_range(subject.model_len / 8..subject.model_len + 1)),
    }
}

fn random_speculation(rng: &mut StdRng) -> SpeculationConfig {
    let most = rng.random_range(1..6);
    SpeculationConfig {
        drafter: match rng.random_range(0..4) {
            0 => DrafterConfig::NGram { longest: 3, shortest: 1 },
            1 => DrafterConfig::Suffix { depth: 8 },
            2 => DrafterConfig::Model {},
            _ => DrafterConfig::EarlyExit { layers: 1 },
        },
        length: match rng.random_bool(0.5) {
            true => DraftLength::Fixed { tokens: most },
            false => DraftLength::Adaptive { most },
        },
    }
}

fn random_request(rng: &mut StdRng, id: u64, subject: Subject) -> Request {
    let Subject { model_len, vocab, .. } = subject;
    // Mostly short, sometimes as long as may be or longer.
    let length = |rng: &mut StdRng| match rng.random_range(0..10) {
        0 => rng.random_range(1..model_len * 9 / 8),
        1..=3 => rng.random_range(1..model_len / 3),
        _ => rng.random_range(1..model_len / 12),
    };
    let (prompt, output) = (length(rng), length(rng));
    // Few distinct tokens, so that penalties have something to act on, and few beginnings, so that prefixes are found.
    let distinct = vocab.min(64);
    let first = rng.random_range(0..vocab - distinct + 1);
    let (common, beginning) = (rng.random_range(0..prompt + 1), rng.random_range(0..3));
    let mut sampling =
        SamplingParams { seed: rng.random(), logprobs: rng.random_bool(0.3), ..SamplingParams::default() };
    if rng.random_bool(0.4) {
        sampling.temperature = rng.random_range(0.1..2.0);
        sampling.top_k = if rng.random_bool(0.5) { rng.random_range(1..100) } else { 0 };
        sampling.top_p = if rng.random_bool(0.5) { rng.random_range(0.05..1.0) } else { 1.0 };
        sampling.min_p = if rng.random_bool(0.3) { rng.random_range(0.0..0.3) } else { 0.0 };
    }
    if rng.random_bool(0.2) {
        sampling.repetition_penalty = rng.random_range(0.8..1.5);
        sampling.frequency_penalty = rng.random_range(-0.5..1.0);
    }
    let beam = rng.random_bool(0.1).then(|| BeamSearch {
        length_penalty: rng.random_range(-1.0..2.0),
        ..BeamSearch::new(rng.random_range(1..6))
    });
    if beam.is_some() {
        sampling = SamplingParams::default();
    }
    let stops = vocab / 24;
    let stop = rng.random_range(0..vocab - stops);
    Request {
        id,
        prompt: (0..prompt)
            .map(|at| match at < common {
                true => (beginning * 31 + at * 7) % vocab,
                false => first + rng.random_range(0..distinct),
            })
            .collect(),
        max_tokens: output,
        true_output_len: rng.random_bool(0.5).then(|| rng.random_range(1..output + 1)),
        stop_tokens: if rng.random_bool(0.3) { (stop..stop + stops).collect() } else { Arc::from([]) },
        sampling: Arc::new(sampling),
        fork_of: None,
        beam,
        priority: rng.random_range(0..3),
        cache_salt: rng.random_range(0..2),
    }
}

/// Runs one engine through bursts of requests and to its end.
fn round<E: Executor, D: Executor + 'static>(
    executor: E,
    draft: impl Fn() -> D,
    config: &EngineConfig,
    subject: Subject,
    rng: &mut StdRng,
    seen: &mut Seen,
    context: &str,
) -> (Vec<Fate>, E) {
    let proposes = config.speculation.as_ref().is_some_and(|s| s.drafter == DrafterConfig::Model {});
    let drafter = proposes.then(|| Box::new(DraftModel::new(Box::new(draft()))) as Box<dyn Drafter>);
    seen.draft_models += u32::from(proposes);
    let mut engine = Engine::with_parts(executor, config, EngineParts { policy: None, drafter })
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    let mut fates: BTreeMap<u64, Fate> = BTreeMap::new();
    for turn in 0.. {
        if turn < TURNS && rng.random_bool(0.3) {
            for _ in 0..rng.random_range(1..8) {
                let id = fates.len() as u64;
                let request = random_request(rng, id, subject);
                engine.submit(request.clone(), Instant::now());
                fates.insert(id, Fate { request, sampled: Vec::new(), cancelled: false, end: None });
            }
        }
        if rng.random_bool(0.03) && !fates.is_empty() {
            let id = rng.random_range(0..fates.len() as u64);
            engine.cancel(id);
            fates.get_mut(&id).expect("submitted").cancelled = true;
        }
        if turn < TURNS && rng.random_bool(0.1) && !fates.is_empty() {
            let id = fates.len() as u64;
            let source = &fates[&rng.random_range(0..id)].request;
            let drawn = random_request(rng, id, subject);
            let request = Request {
                prompt: source.prompt.clone(),
                fork_of: Some(source.id),
                cache_salt: source.cache_salt,
                ..drawn
            };
            engine.submit(request.clone(), Instant::now());
            fates.insert(id, Fate { request, sampled: Vec::new(), cancelled: false, end: None });
        }
        let output = engine.step(Instant::now()).unwrap_or_else(|error| panic!("{context}: {error}"));
        engine.check_integrity();
        for event in output.events {
            take(&mut fates, event, seen, context);
        }
        if let Progress::Ran(stats) = output.progress {
            seen.steps += 1;
            seen.drafted += u64::from(stats.batch.drafted_tokens);
            seen.accepted += u64::from(stats.batch.accepted_tokens);
        }
        if turn >= TURNS && !engine.has_work() {
            break;
        }
        assert!(turn < DRAIN, "{context}: no end: {engine:?}");
    }
    (fates.into_values().collect(), engine.into_executor())
}

/// The best output of a search.
fn best_of(hypotheses: Vec<Hypothesis>) -> Vec<Sampled> {
    let best = hypotheses.into_iter().next().expect("a search finds something");
    let sampled = |token| Sampled { token, logprob: None, top: None };
    best.tokens.into_iter().map(sampled).collect()
}

fn take(fates: &mut BTreeMap<u64, Fate>, event: Event, seen: &mut Seen, context: &str) {
    let id = event.id();
    let fate =
        fates.get_mut(&id).unwrap_or_else(|| panic!("{context}: an event of request {id}, which never was"));
    assert!(fate.end.is_none(), "{context}: request {id} goes on after its end: {event:?}");
    match event {
        Event::Token { sampled, .. } => {
            seen.tokens += 1;
            fate.sampled.push(sampled);
            return;
        }
        Event::Hypotheses { hypotheses, .. } => {
            seen.beams += 1;
            fate.sampled = best_of(hypotheses);
            return;
        }
        Event::Finished { preemptions, cached_tokens, .. } => {
            seen.finished += 1;
            seen.preemptions += u64::from(preemptions);
            seen.cached_tokens += u64::from(cached_tokens);
        }
        Event::Rejected { .. } => seen.rejected += 1,
        Event::Cancelled { .. } => seen.cancelled += 1,
    }
    fate.end = Some(event);
}

/// Whether a request's end is one that it can have.
fn check(fate: &Fate, config: &EngineConfig, subject: Subject, context: &str) {
    let Fate { request, sampled, cancelled, end } = fate;
    let context = format!("{context}: {request:?} got {sampled:?} and {end:?}");
    let model_len = config.max_model_len.expect("set");
    let (prompt, output) = (request.prompt.len() as u32, sampled.len() as u32);
    for one in sampled {
        assert_eq!(one.logprob.is_some(), request.sampling.logprobs, "{context}");
        assert!(one.logprob.is_none_or(|logprob| logprob <= 0.0), "{context}");
    }
    let stops = |one: &Sampled| request.stop_tokens.contains(&one.token);
    let early = sampled.iter().rev().skip(1).any(stops);
    assert!(!early && request.true_output_len.is_none_or(|len| output <= len), "{context}");
    assert!(output <= request.max_tokens && (prompt + output <= model_len || output == 0), "{context}");
    match end.as_ref().unwrap_or_else(|| panic!("{context}: no end")) {
        Event::Finished { reason: FinishReason::Stop, .. } => {
            assert!(
                Some(output) == request.true_output_len || sampled.last().is_some_and(stops),
                "{context}"
            );
        }
        Event::Finished { reason: FinishReason::Length, .. } => {
            assert!(output == request.max_tokens || prompt + output == model_len, "{context}");
        }
        Event::Finished { reason: FinishReason::KvExhausted, .. } => {
            assert!(prompt + output > subject.slots / 2, "{context}");
        }
        Event::Rejected { .. } => assert!(sampled.is_empty(), "{context}"),
        Event::Cancelled { .. } => assert!(cancelled, "{context}"),
        Event::Token { .. } | Event::Hypotheses { .. } => unreachable!("a token is no end"),
    }
}

/// Runs some of the finished requests again, each alone, with every mechanism off or fixed: nothing of what was tested has a part
/// in what it is held against but the model's limit.
fn run_again<E: Executor>(
    mut executor: E,
    config: &EngineConfig,
    fates: &[Fate],
    seen: &mut Seen,
    context: &str,
) -> E {
    let scheduler = SchedulerConfig {
        policy: PolicyConfig::Continuous { watermark: 0.0 },
        token_budget: ROWS,
        max_running: 1,
        max_waiting: 1,
        overlap: Some(false),
    };
    let alone = EngineConfig {
        scheduler,
        kv: KvLayout::Paged { block_size: AGAIN_BLOCK },
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::Recompute {},
        speculation: None,
        max_model_len: config.max_model_len,
    };
    let finished = |fate: &&Fate| match fate.end {
        // How much KV one sequence can have depends on the layout.
        Some(Event::Finished { reason: FinishReason::KvExhausted, .. }) => false,
        Some(Event::Finished { .. }) => !fate.sampled.is_empty(),
        _ => false,
    };
    for fate in fates.iter().filter(finished).take(AGAIN) {
        let mut engine = Engine::new(executor, &alone).expect("valid as before");
        engine.submit(fate.request.clone(), Instant::now());
        let mut sampled = Vec::new();
        while engine.has_work() {
            for event in engine.step(Instant::now()).expect("works as before").events {
                match event {
                    Event::Token { sampled: one, .. } => sampled.push(one),
                    Event::Hypotheses { hypotheses, .. } => sampled = best_of(hypotheses),
                    _ => {}
                }
            }
        }
        assert_eq!(sampled, fate.sampled, "{context}: {:?} alone", fate.request);
        seen.again += 1;
        executor = engine.into_executor();
    }
    executor
}

#[test]
fn the_cpu_bears_a_soak() {
    let [folder, other] = ["qwen3", "llama3"].map(|name| {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &golden(name)["config"], 1);
        folder
    });
    let subject = Subject { blocks: &[1, 3, 16, 64], invariant: true, model_len: 64, slots: 160, vocab: 96 };
    let options = CpuExecutorOptions {
        kv: KvCapacity::Slots(subject.slots as usize),
        max_model_len: Some(subject.model_len as usize),
        max_batch_rows: ROWS as usize,
        ..exact_options()
    };
    let executor = load(folder.path(), &options);
    let draft = || load(other.path(), &options);
    println!("{:?}", soak(executor, draft, subject, Instant::now() + duration(), 1));
}

#[cfg(feature = "gpu-tests")]
#[test]
fn a_gpu_bears_a_soak() {
    use quire_engine::{CudaExecutor, CudaExecutorOptions, load::ModelSource, model::WeightDtype};
    use quire_kernels::KvDtype;
    let modes = [
        (WeightDtype::Bf16, KvDtype::Bf16, false),
        (WeightDtype::Bf16, KvDtype::Bf16, true),
        (WeightDtype::Bf16, KvDtype::Fp8, true),
        (WeightDtype::F16, KvDtype::F16, true),
    ];
    for (dtype, kv_dtype, batch_invariant) in modes {
        let subject = Subject {
            blocks: &[8, 16, 64, 256],
            invariant: batch_invariant,
            model_len: 512,
            slots: 640,
            vocab: 49_152,
        };
        let options = CudaExecutorOptions {
            kv: KvCapacity::Slots(subject.slots as usize),
            max_model_len: Some(subject.model_len as usize),
            max_batch_rows: ROWS as usize,
            max_sequences: SEQUENCES as usize,
            dtype,
            kv_dtype,
            batch_invariant,
            ..CudaExecutorOptions::default()
        };
        let model = ModelSource::parse("dummy:smollm2-135m").expect("a shape of ours");
        let executor = CudaExecutor::load(&model, &options).expect("a GPU");
        let other = ModelSource::parse("dummy:smollm2-135m:1").expect("another seed");
        let draft = || CudaExecutor::load(&other, &options).expect("a GPU");
        let seen = soak(executor, draft, subject, Instant::now() + duration() / modes.len() as u32, 2);
        let kv = kv_dtype.name();
        println!("{dtype}, KV of {kv}, batch_invariant = {batch_invariant}: {seen:?}");
    }
}
