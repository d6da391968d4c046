//! Steps that begin while the one before them runs: what is different, and what must not be.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use quire_engine::{
    EngineConfig, Event, FinishReason, KvLayout, PolicyConfig, PreemptionConfig, Progress, Request,
    Reservation, SamplingParams, SchedulerConfig, StepStats,
};

use crate::fake::{Fake, Outcome, drain, engine, next_token, reference, request, serve, turn};

fn config(overlap: bool) -> EngineConfig {
    let policy = PolicyConfig::Continuous { watermark: 0.0 };
    let scheduler =
        SchedulerConfig { policy, token_budget: 32, overlap: Some(overlap), ..SchedulerConfig::default() };
    EngineConfig {
        scheduler,
        kv: KvLayout::Paged { block_size: 4 },
        prefix_cache: false,
        share_blocks: true,
        preemption: PreemptionConfig::default(),
        speculation: None,
        max_model_len: None,
    }
}

fn run(
    config: &EngineConfig,
    slots: usize,
    requests: &[Request],
) -> (BTreeMap<u64, Outcome>, Vec<StepStats>) {
    serve(engine(config, slots, 64), requests)
}

#[test]
fn batches_are_the_same_where_lengths_end_requests() {
    let requests: Vec<Request> = (0..9).map(|id| request(id, 3 + id as u32 * 4, 14 + id as u32)).collect();
    // So little memory that sequences are preempted.
    let (expected, in_turn) = run(&config(false), 64, &requests);
    let (outcomes, overlapping) = run(&config(true), 64, &requests);
    assert_eq!(outcomes, expected);
    let batches = |steps: &[StepStats]| steps.iter().map(|s| (s.step, s.batch)).collect::<Vec<_>>();
    assert_eq!(batches(&overlapping), batches(&in_turn));
    assert!(in_turn.iter().any(|step| step.batch.preempted > 0));
}

#[test]
fn a_token_that_ends_a_request_costs_one_row() {
    let stops = |true_output_len| Request { true_output_len, ..request(1, 5, 40) };
    let rows = |overlap, request: &Request| {
        let (outcomes, steps) = run(&config(overlap), 64, std::slice::from_ref(request));
        assert!(matches!(outcomes[&1].end, Some(Event::Finished { reason: FinishReason::Stop, .. })));
        assert_eq!(outcomes[&1].tokens, reference(request, 64, 64).0);
        steps.iter().map(|step| step.batch.decode_tokens).sum::<u32>()
    };
    for request in
        [stops(Some(7)), Request { stop_tokens: Arc::from([next_token(&stops(None).prompt)]), ..stops(None) }]
    {
        assert_eq!(rows(true, &request), rows(false, &request) + 1);
    }
}

#[test]
fn tokens_come_a_step_later_and_a_lone_step_is_not_left_behind() {
    let mut engine = engine(&config(true), 64, 64);
    let (now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request(1, 3, 2), now);
    assert_eq!(turn(&mut engine, now, &mut outcomes), Progress::Began);
    assert!(outcomes.is_empty());
    assert!(matches!(turn(&mut engine, now, &mut outcomes), Progress::Ran(step) if step.step == 0));
    assert_eq!(outcomes[&1].tokens.len(), 1);
    // Nothing is left to begin, but the second token is still to come.
    assert!(engine.has_work());
    assert!(matches!(turn(&mut engine, now, &mut outcomes), Progress::Ran(step) if step.step == 1));
    assert_eq!(outcomes[&1].tokens.len(), 2);
    assert!(!engine.has_work());
}

#[test]
fn a_request_cancelled_in_flight_is_gone_and_its_successor_gets_no_token_of_it() {
    let mut engine = engine(&config(true), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request(1, 3, 9), now);
    turn(&mut engine, now, &mut outcomes);
    engine.cancel(1);
    // It takes the place that the first one left, with its token under way.
    engine.submit(request(2, 4, 3), now);
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(outcomes[&1], Outcome { end: Some(Event::Cancelled { id: 1 }), ..Outcome::default() });
    assert_eq!(outcomes[&2].tokens, reference(&request(2, 4, 3), 64, 64).0);
}

#[test]
fn a_request_cancelled_when_only_its_last_token_is_to_come_is_gone() {
    let mut engine = engine(&config(true), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(request(1, 3, 1), now);
    turn(&mut engine, now, &mut outcomes);
    engine.cancel(1);
    assert_eq!(engine.alive(), 0);
    assert!(engine.has_work(), "its step is under way");
    drain(&mut engine, &mut now, &mut outcomes);
    assert_eq!(outcomes[&1].end, Some(Event::Cancelled { id: 1 }));
}

#[test]
fn penalties_see_every_token() {
    let sampling = Arc::new(SamplingParams { frequency_penalty: 0.5, ..SamplingParams::default() });
    let requests = [Request { sampling, ..request(1, 3, 8) }, request(2, 5, 12)];
    // The fake executor compares the history with what it stored.
    let (outcomes, _) = run(&config(true), 64, &requests);
    for request in &requests {
        assert_eq!(outcomes[&request.id].tokens, reference(request, 64, 64).0);
    }
}

#[test]
fn penalties_hold_no_step_up() {
    let sampling = Arc::new(SamplingParams { frequency_penalty: 0.5, ..SamplingParams::default() });
    let mut engine = engine(&config(true), 64, 64);
    let (now, mut outcomes) = (Instant::now(), BTreeMap::new());
    engine.submit(Request { sampling, ..request(1, 3, 8) }, now);
    assert_eq!(turn(&mut engine, now, &mut outcomes), Progress::Began);
    while engine.has_work() {
        // A step that had to be collected before the next is scheduled would leave a turn in which one is begun and none lands.
        assert_ne!(turn(&mut engine, now, &mut outcomes), Progress::Began);
    }
}

#[test]
fn an_oracles_region_is_large_enough_for_the_row_too_many() {
    let kv = KvLayout::Contiguous { reservation: Reservation::Oracle };
    let exact = Request { true_output_len: Some(8), ..request(1, 8, 40) };
    let (outcomes, steps) = run(&EngineConfig { kv, ..config(true) }, 16, std::slice::from_ref(&exact));
    assert_eq!(outcomes[&1].tokens, reference(&exact, 64, 16).0);
    assert!(steps.iter().all(|step| step.batch.preempted == 0));
}

#[test]
fn a_new_engine_over_an_executor_gets_no_token_of_the_last_ones() {
    let mut first = engine(&config(true), 64, 64);
    let (mut now, mut outcomes) = (Instant::now(), BTreeMap::new());
    first.submit(request(1, 3, 9), now);
    turn(&mut first, now, &mut outcomes);
    let executor: Fake = first.into_executor();
    let mut second = quire_engine::Engine::new(executor, &config(true)).unwrap();
    second.submit(request(2, 6, 4), now);
    let mut outcomes = BTreeMap::new();
    drain(&mut second, &mut now, &mut outcomes);
    assert_eq!(outcomes[&2].tokens, reference(&request(2, 6, 4), 64, 64).0);
}
