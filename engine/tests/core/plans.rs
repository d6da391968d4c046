//! Golden plans: small scripted scenarios, and every line that a policy planned.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView, SeqKey};
use quire_engine::{
    Engine, EngineConfig, KvLayout, PolicyConfig, PreemptionConfig, Request, Reservation, SchedulerConfig,
};

use crate::fake::{Fake, drain, request};

/// Writes down the plans of another policy. It plugs in as any policy from outside the crate does.
struct Recorder {
    inner: Box<dyn SchedulerPolicy>,
    lines: Arc<Mutex<Vec<String>>>,
    start: Instant,
}

impl SchedulerPolicy for Recorder {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        self.inner.plan(view, plan);
        let running = (0..view.running_len()).map(|index| view.running(index));
        let ids: HashMap<SeqKey, u64> = running.chain(view.waiting()).map(|s| (s.key, s.id)).collect();
        let mut line = String::new();
        for key in &plan.preempt {
            write!(line, "preempt {} ", ids[key]).unwrap();
        }
        for key in &plan.admit {
            write!(line, "admit {} ", ids[key]).unwrap();
        }
        line += "run";
        for (key, tokens) in &plan.run {
            write!(line, " {}:{tokens}", ids[key]).unwrap();
        }
        if plan.padding > 0 {
            write!(line, " pad {}", plan.padding).unwrap();
        }
        if let Some(until) = plan.wait_until {
            write!(line, " until {}", (until - self.start).as_millis()).unwrap();
        }
        self.lines.lock().unwrap().push(line);
    }

    fn ends_together(&self) -> bool {
        self.inner.ends_together()
    }
}

fn plans(scheduler: SchedulerConfig, kv: KvLayout, slots: usize, requests: Vec<Request>) -> Vec<String> {
    let config = EngineConfig {
        scheduler,
        kv,
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: None,
    };
    config.validate().unwrap();
    let lines = Arc::default();
    let start = Instant::now();
    let inner = config.scheduler.policy.build().unwrap();
    let recorder = Box::new(Recorder { inner, lines: Arc::clone(&lines), start });
    let mut engine = Engine::with_policy(Fake::new(slots, 64, 1024), &config, recorder).unwrap();
    for request in requests {
        engine.submit(request, start);
    }
    drain(&mut engine, &mut start.clone(), &mut BTreeMap::new());
    std::mem::take(&mut *lines.lock().unwrap())
}

fn continuous(token_budget: u32, max_running: u32) -> SchedulerConfig {
    SchedulerConfig { token_budget, max_running, ..SchedulerConfig::default() }
}

fn fixed_batches(batch_size: u32, token_budget: u32) -> SchedulerConfig {
    let policy = PolicyConfig::Static { batch_size, timeout_ms: 20 };
    SchedulerConfig { policy, token_budget, ..SchedulerConfig::default() }
}

const PAGED: KvLayout = KvLayout::Paged { block_size: 4 };

#[test]
fn continuous_decodes_first_and_splits_prefill_by_the_budget() {
    let requests = vec![request(1, 6, 4), request(2, 5, 2), request(3, 9, 1)];
    let expected = ["admit 1 admit 2 run 1:6 2:2", "admit 3 run 1:1 2:3 3:4", "run 1:1 2:1 3:5", "run 1:1"];
    assert_eq!(plans(continuous(8, 8), PAGED, 64, requests), expected);
}

#[test]
fn continuous_runs_no_more_than_it_may() {
    let requests = vec![request(1, 2, 3), request(2, 2, 1), request(3, 2, 1)];
    let expected = ["admit 1 admit 2 run 1:2 2:2", "admit 3 run 1:1 3:2", "run 1:1"];
    assert_eq!(plans(continuous(8, 2), PAGED, 64, requests), expected);
}

#[test]
fn continuous_preempts_the_latest_and_recomputes_it() {
    // Four blocks of 4. Both take two, and request 1 needs a third for its ninth token: request 2 gives way with
    // one token delivered, waits until there is room for 8 + 1 of its own, and is computed again.
    let requests = vec![request(1, 8, 4), request(2, 8, 3)];
    let expected = [
        "admit 1 admit 2 run 1:8 2:8",
        "preempt 2 run 1:1",
        "run 1:1",
        "run 1:1",
        "admit 2 run 2:9",
        "run 2:1",
    ];
    assert_eq!(plans(continuous(32, 8), PAGED, 16, requests), expected);
}

#[test]
fn continuous_never_passes_an_older_request() {
    // Request 2 does not fit beside request 1, and request 3, which would, waits behind it.
    let requests = vec![request(1, 8, 2), request(2, 12, 1), request(3, 1, 1)];
    let expected = ["admit 1 run 1:8", "run 1:1", "admit 2 admit 3 run 2:12 3:1"];
    assert_eq!(plans(continuous(32, 8), PAGED, 16, requests), expected);
}

#[test]
fn continuous_keeps_the_watermark_free() {
    let policy = PolicyConfig::Continuous { watermark: 0.5 };
    let scheduler = SchedulerConfig { policy, ..continuous(32, 8) };
    // Three of four blocks leave one free, not two; alone, request 2 may take them all.
    let requests = vec![request(1, 8, 2), request(2, 4, 1), request(3, 16, 1)];
    let expected = ["admit 1 run 1:8", "run 1:1", "admit 2 run 2:4", "admit 3 run 3:16"];
    assert_eq!(plans(scheduler, PAGED, 16, requests), expected);
}

/// fig12 turns classes off by the policy.
#[test]
fn priority_plans_as_continuous_does_where_there_is_one_class() {
    let requests = || (1..=12).map(|id| request(id, 2 + id as u32 * 5 % 11, 1 + id as u32 * 7 % 9)).collect();
    let mut preempted = 0;
    for (token_budget, max_running, kv, slots) in [
        (8, 3, PAGED, 64),
        (16, 8, PAGED, 32),
        (32, 8, PAGED, 24),
        (32, 8, KvLayout::Contiguous { reservation: Reservation::Pow2 }, 64),
    ] {
        let first_come = continuous(token_budget, max_running);
        let by_class = PolicyConfig::Priority { watermark: 0.01, aging_ms: 10_000, chunked: true };
        let by_class = SchedulerConfig { policy: by_class, ..first_come.clone() };
        let expected = plans(first_come, kv, slots, requests());
        preempted += expected.iter().filter(|line| line.contains("preempt")).count();
        assert_eq!(plans(by_class, kv, slots, requests()), expected);
    }
    assert!(preempted > 0, "memory was meant to be short");
}

#[test]
fn priority_without_chunks_computes_whole_prompts_by_class_before_decodes() {
    let policy = PolicyConfig::Priority { watermark: 0.0, aging_ms: 0, chunked: false };
    let scheduler = SchedulerConfig { policy, ..continuous(8, 8) };
    let of_class = |priority, id, prompt, output| Request { priority, ..request(id, prompt, output) };
    // Request 4 would fit beside request 2, but request 3 is better. Longer than a step, that one begins with a step of its own;
    // beside its end request 1 fits, and then request 4, of its class, does not.
    let requests =
        vec![of_class(2, 1, 6, 3), of_class(0, 2, 5, 2), of_class(1, 3, 10, 2), of_class(2, 4, 3, 1)];
    let expected = [
        "admit 2 run 2:5",
        "admit 3 run 3:8",
        "admit 1 run 3:2 1:6",
        "admit 4 run 4:3",
        "run 2:1 3:1 1:1",
        "run 1:1",
    ];
    assert_eq!(plans(scheduler, PAGED, 64, requests), expected);
}

#[test]
fn priority_without_chunks_lets_decodes_go_on_that_have_waited() {
    // A step is a millisecond, and each prompt from the second on fills one and ends with it.
    let served = |aging_ms| {
        let policy = PolicyConfig::Priority { watermark: 0.0, aging_ms, chunked: false };
        let scheduler = SchedulerConfig { policy, ..continuous(8, 8) };
        let stream = (2..=6).map(|id| request(id, 8, 1));
        plans(scheduler, PAGED, 64, std::iter::once(request(1, 4, 3)).chain(stream).collect())
    };
    let prompts = |ids: std::ops::RangeInclusive<u32>| ids.map(|id| format!("admit {id} run {id}:8"));
    let begins = || std::iter::once("admit 1 run 1:4".to_owned());
    let decode = || std::iter::once("run 1:1".to_owned());
    let bounded: Vec<_> =
        begins().chain(prompts(2..=3)).chain(decode()).chain(prompts(4..=5)).chain(decode()).collect();
    assert_eq!(served(2), bounded.into_iter().chain(prompts(6..=6)).collect::<Vec<_>>());
    let unbounded: Vec<_> = begins().chain(prompts(2..=6)).chain(decode()).chain(decode()).collect();
    assert_eq!(served(0), unbounded);
}

#[test]
fn contiguous_reservations_limit_what_runs() {
    let requests = || {
        let with_length = |id| Request { true_output_len: Some(3), ..request(id, 5, 40) };
        vec![with_length(1), with_length(2), with_length(3), with_length(4)]
    };
    let running = |reservation| {
        let kv = KvLayout::Contiguous { reservation };
        plans(continuous(64, 8), kv, 64, requests()).swap_remove(0)
    };
    // The model's limit is all 64 slots; 5 + 4 rounds to regions of 16; 5 + 3 are regions of 8.
    assert_eq!(running(Reservation::Max), "admit 1 run 1:5");
    assert_eq!(running(Reservation::Pow2), "admit 1 admit 2 admit 3 admit 4 run 1:5 2:5 3:5 4:5");
    let kv = |reservation| KvLayout::Contiguous { reservation };
    let tight = |reservation| plans(continuous(64, 8), kv(reservation), 31, requests()).swap_remove(0);
    assert_eq!(tight(Reservation::Pow2), "admit 1 run 1:5");
    assert_eq!(tight(Reservation::Oracle), "admit 1 admit 2 admit 3 run 1:5 2:5 3:5");
}

#[test]
fn a_static_batch_pads_and_ends_together() {
    // The batch of three is full at once. Prompts of 2, 5 and 3 are padded to 5, and outputs of 1, 3 and 2 to 3.
    // Request 4 waits for its batch to fill, in vain, until 20 ms after its arrival.
    let requests = vec![request(1, 2, 1), request(2, 5, 3), request(3, 3, 2), request(4, 2, 2)];
    let expected = [
        "admit 1 admit 2 admit 3 run 1:2 2:5 3:3 pad 5",
        "run 2:1 3:1 pad 1",
        "run 2:1 pad 2",
        "run until 20",
        "admit 4 run 4:2",
        "run 4:1",
    ];
    assert_eq!(plans(fixed_batches(3, 32), PAGED, 64, requests), expected);
}

#[test]
fn a_static_prefill_is_cut_by_columns() {
    // Four columns a step for each of two: request 1 is all padding in the first step.
    let requests = vec![request(1, 3, 1), request(2, 9, 1)];
    let expected = ["admit 1 admit 2 run 2:4 pad 4", "run 1:2 2:4 pad 2", "run 1:1 2:1"];
    assert_eq!(plans(fixed_batches(2, 9), PAGED, 64, requests), expected);
}

#[test]
fn a_static_batch_takes_what_could_fit_at_its_longest() {
    // Each may come to 8 + 4 tokens, three blocks of four; 16 slots are room for one.
    let requests = vec![request(1, 8, 4), Request { true_output_len: Some(1), ..request(2, 8, 4) }];
    let expected = ["admit 1 run 1:8", "run 1:1", "run 1:1", "run 1:1", "run until 20", "admit 2 run 2:8"];
    assert_eq!(plans(fixed_batches(2, 32), PAGED, 16, requests), expected);
}

#[test]
fn a_static_step_frees_nothing_before_its_batch_ends() {
    let scheduler = fixed_batches(2, 32);
    let mut engine = crate::fake::engine(&EngineConfig { scheduler, ..EngineConfig::default() }, 64, 64);
    let start = Instant::now();
    engine.submit(request(1, 4, 1), start);
    engine.submit(request(2, 4, 3), start);
    let mut outcomes = BTreeMap::new();
    crate::fake::turn(&mut engine, start, &mut outcomes);
    assert_eq!((outcomes[&1].tokens.len(), outcomes[&1].end.is_none()), (1, true), "streamed, not ended");
    let steps = drain(&mut engine, &mut (start + Duration::from_millis(1)), &mut outcomes);
    let kv = steps[0].batch.kv;
    // Request 1: 4 used, 12 never to be. Request 2: 5 used, 1 to come, 10 never to be. Two blocks of 16 are free.
    assert_eq!((kv.used, kv.reserved, kv.internal, kv.free), (9, 1, 22, 32));
    assert_eq!((steps[0].batch.running, steps[0].batch.padding_tokens), (1, 1));
    assert!(outcomes[&1].end.is_some());
}
