//! The engine's thread: events come, failures are told, dropping ends it.

use std::time::{Duration, Instant};

use quire_engine::{Engine, EngineConfig, EngineError, EngineService, Event, PolicyConfig};

use crate::fake::{Fake, reference, request};

fn fake() -> Fake {
    Fake::new(4096, 64, 512)
}

fn service(fake: Fake) -> EngineService {
    EngineService::spawn(Engine::new(fake, &EngineConfig::default()).unwrap()).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// The error that the service comes to, taking events until then.
fn failure(service: &mut EngineService) -> EngineError {
    loop {
        match service.next_event(soon()) {
            Ok(event) => assert!(event.is_some(), "no failure"),
            Err(error) => return error,
        }
    }
}

#[test]
fn requests_are_served_in_the_background() {
    let mut service = service(fake());
    let before = Instant::now();
    for id in 0..20 {
        service.submit(request(id, 3 + id as u32, 5)).unwrap();
    }
    let mut tokens = vec![Vec::new(); 20];
    let mut finished = 0;
    let mut last = before;
    while finished < 20 {
        let event = service.next_event(soon()).unwrap().expect("an event in time");
        assert!(event.at >= last, "events are in order of time");
        last = event.at;
        match event.event {
            Event::Token { id, sampled } => tokens[id as usize].push(sampled.token),
            Event::Finished { .. } => finished += 1,
            other => panic!("{other:?}"),
        }
    }
    for (id, tokens) in (0..).zip(tokens) {
        assert_eq!(tokens, reference(&request(id, 3 + id as u32, 5), 64, 4096).0);
    }
    let steps = service.take_steps();
    assert!(steps.len() >= 5 && steps.iter().zip(0..).all(|(stats, number)| stats.step == number));
    assert_eq!(steps.iter().map(|stats| stats.batch.prefill_tokens).sum::<u32>(), (3..23).sum::<u32>());
    assert_eq!(steps.iter().map(|stats| stats.batch.decode_tokens).sum::<u32>(), 20 * 4);
    assert_eq!((service.take_steps(), service.dropped_steps()), (Vec::new(), 0));
}

#[test]
fn a_refusal_does_not_wait_for_the_step_under_way() {
    let mut service = service(Fake { step_time: Duration::from_millis(100), ..fake() });
    service.submit(request(1, 4, 60)).unwrap();
    service.submit(request(2, 0, 1)).unwrap();
    let mut tokens = 0;
    loop {
        match service.next_event(soon()).unwrap().unwrap().event {
            Event::Token { .. } => tokens += 1,
            Event::Rejected { id: 2, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(tokens <= 2, "refused after {tokens} steps");
}

#[test]
fn waiting_for_an_event_ends_in_time() {
    let mut service = service(fake());
    assert_eq!(service.next_event(Instant::now() + Duration::from_millis(5)).unwrap(), None);
    service.cancel(3).unwrap();
    assert_eq!(service.next_event(Instant::now()).unwrap(), None);
}

#[test]
fn a_static_batch_starts_at_its_timeout_without_a_command() {
    let mut config = EngineConfig::default();
    config.scheduler.policy = PolicyConfig::Static { batch_size: 4, timeout_ms: 30 };
    let mut service = EngineService::spawn(Engine::new(fake(), &config).unwrap()).unwrap();
    let sent = Instant::now();
    service.submit(request(1, 4, 1)).unwrap();
    let event = service.next_event(soon()).unwrap().expect("a token in time");
    assert!(event.at - sent >= Duration::from_millis(30));
}

#[test]
fn a_request_is_cancelled_under_way() {
    let mut service = service(Fake { step_time: Duration::from_millis(5), ..fake() });
    service.submit(request(1, 4, 60)).unwrap();
    service.next_event(soon()).unwrap().expect("a token in time");
    service.cancel(1).unwrap();
    let ended = std::iter::from_fn(|| service.next_event(soon()).unwrap())
        .find(|event| !matches!(event.event, Event::Token { .. }));
    assert_eq!(ended.map(|event| event.event), Some(Event::Cancelled { id: 1 }));
}

#[test]
fn a_failing_device_is_told_after_the_events_before_it() {
    let mut service = service(Fake { fail_after: Some(3), ..fake() });
    service.submit(request(1, 4, 60)).unwrap();
    for _ in 0..3 {
        assert!(matches!(service.next_event(soon()).unwrap().unwrap().event, Event::Token { .. }));
    }
    let error = failure(&mut service);
    assert!(matches!(&error, EngineError::Stopped(why) if why == "the device is on fire"), "{error}");
    let again = service.submit(request(2, 4, 1)).unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    assert_eq!(service.take_steps().len(), 3);
}

#[test]
fn a_panic_is_told() {
    let mut service = service(Fake { panic_after: Some(0), ..fake() });
    service.submit(request(1, 4, 60)).unwrap();
    let error = failure(&mut service).to_string();
    assert!(error.contains("it panicked: the device melted"), "{error}");
}

#[test]
fn dropping_ends_the_thread_idle_or_under_load() {
    drop(service(fake()));
    let mut busy = service(Fake { step_time: Duration::from_millis(1), ..fake() });
    for id in 0..500 {
        busy.submit(request(id, 30, 30)).unwrap();
    }
    let started = Instant::now();
    drop(busy);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_client_that_only_submits_cannot_stand_against_the_engine() {
    // Far more requests and steps than the channels hold, and no event taken before the end.
    let mut config = EngineConfig::default();
    config.scheduler.max_running = 1;
    let mut service = EngineService::spawn(Engine::new(fake(), &config).unwrap()).unwrap();
    let requests = 6000;
    for id in 0..requests {
        service.submit(request(id, 2, 2)).unwrap();
    }
    let mut finished = 0;
    while finished < requests {
        let event = service.next_event(soon()).unwrap().expect("an event in time");
        finished += u64::from(matches!(event.event, Event::Finished { .. }));
    }
}
