//! The naive server as its client sees it.

mod tiny;

use std::collections::BTreeMap;
use std::time::Duration;

use quire_baselines::naive::{NaiveModel, NaiveOptions, NaiveServer, StaticBatch};
use quire_workloads::{
    Clock, Decoding, EventKind, FinishReason, GenerationRequest, ServingSystem, TokenEvent, WallClock,
};
use tiny::{TinyModel, llama, prompts};

const PATIENCE: Duration = Duration::from_secs(60);

fn options(batch_size: usize) -> NaiveOptions {
    NaiveOptions { threads: 2, batch_size, batch_timeout: Duration::from_millis(20), ..Default::default() }
}

fn start(options: &NaiveOptions) -> (NaiveServer, WallClock) {
    let clock = WallClock::start();
    (NaiveServer::start(TinyModel::random(llama(), 1).model(), options, clock).unwrap(), clock)
}

fn request(id: u64, prompt: Vec<u32>, max_tokens: u32, end: Option<u32>) -> GenerationRequest {
    GenerationRequest {
        id,
        prompt,
        max_tokens,
        true_output_len: end,
        class: 0,
        decoding: Decoding::Single {},
    }
}

/// Events until each of `requests` has ended.
fn drive(server: &mut NaiveServer, clock: WallClock, requests: usize) -> Vec<TokenEvent> {
    let mut events = Vec::new();
    let mut ended = 0;
    while ended < requests {
        let event = server.next_event(clock.now() + PATIENCE).unwrap().expect("an event in time");
        ended += usize::from(!matches!(event.kind, EventKind::Tokens(_)));
        events.push(event);
    }
    events
}

fn tokens(events: &[TokenEvent], id: u64) -> Vec<u32> {
    events
        .iter()
        .filter(|e| e.request == id)
        .flat_map(|e| match &e.kind {
            EventKind::Tokens(tokens) => tokens.clone(),
            _ => Vec::new(),
        })
        .collect()
}

fn alone(model: &NaiveModel, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut batch = StaticBatch::new(model, &[prompt]);
    (0..count).map(|_| batch.step().unwrap().tokens[0]).collect()
}

#[test]
fn every_request_gets_its_own_tokens_and_ends_with_its_batch() {
    let (mut server, clock) = start(&options(3));
    let model = TinyModel::random(llama(), 1).model();
    let prompts = prompts(&[4, 11, 2, 7, 5], 50, 3);
    let ends = [3, 1, 8, 5, 2];
    for (id, prompt) in prompts.iter().enumerate() {
        server.submit(request(id as u64, prompt.clone(), 10, Some(ends[id]))).unwrap();
    }
    let events = drive(&mut server, clock, 5);
    assert!(events.is_sorted_by_key(|e| e.at));
    for (id, prompt) in prompts.iter().enumerate() {
        let expected = alone(&model, prompt, ends[id] as usize);
        assert_eq!(tokens(&events, id as u64), expected, "request {id}");
    }
    // The three of the first batch end together, after its last token.
    let first: Vec<&TokenEvent> = events.iter().filter(|e| e.request < 3).collect();
    let (streamed, endings) = first.split_at(first.len() - 3);
    assert!(streamed.iter().all(|e| matches!(e.kind, EventKind::Tokens(_))));
    for event in endings {
        let finished = EventKind::Finished { reason: FinishReason::Stop, preemptions: 0, cached_tokens: 0 };
        assert_eq!(event.kind, finished);
    }
}

#[test]
fn steps_say_what_was_computed_and_held() {
    let bytes = llama().kv_bytes_per_token();
    let (mut server, clock) = start(&NaiveOptions { kv_bytes: Some(100 * bytes), ..options(2) });
    let prompts = prompts(&[4, 10], 50, 3);
    server.submit(request(0, prompts[0].clone(), 6, Some(3))).unwrap();
    server.submit(request(1, prompts[1].clone(), 6, Some(2))).unwrap();
    drive(&mut server, clock, 2);
    let steps = server.take_steps();
    assert!(server.take_steps().is_empty());
    let counts: Vec<_> =
        steps.iter().map(|s| (s.running, s.prefill_tokens, s.decode_tokens, s.padding_tokens)).collect();
    assert_eq!(counts, [(2, 14, 0, 6), (2, 0, 2, 0), (1, 0, 1, 1)]);
    let kv: Vec<_> = steps.iter().map(|s| (s.kv_used, s.kv_reserved, s.kv_internal, s.kv_free)).collect();
    // Set aside: 2 rows of 10 + 6. Ends at 4 + 2 and 10 + 1 held.
    assert_eq!(kv, [(14, 3, 15, 68), (16, 1, 15, 68), (17, 0, 15, 68)]);
    assert!(steps.iter().enumerate().all(|(i, s)| s.step == i as u64 && s.execute_s > 0.0));
}

#[test]
fn memory_limits_the_batch_and_refuses_what_never_fits() {
    let bytes = llama().kv_bytes_per_token();
    let (mut server, clock) = start(&NaiveOptions { kv_bytes: Some(30 * bytes), ..options(8) });
    let prompts = prompts(&[4, 4, 20, 4], 50, 3);
    for (id, prompt) in prompts.into_iter().enumerate() {
        let max_tokens = if id == 2 { 11 } else { 6 };
        server.submit(request(id as u64, prompt, max_tokens, Some(2))).unwrap();
    }
    let events = drive(&mut server, clock, 4);
    let reason = events.iter().find_map(|e| match &e.kind {
        EventKind::Rejected { reason } => Some((e.request, reason.clone())),
        _ => None,
    });
    let (id, reason) = reason.expect("one is refused");
    assert_eq!(id, 2);
    assert!(reason.contains("31") && reason.contains("30"), "{reason}");
    // 10 columns each: three rows fit.
    assert_eq!(server.take_steps().iter().map(|s| s.running).max(), Some(3));
}

#[test]
fn cancelling_ends_a_waiting_request_at_once_and_a_running_one_with_its_batch() {
    let patient = NaiveOptions { batch_timeout: Duration::from_secs(3600), ..options(2) };
    // Its context is long enough that the second request's cancellation comes before its end.
    let config = tiny::Config { max_position_embeddings: 10_000, ..llama() };
    let clock = WallClock::start();
    let mut server = NaiveServer::start(TinyModel::random(config, 1).model(), &patient, clock).unwrap();
    let prompts = prompts(&[4, 5, 6], 50, 3);
    server.submit(request(0, prompts[0].clone(), 10, None)).unwrap();
    server.cancel(0).unwrap();
    server.cancel(99).unwrap();
    let events = drive(&mut server, clock, 1);
    assert_eq!((events.len(), &events[0].kind), (1, &EventKind::Cancelled));

    server.submit(request(1, prompts[1].clone(), 9000, None)).unwrap();
    server.submit(request(2, prompts[2].clone(), 40, None)).unwrap();
    let first = server.next_event(clock.now() + PATIENCE).unwrap().expect("a token");
    assert!(matches!(first.kind, EventKind::Tokens(_)));
    server.cancel(1).unwrap();
    let events = drive(&mut server, clock, 2);
    let endings: BTreeMap<u64, &EventKind> =
        events[events.len() - 2..].iter().map(|e| (e.request, &e.kind)).collect();
    assert_eq!(endings[&1], &EventKind::Cancelled);
    assert!(matches!(endings[&2], EventKind::Finished { reason: FinishReason::Length, .. }));
    assert_eq!(tokens(&events, 2).len() + usize::from(first.request == 2), 40);
}

#[test]
fn a_full_queue_refuses_instead_of_blocking() {
    let (mut server, clock) = start(&NaiveOptions { queue_capacity: 1, ..options(1) });
    let prompt = prompts(&[40], 50, 3).remove(0);
    for id in 0..200 {
        server.submit(request(id, prompt.clone(), 2, None)).unwrap();
    }
    let events = drive(&mut server, clock, 200);
    let refused = events.iter().filter(|e| matches!(e.kind, EventKind::Rejected { .. })).count();
    assert!(refused > 0 && refused < 200, "{refused}");
}

#[test]
fn waiting_returns_when_the_time_has_come() {
    let (mut server, clock) = start(&options(1));
    let until = clock.now() + Duration::from_millis(30);
    assert_eq!(server.next_event(until).unwrap(), None);
    assert!(clock.now() >= until);
    assert_eq!(server.next_event(Duration::ZERO).unwrap(), None);
}

#[test]
fn options_that_cannot_work_are_refused() {
    let bad = [
        (NaiveOptions { threads: 0, ..options(1) }, "threads"),
        (options(0), "batch_size"),
        (NaiveOptions { max_model_len: Some(65), ..options(1) }, "max_model_len"),
        (NaiveOptions { kv_bytes: Some(5), ..options(1) }, "kv_bytes"),
    ];
    for (options, word) in bad {
        let model = TinyModel::random(llama(), 1).model();
        let error = NaiveServer::start(model, &options, WallClock::start()).err().unwrap().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn dropping_a_busy_server_ends_its_thread() {
    let (mut server, _) = start(&options(1));
    for id in 0..50 {
        server.submit(request(id, vec![1; 20], 40, None)).unwrap();
    }
    drop(server);
}
