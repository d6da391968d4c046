//! Requests at the edges: what cannot run is refused with the reason, what can is ended; nothing stands still.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use quire_engine::policy::{Plan, SchedulerPolicy, SchedulerView};
use quire_engine::{
    Engine, EngineConfig, EngineError, Event, FinishReason, KvLayout, PolicyConfig, Progress, Refusal,
    Request, Reservation, SamplingParams, SchedulerConfig,
};

use crate::fake::{Fake, Outcome, VOCAB, drain, engine, next_token, reference, request, turn};

fn paged(block_size: u32) -> EngineConfig {
    EngineConfig { kv: KvLayout::Paged { block_size }, ..EngineConfig::default() }
}

fn contiguous(reservation: Reservation) -> EngineConfig {
    EngineConfig { kv: KvLayout::Contiguous { reservation }, ..EngineConfig::default() }
}

/// Runs requests that arrive together to their ends.
fn outcomes(config: &EngineConfig, slots: usize, requests: Vec<Request>) -> BTreeMap<u64, Outcome> {
    let mut engine = engine(config, slots, 64);
    let mut now = Instant::now();
    requests.into_iter().for_each(|request| engine.submit(request, now));
    let mut outcomes = BTreeMap::new();
    drain(&mut engine, &mut now, &mut outcomes);
    outcomes
}

fn rejection(config: &EngineConfig, slots: usize, request: Request) -> (Refusal, String) {
    let id = request.id;
    match outcomes(config, slots, vec![request]).remove(&id).and_then(|outcome| outcome.end) {
        Some(Event::Rejected { refusal, reason, .. }) => (refusal, reason),
        other => panic!("not rejected: {other:?}"),
    }
}

fn finish(outcome: &Outcome) -> FinishReason {
    match outcome.end {
        Some(Event::Finished { reason, .. }) => reason,
        ref other => panic!("not finished: {other:?}"),
    }
}

#[test]
fn what_can_never_run_is_rejected_with_the_reason() {
    let bad = |sampling| Request { sampling: Arc::new(sampling), ..request(1, 4, 4) };
    use Refusal::{Invalid, TooLarge};
    for (config, slots, request, kind, expected) in [
        (paged(16), 64, request(1, 0, 4), Invalid, "prompt is empty"),
        (paged(16), 640, request(1, 64, 4), TooLarge, "leave no room for output in the 64"),
        (paged(16), 640, request(1, 1000, 4), TooLarge, "leave no room for output in the 64"),
        (paged(16), 47, request(1, 33, 4), TooLarge, "33 KV slots are needed and one sequence can have 32"),
        (contiguous(Reservation::Oracle), 63, request(1, 30, 4), TooLarge, "34 KV slots are needed"),
        (contiguous(Reservation::Pow2), 63, request(1, 30, u32::MAX), TooLarge, "64 KV slots are needed"),
        (
            paged(16),
            64,
            Request { prompt: vec![3, VOCAB], ..request(1, 2, 4) },
            Invalid,
            "vocabulary ends below 1000",
        ),
        (
            paged(16),
            64,
            bad(SamplingParams { temperature: f32::NAN, ..Default::default() }),
            Invalid,
            "temperature is NaN",
        ),
        (paged(16), 64, bad(SamplingParams { top_p: 0.0, ..Default::default() }), Invalid, "top_p is 0"),
    ] {
        let (refusal, reason) = rejection(&config, slots, request);
        assert!(refusal == kind && reason.contains(expected), "{refusal:?}: {reason}");
    }
}

#[test]
fn an_id_alive_is_not_taken_twice_and_is_free_again_after_its_end() {
    let mut engine = engine(&paged(4), 64, 64);
    let now = Instant::now();
    engine.submit(request(7, 4, 2), now);
    engine.submit(request(7, 3, 2), now);
    let events = engine.take_events();
    assert!(matches!(&events[..], [Event::Rejected { id: 7, refusal: Refusal::DuplicateId, .. }]));
    let mut outcomes = BTreeMap::new();
    drain(&mut engine, &mut now.clone(), &mut outcomes);
    assert_eq!(outcomes.remove(&7).unwrap().tokens.len(), 2);
    engine.submit(request(7, 3, 1), now);
    drain(&mut engine, &mut now.clone(), &mut outcomes);
    assert_eq!(outcomes[&7].tokens, [next_token(&request(7, 3, 1).prompt)]);
}

#[test]
fn a_full_queue_refuses() {
    let mut config = paged(4);
    config.scheduler.max_waiting = 2;
    let ends = outcomes(&config, 64, (0..3).map(|id| request(id, 2, 1)).collect());
    let Some(Event::Rejected { refusal, reason, .. }) = &ends[&2].end else { panic!("{:?}", ends[&2]) };
    assert!(*refusal == Refusal::QueueFull && reason.contains("2 requests wait"), "{refusal:?}: {reason}");
    assert_eq!(finish(&ends[&1]), FinishReason::Length);
}

#[test]
fn nothing_to_generate_ends_at_once() {
    let zero = Request { true_output_len: Some(0), ..request(2, 4, 4) };
    let ends = outcomes(&paged(4), 64, vec![request(1, 4, 0), zero]);
    assert_eq!((finish(&ends[&1]), ends[&1].tokens.len()), (FinishReason::Length, 0));
    assert_eq!((finish(&ends[&2]), ends[&2].tokens.len()), (FinishReason::Stop, 0));
}

#[test]
fn outputs_end_for_the_reason_given() {
    let prompt = request(1, 4, 1).prompt;
    let stop = |id, after: u32| {
        let (tokens, _) = reference(&Request { prompt: prompt.clone(), ..request(id, 0, after) }, 64, 64);
        Request {
            prompt: prompt.clone(),
            stop_tokens: tokens[tokens.len() - 1..].into(),
            ..request(id, 0, 50)
        }
    };
    let limit = Request { prompt: request(9, 60, 0).prompt, ..request(3, 0, u32::MAX) };
    let requests = vec![
        stop(1, 3),
        Request { true_output_len: Some(5), ..request(2, 4, 50) },
        limit,
        Request { true_output_len: Some(50), ..request(4, 4, 6) },
    ];
    let ends = outcomes(&paged(4), 512, requests);
    let ended = |id| (finish(&ends[&id]), ends[&id].tokens.len());
    assert_eq!(ended(1), (FinishReason::Stop, 3));
    assert_eq!(ended(2), (FinishReason::Stop, 5));
    assert_eq!(ended(3), (FinishReason::Length, 4), "60 and 4 are the model's 64");
    assert_eq!(ended(4), (FinishReason::Length, 6));
}

#[test]
fn a_lone_sequence_that_outgrows_the_pool_ends_with_the_reason() {
    for policy in [PolicyConfig::default(), PolicyConfig::Static { batch_size: 2, timeout_ms: 0 }] {
        for others in [0, 3] {
            let mut config = paged(4);
            config.scheduler.policy = policy.clone();
            let mut requests = vec![request(1, 10, 40)];
            requests.extend((2..2 + others).map(|id| request(id, 3, 3)));
            let ends = outcomes(&config, 18, requests);
            // 16 slots hold 16 tokens; the seventh output token is the 17th and needs none unless another follows.
            assert_eq!((finish(&ends[&1]), ends[&1].tokens.len()), (FinishReason::KvExhausted, 7));
            assert!((2..2 + others).all(|id| finish(&ends[&id]) == FinishReason::Length));
        }
    }
}

#[test]
fn a_prompt_that_fills_the_pool_gives_its_token() {
    let ends = outcomes(&paged(4), 16, vec![request(1, 16, 1), request(2, 16, 2)]);
    assert_eq!((finish(&ends[&1]), finish(&ends[&2])), (FinishReason::Length, FinishReason::KvExhausted));
}

#[test]
fn a_reservation_is_no_larger_than_the_models_limit() {
    let mut config = contiguous(Reservation::Max);
    config.max_model_len = Some(48);
    let ends = outcomes(&config, 64, vec![request(1, 40, u32::MAX), request(2, 40, 8)]);
    assert!(ends.values().all(|end| end.tokens.len() == 8 && finish(end) == FinishReason::Length));
}

#[test]
fn a_request_is_cancelled_in_any_state() {
    for policy in [PolicyConfig::default(), PolicyConfig::Static { batch_size: 3, timeout_ms: 10_000 }] {
        let mut config = paged(4);
        config.scheduler.policy = policy;
        let mut engine = engine(&config, 64, 64);
        let now = Instant::now();
        (1..=3).for_each(|id| engine.submit(request(id, 5, id as u32), now));
        engine.submit(request(4, 5, 5), now);
        engine.cancel(4);
        engine.cancel(99);
        assert_eq!(engine.take_events(), [Event::Cancelled { id: 4 }], "waiting");
        let mut outcomes = BTreeMap::new();
        turn(&mut engine, now, &mut outcomes);
        engine.cancel(3);
        engine.check_integrity();
        drain(&mut engine, &mut now.clone(), &mut outcomes);
        assert_eq!(outcomes[&3].end, Some(Event::Cancelled { id: 3 }), "running");
        assert_eq!((outcomes[&1].tokens.len(), outcomes[&2].tokens.len()), (1, 2));
        engine.cancel(1);
        assert!(!engine.has_work(), "ended");
    }
}

#[test]
fn cancelling_the_last_that_runs_ends_a_static_batch() {
    let policy = PolicyConfig::Static { batch_size: 2, timeout_ms: 0 };
    let scheduler = SchedulerConfig { policy, ..SchedulerConfig::default() };
    let mut engine = engine(&EngineConfig { scheduler, ..EngineConfig::default() }, 64, 64);
    let now = Instant::now();
    engine.submit(request(1, 4, 1), now);
    engine.submit(request(2, 4, 9), now);
    turn(&mut engine, now, &mut BTreeMap::new());
    engine.cancel(2);
    let events = engine.take_events();
    assert!(matches!(events[..], [Event::Cancelled { id: 2 }, Event::Finished { id: 1, .. }]), "{events:?}");
    assert_eq!(engine.alive(), 0);
}

#[test]
fn a_preempted_sequence_says_so_and_repeats_no_token() {
    let requests = vec![request(1, 8, 8), request(2, 8, 8)];
    let ends = outcomes(&paged(4), 16, requests.clone());
    assert!(matches!(ends[&1].end, Some(Event::Finished { preemptions: 0, .. })));
    assert!(matches!(ends[&2].end, Some(Event::Finished { preemptions: 1, .. })));
    for request in requests {
        assert_eq!(ends[&request.id].tokens, reference(&request, 64, 16).0);
    }
}

#[test]
fn penalties_get_the_history_and_nothing_else_does() {
    // The fake executor compares each row's history with what the KV memory holds.
    let sampling = Arc::new(SamplingParams { presence_penalty: 0.5, ..SamplingParams::default() });
    let repetition = Arc::new(SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() });
    let requests = vec![
        Request { sampling, ..request(1, 8, 8) },
        request(2, 8, 8),
        Request { sampling: repetition, ..request(3, 8, 8) },
    ];
    let ends = outcomes(&paged(4), 16, requests);
    assert!(ends.values().all(|end| end.tokens.len() == 8));
}

#[test]
fn an_idle_engine_says_until_when() {
    let policy = PolicyConfig::Static { batch_size: 2, timeout_ms: 50 };
    let scheduler = SchedulerConfig { policy, ..SchedulerConfig::default() };
    let mut engine = engine(&EngineConfig { scheduler, ..EngineConfig::default() }, 64, 64);
    let now = Instant::now();
    let mut outcomes = BTreeMap::new();
    assert_eq!(turn(&mut engine, now, &mut outcomes), Progress::Idle { until: None });
    engine.submit(request(1, 4, 1), now);
    let due = now + std::time::Duration::from_millis(50);
    assert_eq!(turn(&mut engine, now, &mut outcomes), Progress::Idle { until: Some(due) });
    assert!(matches!(turn(&mut engine, due, &mut outcomes), Progress::Ran(_)));
}

/// Plans what a function says.
struct Scripted(fn(&SchedulerView<'_>, &mut Plan));

impl SchedulerPolicy for Scripted {
    fn plan(&mut self, view: &SchedulerView<'_>, plan: &mut Plan) {
        (self.0)(view, plan);
    }
}

fn scripted(plan: fn(&SchedulerView<'_>, &mut Plan)) -> Engine<Fake> {
    let mut config = paged(4);
    config.scheduler = SchedulerConfig { token_budget: 8, max_running: 1, ..SchedulerConfig::default() };
    let mut engine = Engine::with_policy(Fake::new(8, 64, 8), &config, Box::new(Scripted(plan))).unwrap();
    engine.submit(request(1, 6, 4), Instant::now());
    engine.submit(request(2, 6, 4), Instant::now());
    engine
}

#[test]
fn a_policy_may_reject() {
    let mut engine = scripted(|view, plan| {
        plan.reject.extend(view.waiting().map(|sequence| (sequence.key, "closing time".to_owned())));
    });
    let output = engine.step(Instant::now()).unwrap();
    assert!(
        matches!(&output.events[..], [Event::Rejected { refusal: Refusal::Policy, reason, .. }, _] if reason == "closing time")
    );
    assert!(
        matches!(output.progress, Progress::Idle { until: Some(_) }),
        "asked again: the plan moved something"
    );
    assert!(!engine.has_work());
}

#[test]
fn an_invalid_plan_ends_the_engine_with_what_is_wrong() {
    type Script = fn(&SchedulerView<'_>, &mut Plan);
    let cases: [(Script, &str); 7] = [
        (
            |view, plan| plan.run.extend(view.waiting().map(|s| (s.key, 1))),
            "runs request 1, which is Waiting",
        ),
        (
            |view, plan| plan.preempt.extend(view.waiting().map(|s| s.key)),
            "preempts request 1, which is Waiting",
        ),
        (|view, plan| plan.admit.extend(view.waiting().map(|s| s.key)), "runs more than 1 sequences"),
        (
            |view, plan| {
                plan.admit.extend(view.waiting().map(|s| s.key).take(1));
                plan.run.extend(view.waiting().map(|s| (s.key, 7)).take(1));
            },
            "computes 7 tokens of request 1, which has 6",
        ),
        (
            |view, plan| {
                plan.admit.extend(view.waiting().map(|s| s.key).take(1));
                plan.run.extend(view.waiting().map(|s| (s.key, 6)).take(1));
                plan.padding = 3;
            },
            "computes 9 rows with a budget of 8",
        ),
        (|_, plan| plan.padding = 1, "computes padding alone"),
        (
            |view, plan| {
                plan.admit.extend(view.waiting().map(|s| s.key).take(1));
                let key = plan.admit[0];
                plan.run.extend([(key, 1), (key, 1)]);
            },
            "or it twice",
        ),
    ];
    for (plan, expected) in cases {
        let mut engine = scripted(plan);
        let error = engine.step(Instant::now()).expect_err(expected);
        assert!(matches!(&error, EngineError::Plan(what) if what.contains(expected)), "{error}");
        let again = engine.step(Instant::now()).unwrap_err();
        assert!(matches!(again, EngineError::Stopped(_)), "{again}");
    }
}

#[test]
fn a_policy_may_not_reject_what_it_began_to_deliver() {
    let mut engine = scripted(|view, plan| {
        if view.running_len() > 0 {
            return plan.preempt.push(view.running(0).key);
        }
        for sequence in view.waiting().take(1) {
            if sequence.preemptions > 0 {
                plan.reject.push((sequence.key, "too late".to_owned()));
            } else {
                plan.admit.push(sequence.key);
                plan.run.push((sequence.key, sequence.pending()));
            }
        }
    });
    let now = Instant::now();
    assert!(matches!(engine.step(now).unwrap().progress, Progress::Ran(_)));
    assert!(
        matches!(engine.step(now).unwrap().progress, Progress::Idle { until: Some(until) } if until == now)
    );
    let error = engine.step(now).unwrap_err().to_string();
    assert!(error.contains("rejects request 1, of which tokens are delivered"), "{error}");
}
