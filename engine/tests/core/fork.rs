//! Several outputs of one prompt.

use std::collections::BTreeMap;
use std::time::Instant;

use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView, SeqView};
use quire_engine::{Engine, EngineConfig, Event, KvLayout, PolicyConfig, Progress, Request, SchedulerConfig};

use crate::fake::{Fake, Outcome, drain, engine, reference, request, turn};

fn config(block_size: u32) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    EngineConfig {
        scheduler: SchedulerConfig { policy, token_budget: 8, ..SchedulerConfig::default() },
        kv: KvLayout::Paged { block_size },
        ..EngineConfig::default()
    }
}

/// A request and forks of it with outputs of these lengths.
fn samples(prompt: u32, outputs: &[u32]) -> Vec<Request> {
    let first = request(0, prompt, 1);
    let sample = |(id, &max_tokens): (u64, &u32)| Request {
        id,
        max_tokens,
        fork_of: (id > 0).then_some(0),
        ..first.clone()
    };
    (0..).zip(outputs).map(sample).collect()
}

fn cached(outcome: &Outcome) -> u32 {
    match outcome.end {
        Some(Event::Finished { cached_tokens, .. }) => cached_tokens,
        ref other => panic!("{other:?}"),
    }
}

fn turns(engine: &mut Engine<Fake>, now: Instant, outcomes: &mut BTreeMap<u64, Outcome>, turns: u32) {
    (0..turns).for_each(|_| _ = turn(engine, now, outcomes));
}

#[test]
fn a_prompt_is_computed_once_and_its_blocks_are_shared() {
    // 19 tokens: 4 full blocks and, of the 18 that forks need, 2 tokens more.
    let asked = samples(19, &[6, 9, 3, 6]);
    let mut engine = engine(&config(4), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    let mut steps = Vec::new();
    while steps.len() < 4 {
        if let Progress::Ran(stats) = turn(&mut engine, now, &mut outcomes) {
            steps.push(stats.batch);
        }
    }
    // Three steps for the prompt, the forks held; then each computes the prompt's last token again.
    assert_eq!(steps.iter().map(|s| s.prefill_tokens).collect::<Vec<_>>(), [8, 8, 3, 3]);
    assert_eq!(steps.iter().map(|s| s.waiting).collect::<Vec<_>>(), [3, 3, 3, 0]);
    // 4 blocks shared, and one or two of each own.
    assert_eq!(steps[3].kv.free, 64 - 4 * (4 + 4));
    drain(&mut engine, &mut now, &mut outcomes);
    for request in &asked {
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
        assert_eq!(cached(&outcomes[&request.id]), if request.id > 0 { 18 } else { 0 });
    }
}

#[test]
fn without_sharing_each_sample_computes_its_prompt() {
    let asked = samples(19, &[6, 9, 3, 6]);
    let config = EngineConfig { share_blocks: false, ..config(4) };
    let mut engine = engine(&config, 128, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    let (mut prefilled, mut waited) = (0, 0);
    while engine.has_work() {
        if let Progress::Ran(stats) = turn(&mut engine, now, &mut outcomes) {
            assert_eq!(stats.batch.kv.shared, 0);
            (prefilled, waited) = (prefilled + stats.batch.prefill_tokens, waited.max(stats.batch.waiting));
        }
        now += std::time::Duration::from_millis(1);
    }
    // Nobody waits for another's prompt: only for rows, of which the first takes all 8.
    assert_eq!((prefilled, waited), (4 * 19, 3));
    for request in &asked {
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 128).0);
        assert_eq!(cached(&outcomes[&request.id]), 0);
    }
}

#[test]
fn a_fork_whose_source_is_gone_computes_for_itself() {
    for block_size in [1, 4, 16] {
        let asked = samples(19, &[6, 9, 3]);
        let mut engine = engine(&config(block_size), 64, 64);
        let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
        asked.iter().for_each(|request| engine.submit(request.clone(), now));
        turns(&mut engine, now, &mut outcomes, 1);
        engine.cancel(0);
        drain(&mut engine, &mut now, &mut outcomes);
        for request in &asked[1..] {
            assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
        }
        // One that ended before it was asked for, and one in contiguous memory.
        engine.submit(Request { fork_of: Some(1), ..request(7, 5, 4) }, now);
        drain(&mut engine, &mut now, &mut outcomes);
        assert_eq!(outcomes[&7].tokens.len(), 4);
    }
}

#[test]
fn a_sample_that_runs_stands_in_for_a_source_that_is_gone() {
    // Two run at a time: each that ends lets one in, which finds the prompt with the other.
    let asked = samples(19, &[2, 9, 12, 9, 9]);
    let base = config(4);
    let scheduler = SchedulerConfig { max_running: 2, ..base.scheduler.clone() };
    let mut engine = engine(&EngineConfig { scheduler, ..base }, 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    drain(&mut engine, &mut now, &mut outcomes);
    for request in &asked {
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
        assert_eq!(cached(&outcomes[&request.id]), if request.id > 0 { 18 } else { 0 });
    }
    // One that is asked for when its source has ended has none.
    engine.submit(Request { id: 7, fork_of: Some(0), ..asked[1].clone() }, now);
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(cached(&outcomes[&7]), 0);
}

#[test]
fn a_fork_may_come_late_and_must_have_the_same_prompt() {
    let asked = samples(19, &[20, 9]);
    let mut engine = engine(&config(4), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(asked[0].clone(), now);
    turns(&mut engine, now, &mut outcomes, 7);
    engine.submit(asked[1].clone(), now);
    engine.submit(Request { fork_of: Some(0), ..request(5, 19, 4) }, now);
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(outcomes[&1].tokens, reference(&asked[1], 64, 64).0);
    assert_eq!(cached(&outcomes[&1]), 18);
    let Some(Event::Rejected { reason, .. }) = &outcomes[&5].end else { panic!("{:?}", outcomes[&5]) };
    assert!(reason.contains("whose prompt or salt is another"), "{reason}");
}

#[test]
fn forks_fill_the_static_batch_of_their_source() {
    let policy = PolicyConfig::Static { batch_size: 4, timeout_ms: u64::MAX };
    let scheduler = SchedulerConfig { policy, token_budget: 8, ..SchedulerConfig::default() };
    let asked = samples(19, &[6, 9, 3, 6]);
    let mut engine = engine(&EngineConfig { scheduler, ..config(4) }, 256, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    let first = turn(&mut engine, now, &mut outcomes);
    assert!(matches!(first, Progress::Ran(_)), "a full batch waits for nothing: {first:?}");
    let steps = drain(&mut engine, &mut now, &mut outcomes);
    assert!(steps.len() < 25, "they run together: {} steps", steps.len());
    for request in &asked {
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 256).0);
    }
}

#[test]
fn a_held_fork_can_be_cancelled() {
    let asked = samples(19, &[6, 9, 3]);
    let mut engine = engine(&config(4), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    turns(&mut engine, now, &mut outcomes, 1);
    engine.cancel(1);
    drain(&mut engine, &mut now, &mut outcomes);
    assert!(matches!(outcomes[&1].end, Some(Event::Cancelled { .. })));
    assert_eq!(outcomes[&2].tokens, reference(&asked[2], 64, 64).0);
}

/// Runs everything; preempts request 1 at its fourth plan, and request 0 as request 1 comes back.
#[derive(Default)]
struct TradesPlaces(u32);

impl SchedulerPolicy for TradesPlaces {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        self.0 += 1;
        let running = (0..view.running_len()).map(|index| view.running(index));
        let (preempted, stay): (Vec<SeqView>, Vec<SeqView>) =
            running.partition(|s| (self.0 == 8 && s.id == 1) || (self.0 == 9 && s.id == 0));
        let admitted: Vec<SeqView> = if self.0 == 8 { Vec::new() } else { view.waiting().collect() };
        plan.preempt.extend(preempted.iter().map(|s| s.key));
        plan.admit.extend(admitted.iter().map(|s| s.key));
        plan.run.extend(stay.iter().chain(&admitted).map(|s| (s.key, s.pending().min(8))));
    }
}

#[test]
fn a_preempted_fork_finds_no_more_than_its_plan_knew_of() {
    // What it computed itself lies in the cache and is more than the prompt of its source, which the same plan preempts.
    let asked = samples(11, &[12, 12]);
    let config = EngineConfig { prefix_cache: true, ..config(1) };
    let mut engine =
        Engine::with_policy(Fake::new(64, 64, 64), &config, Box::new(TradesPlaces::default())).unwrap();
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    asked.iter().for_each(|request| engine.submit(request.clone(), now));
    drain(&mut engine, &mut now, &mut outcomes);
    for request in &asked {
        let Some(Event::Finished { preemptions, .. }) = outcomes[&request.id].end else { panic!() };
        assert_eq!(preemptions, 1);
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
    }
}
