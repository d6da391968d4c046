//! The load generator against a system that does as it is told, on a clock that moves only when it waits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use quire_workloads::mock::{Script, ScriptedSystem, VirtualClock};
use quire_workloads::stats::StatsName;
use quire_workloads::*;

const LIMITS: ModelLimits = ModelLimits { vocab_size: 100, reserved_ids: 0, max_model_len: 64 };

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Requests of 4 prompt and 3 answer tokens.
fn workload(arrivals: ArrivalProcess, requests: usize) -> Workload {
    let lengths = LengthSource::Pairs { pairs: vec![[4, 3]] };
    let spec = WorkloadSpec {
        requests,
        lengths,
        arrivals,
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    };
    Workload::generate(&spec, 1, &LIMITS).unwrap()
}

fn run_with(
    workload: &Workload,
    options: LoadOptions,
    clock: &VirtualClock,
    mut system: ScriptedSystem,
) -> LoadResult {
    let generator = LoadGenerator::new(workload, options).unwrap();
    generator.run(&mut system, clock, &AtomicBool::new(false), &mut |_| {})
}

fn run(workload: &Workload, script: impl FnMut(&GenerationRequest) -> Script + Send + 'static) -> LoadResult {
    let clock = VirtualClock::new();
    run_with(workload, LoadOptions::default(), &clock, ScriptedSystem::new(clock.clone(), script))
}

fn healthy(request: &GenerationRequest) -> Script {
    Script::healthy(request, ms(30), ms(10))
}

#[test]
fn a_worked_example() {
    let clock = VirtualClock::new();
    clock.advance(ms(1000));
    let workload = workload(ArrivalProcess::Uniform { rate: 10.0 }, 2);
    let system = ScriptedSystem::new(clock.clone(), |request| match request.id {
        0 => Script::default().tokens(ms(30), &[5]).tokens(ms(20), &[6, 7]).event(
            ms(1),
            EventKind::Finished { reason: FinishReason::Stop, preemptions: 2, cached_tokens: 1 },
        ),
        _ => Script::healthy(request, ms(40), ms(10)),
    });
    let result = run_with(&workload, LoadOptions::default(), &clock, system);
    assert!(result.is_valid(), "{:?} {:?}", result.void, result.protocol_errors);
    assert_eq!((result.started_s, result.ended_s), (1.0, 1.16));
    let expected = RequestRecord {
        schema: RECORD_SCHEMA,
        id: 0,
        intended_s: 1.0,
        sent_s: Some(1.0),
        first_token_s: Some(1.03),
        token_times_s: vec![1.03, 1.05, 1.05],
        finish_s: Some(1.051),
        outcome: Outcome::Finished { reason: FinishReason::Stop },
        prompt_tokens: 4,
        output_tokens: 3,
        max_tokens: 60,
        true_output_len: Some(3),
        preemptions: 2,
        cached_tokens: 1,
        output_hash: token_hash(&[5, 6, 7]),
        synthetic: false,
        turn: None,
        class: None,
        outputs: 1,
    };
    assert_eq!(result.records[0], expected);
    let second = &result.records[1];
    assert_eq!(second.token_times_s, [1.14, 1.15, 1.16]);
    assert_eq!((second.intended_s, second.sent_s), (1.1, Some(1.1)));
    assert_eq!(second.ttft_s(), Some(1.14 - 1.1));
}

#[test]
fn an_open_loop_does_not_wait_and_queueing_counts() {
    // One at a time, 50 ms each, arriving each 10 ms: the third waits 80 ms before its own 30 ms to the first token.
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::Uniform { rate: 100.0 }, 3);
    let system = ScriptedSystem::new(clock.clone(), healthy).at_once(1);
    let result = run_with(&workload, LoadOptions::default(), &clock, system);
    assert!(result.is_valid());
    assert_eq!(result.lag.max_s, 0.0);
    let first: Vec<f64> = result.records.iter().map(|r| r.ttft_s().unwrap()).collect();
    for (got, stated) in first.iter().zip([0.03, 0.07, 0.11]) {
        assert!((got - stated).abs() < 1e-12, "{first:?}");
    }
}

#[test]
fn a_client_that_falls_behind_voids_the_run_and_still_times_from_the_intended_arrival() {
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::Uniform { rate: 100.0 }, 5);
    let system = ScriptedSystem::new(clock.clone(), healthy).submit_cost(ms(40));
    let result = run_with(&workload, LoadOptions::default(), &clock, system);
    // Sent at 0, 40, 80, 120, 160 ms instead of 0, 10, 20, 30, 40.
    let lags: Vec<f64> = result.records.iter().map(|r| (r.lag_s().unwrap() * 1e3).round()).collect();
    assert_eq!(lags, [0.0, 30.0, 60.0, 90.0, 120.0]);
    assert!((result.records[4].ttft_s().unwrap() - 0.19).abs() < 1e-12);
    let [VoidReason::ClientFellBehind { late_share, bound_s, max_s }] = result.void[..] else {
        panic!("{:?}", result.void)
    };
    assert_eq!((late_share, bound_s), (0.8, 0.02));
    assert!((max_s - 0.12).abs() < 1e-12);
    let lenient = LoadOptions { lag_bound_s: 0.2, ..Default::default() };
    let clock = VirtualClock::new();
    let system = ScriptedSystem::new(clock.clone(), healthy).submit_cost(ms(40));
    assert!(run_with(&workload, lenient, &clock, system).is_valid());
}

#[test]
fn closed_loop_users_wait_and_think() {
    let think = Some(ThinkTime::Fixed { seconds: 0.1 });
    let workload = workload(ArrivalProcess::ClosedLoop { users: 2, think }, 5);
    let result = run(&workload, healthy);
    assert!(result.is_valid());
    // Each serves 50 ms after a pause of 100: two at a time, at 100, 250 and 400 ms.
    let intended: Vec<f64> = result.records.iter().map(|r| (r.intended_s * 1e3).round()).collect();
    assert_eq!(intended, [100.0, 100.0, 250.0, 250.0, 400.0]);
    assert!(result.records.iter().all(|r| r.lag_s() == Some(0.0)));
}

#[test]
fn whatever_ends_a_request_is_a_row() {
    let workload = workload(ArrivalProcess::AllAtOnce {}, 4);
    let result = run(&workload, |request| match request.id {
        0 => Script::default().rejected(ms(1), "too long"),
        1 => Script::default().tokens(ms(5), &[1]).failed(ms(5), "broke"),
        2 => Script::default().tokens(ms(5), &[1]).finished(ms(5), FinishReason::KvExhausted),
        _ => Script::default().tokens(ms(5), &[1]).event(ms(2), EventKind::Cancelled),
    });
    assert!(result.is_valid(), "{:?}", result.protocol_errors);
    let outcomes: Vec<&Outcome> = result.records.iter().map(|r| &r.outcome).collect();
    assert_eq!(outcomes[0], &Outcome::Rejected { reason: "too long".into() });
    assert_eq!(outcomes[1], &Outcome::Failed { reason: "broke".into() });
    assert_eq!(outcomes[2], &Outcome::Finished { reason: FinishReason::KvExhausted });
    assert_eq!(outcomes[3], &Outcome::Cancelled {});
    assert_eq!(result.records[0].e2e_s(), None);
    assert_eq!(result.records[0].finish_s, Some(0.001));
    assert_eq!(result.records[1].output_tokens, 1);
}

#[test]
fn a_stall_is_censored_with_its_tokens_and_cancelled() {
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::AllAtOnce {}, 2);
    let system = ScriptedSystem::new(clock.clone(), |request| match request.id {
        0 => healthy(request),
        _ => Script::default().tokens(ms(5), &[9]).tokens(ms(5000), &[9]),
    });
    let options = LoadOptions { drain_limit_s: 2.0, ..Default::default() };
    let result = run_with(&workload, options, &clock, system);
    assert!(result.is_valid(), "{:?}", result.protocol_errors);
    assert_eq!(result.ended_s, 2.0);
    let record = &result.records[1];
    assert_eq!((&record.outcome, record.output_tokens, record.finish_s), (&Outcome::Censored {}, 1, None));
    assert_eq!(record.output_hash, token_hash(&[9]));
}

#[test]
fn a_cancellation_that_is_not_confirmed_is_an_error() {
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::AllAtOnce {}, 1);
    let system = ScriptedSystem::new(clock.clone(), |_| Script::default()).deaf();
    let options = LoadOptions { drain_limit_s: 1.0, ..Default::default() };
    let result = run_with(&workload, options, &clock, system);
    assert_eq!(result.protocol_errors, ["request 0: its cancellation was not confirmed"]);
    assert_eq!(result.void, [VoidReason::Protocol { errors: 1 }]);
    assert_eq!(clock.now(), ms(31_000));
}

#[test]
fn a_time_limit_censors_what_was_not_even_sent() {
    let clock = VirtualClock::new();
    let options = LoadOptions { time_limit_s: Some(0.25), ..Default::default() };
    let open = workload(ArrivalProcess::Uniform { rate: 10.0 }, 5);
    let result = run_with(&open, options, &clock, ScriptedSystem::new(clock.clone(), healthy));
    let sent: Vec<bool> = result.records.iter().map(|r| r.sent_s.is_some()).collect();
    assert_eq!(sent, [true, true, true, false, false]);
    assert!(result.records[2..].iter().all(|r| r.outcome == Outcome::Censored {}));
    // The third was sent at 200 ms: its tokens at 230, 240 and 250 came in time, its end did not.
    assert_eq!(result.records[2].output_tokens, 3);
    let clock = VirtualClock::new();
    // Each takes 50 ms; the fifth ends at the limit and is cut before its end is seen.
    let closed = workload(ArrivalProcess::ClosedLoop { users: 1, think: None }, 50);
    let result = run_with(&closed, options, &clock, ScriptedSystem::new(clock.clone(), healthy));
    assert_eq!((result.records.len() as u64 + result.not_reached, result.not_reached), (50, 45));
}

#[test]
fn abort_stops_the_run_and_says_so() {
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::Uniform { rate: 1.0 }, 100);
    let (abort, mut calls) = (AtomicBool::new(false), 0);
    let mut system = ScriptedSystem::new(clock.clone(), healthy);
    let generator = LoadGenerator::new(&workload, LoadOptions::default()).unwrap();
    let result = generator.run(&mut system, &clock, &abort, &mut |progress| {
        calls += 1;
        assert!(progress.ended <= progress.sent && progress.sent <= progress.total && progress.total == 100);
        abort.store(progress.sent == 3, Ordering::Relaxed);
    });
    assert_eq!(result.void, [VoidReason::Aborted {}]);
    assert_eq!(result.records.iter().filter(|r| r.sent_s.is_some()).count(), 3);
    assert!(calls > 10);
}

#[test]
fn a_system_that_stops_leaves_rows() {
    let clock = VirtualClock::new();
    let workload = workload(ArrivalProcess::Uniform { rate: 10.0 }, 4);
    let system = ScriptedSystem::new(clock.clone(), healthy).stops_at(ms(120));
    let result = run_with(&workload, LoadOptions::default(), &clock, system);
    assert!(matches!(&result.void[..], [VoidReason::SystemStopped { .. }]), "{:?}", result.void);
    assert_eq!(result.records[0].outcome, Outcome::Finished { reason: FinishReason::Stop });
    for record in &result.records[1..] {
        assert_eq!(record.outcome, Outcome::Failed { reason: "scripted stopped: it was told to".into() });
    }
}

#[test]
fn broken_protocols_are_found() {
    let found = |script: fn(&GenerationRequest) -> Script| {
        let result = run(&workload(ArrivalProcess::Uniform { rate: 1.0 }, 2), script);
        assert!(matches!(result.void[..], [VoidReason::Protocol { .. }]), "{:?}", result.void);
        result.protocol_errors[0].clone()
    };
    assert_eq!(
        found(|r| Script::default().event_of(77, ms(1), EventKind::Cancelled).stop_after(r)),
        "request 77: a cancellation for a request that was never sent"
    );
    assert_eq!(
        found(|r| Script::default().event_of(1 - r.id, ms(1), EventKind::Tokens(vec![1])).stop_after(r)),
        "request 1: tokens before it was sent"
    );
    assert_eq!(found(|r| healthy(r).stop(ms(1))), "request 0: an end after its end");
    assert_eq!(found(|r| healthy(r).tokens(ms(1), &[1])), "request 0: tokens after its end");
    assert_eq!(
        found(|_| Script::default().tokens(ms(1), &[1]).stop(ms(1))),
        "request 0: finished (Stop) with 1 of 3 tokens"
    );
    assert_eq!(
        found(|_| Script::default().tokens(ms(1), &[1; 4]).stop(ms(1))),
        "request 0: 4 tokens, its end is at 3"
    );
    assert_eq!(
        found(|r| Script::default().tokens(ms(1), &[]).stop_after(r)),
        "request 0: an event with no tokens"
    );
    assert_eq!(
        found(|_| Script::default().tokens(ms(1), &[1]).rejected(ms(1), "no")),
        "request 0: rejected after 1 tokens"
    );
}

/// A script that goes on as a healthy one would.
trait StopAfter {
    fn stop_after(self, request: &GenerationRequest) -> Script;
}

impl StopAfter for Script {
    fn stop_after(self, request: &GenerationRequest) -> Script {
        self.tokens(ms(1), &vec![1; request.true_output_len.unwrap() as usize]).stop(ms(1))
    }
}

/// A system whose events carry times that cannot be.
struct WrongClock(ScriptedSystem, Duration);

impl ServingSystem for WrongClock {
    fn name(&self) -> &str {
        "wrong clock"
    }
    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        self.0.submit(request)
    }
    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        self.0.cancel(request)
    }
    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        Ok(self.0.next_event(until)?.map(|event| TokenEvent { at: self.1, ..event }))
    }
}

#[test]
fn impossible_times_are_found() {
    let workload = workload(ArrivalProcess::AllAtOnce {}, 1);
    for (start, at, what) in [(1000, 500, "before 1s"), (0, 9000, "which is seen at 30ms")] {
        let clock = VirtualClock::new();
        clock.advance(ms(start));
        let mut system = WrongClock(ScriptedSystem::new(clock.clone(), healthy), ms(at));
        let generator = LoadGenerator::new(&workload, LoadOptions::default()).unwrap();
        let result = generator.run(&mut system, &clock, &AtomicBool::new(false), &mut |_| {});
        assert!(result.protocol_errors[0].ends_with(what), "{:?}", result.protocol_errors);
    }
}

#[test]
fn records_survive_a_file_and_other_versions_are_refused() {
    let result = run(&workload(ArrivalProcess::Poisson { rate: 3.0 }, 20), healthy);
    let lines: Vec<String> = result.records.iter().map(|r| serde_json::to_string(r).unwrap()).collect();
    assert_eq!(read_records(lines.join("\n").as_bytes(), "r").unwrap(), result.records);
    let other = lines[0].replace("\"schema\":1", "\"schema\":2");
    let error = read_records(format!("{}\n{other}", lines[0]).as_bytes(), "r").unwrap_err().to_string();
    assert_eq!(error, "r:2:1: schema 2, this version reads 1");
}

#[test]
fn steps_are_collected() {
    let clock = VirtualClock::new();
    let steps = vec![StepRecord { step: 1, running: 2, ..Default::default() }];
    let system = ScriptedSystem::new(clock.clone(), healthy).steps(steps.clone());
    let result = run_with(&workload(ArrivalProcess::AllAtOnce {}, 2), LoadOptions::default(), &clock, system);
    assert_eq!(result.steps, steps);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_request_has_one_row_and_no_system_is_at_fault(
        (seed, requests, rate, at_once) in (any::<u64>(), 1..40_usize, 0.5..50.0, 1..6_usize),
        (closed, limit_s) in (any::<bool>(), 0.05..20.0),
    ) {
        let arrivals = if closed {
            ArrivalProcess::ClosedLoop { users: 3, think: Some(ThinkTime::Exponential { mean_s: 1.0 / rate }) }
        } else {
            ArrivalProcess::Gamma { rate, cv: 2.0 }
        };
        let lengths = LengthSource::Stats { name: StatsName::ShareGptLike };
        let spec = WorkloadSpec { requests, lengths, arrivals, length_scale: 0.05, over_limit: OverLimit::Keep, shared_prefix: 0, conversations: None, classes: Vec::new(), decoding: Decoding::Single {} };
        let workload = Workload::generate(&spec, seed, &LIMITS).unwrap();
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), healthy).at_once(at_once);
        let options = LoadOptions { time_limit_s: Some(limit_s), ..Default::default() };
        let result = run_with(&workload, options, &clock, system);
        prop_assert!(result.is_valid(), "{:?} {:?}", result.void, result.protocol_errors);
        prop_assert_eq!(result.records.len() + result.not_reached as usize, requests);
        prop_assert!(closed || result.not_reached == 0);
        for record in &result.records {
            prop_assert_eq!(record.token_times_s.len(), record.output_tokens as usize);
            prop_assert!(record.token_times_s.windows(2).all(|pair| pair[0] <= pair[1]));
            match &record.outcome {
                Outcome::Finished { .. } => {
                    let end = record.true_output_len.unwrap().min(record.max_tokens);
                    prop_assert_eq!(record.output_tokens, end);
                    prop_assert!(record.finish_s.unwrap() <= limit_s + 1e-6);
                }
                Outcome::Censored {} => prop_assert!(result.ended_s >= limit_s - 1e-6),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
