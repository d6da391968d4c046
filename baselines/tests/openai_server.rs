//! The client of OpenAI-compatible servers against a scripted server: what comes out for each thing a server may do.

mod scripted;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use quire_baselines::openai::{ApiKey, Counting, OpenAiOptions, OpenAiServer, UNKNOWN_TOKEN};
use quire_workloads::{
    ArrivalProcess, Clock, Decoding, EventKind, FinishReason, GenerationRequest, LengthDistribution,
    LengthSource, LoadGenerator, LoadOptions, ModelLimits, Outcome, OverLimit, ServingSystem, TokenEvent,
    WallClock, Workload, WorkloadSpec,
};
use scripted::{Answering, Heard, serve};

const PATIENCE: Duration = Duration::from_secs(20);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn options(url: &str) -> OpenAiOptions {
    OpenAiOptions { silence_timeout: PATIENCE, ..OpenAiOptions::new(url, "some/model") }
}

fn start(options: OpenAiOptions) -> (OpenAiServer, WallClock) {
    let clock = WallClock::start();
    (OpenAiServer::start(options, clock).unwrap(), clock)
}

fn request(id: u64, tokens: u32) -> GenerationRequest {
    GenerationRequest {
        id,
        prompt: vec![11, 12, 13],
        max_tokens: 50,
        true_output_len: Some(tokens),
        class: 0,
        decoding: Decoding::Single {},
    }
}

fn next(server: &mut OpenAiServer, clock: WallClock) -> TokenEvent {
    server.next_event(clock.now() + PATIENCE).unwrap().expect("an event in time")
}

/// Events of one request up to its end.
fn events(server: &mut OpenAiServer, clock: WallClock, id: u64) -> Vec<TokenEvent> {
    let mut events = Vec::new();
    loop {
        let event = next(server, clock);
        assert_eq!(event.request, id);
        let is_end = !matches!(event.kind, EventKind::Tokens(_));
        events.push(event);
        if is_end {
            return events;
        }
    }
}

/// The end of one request to a server that does what `script` says, and the tokens before.
fn outcome(
    options: impl FnOnce(OpenAiOptions) -> OpenAiOptions,
    script: impl Fn(&mut Answering, Heard) + Send + Sync + 'static,
) -> (EventKind, Vec<u32>) {
    let (url, _) = serve(script);
    let (mut server, clock) = start(options(self::options(&url)));
    server.submit(request(1, 3)).unwrap();
    let mut events = events(&mut server, clock, 1);
    let end = events.pop().unwrap();
    let tokens = events.into_iter().flat_map(|event| match event.kind {
        EventKind::Tokens(tokens) => tokens,
        other => panic!("{other:?}"),
    });
    (end.kind, tokens.collect())
}

#[track_caller]
fn failed(script: impl Fn(&mut Answering, Heard) + Send + Sync + 'static, parts: &[&str]) {
    let (end, _) = outcome(|options| options, script);
    let EventKind::Failed { reason } = &end else { panic!("{end:?}") };
    for part in parts {
        assert!(reason.contains(part), "{part} is missing in: {reason}");
    }
}

fn finished(reason: FinishReason) -> EventKind {
    EventKind::Finished { reason, preemptions: 0, cached_tokens: 0 }
}

#[test]
fn tokens_are_stamped_as_they_come_and_connections_are_kept() {
    let (say, heard) = channel();
    let (url, seen) = serve(move |connection, request| {
        say.send((request.head, request.body)).unwrap();
        connection.begin();
        for _ in 0..2 {
            connection.token();
            std::thread::sleep(ms(200));
        }
        connection.finish();
    });
    let api_key = Some(ApiKey::new("secret".into()).unwrap());
    assert!(!format!("{api_key:?}").contains("secret"));
    let (mut server, clock) = start(OpenAiOptions { ignore_eos: true, api_key, ..options(&url) });
    for id in [1, 2] {
        server.submit(request(id, 3)).unwrap();
        let events = events(&mut server, clock, id);
        let kinds: Vec<_> = events.iter().map(|event| event.kind.clone()).collect();
        let token = EventKind::Tokens(vec![UNKNOWN_TOKEN]);
        assert_eq!(kinds, [token.clone(), token.clone(), token, finished(FinishReason::Stop)]);
        for pair in events[..3].windows(2) {
            let gap = pair[1].at - pair[0].at;
            assert!(gap >= ms(100), "{gap:?} between tokens that were sent 200 ms apart");
        }
        assert_eq!(events[3].at, events[2].at, "it ends with its last token");
        let (head, body) = heard.recv().unwrap();
        assert!(head.starts_with("POST /v1/completions HTTP/1.1\r\n"), "{head}");
        assert!(head.to_lowercase().contains("authorization: bearer secret\r\n"), "{head}");
        let expected = serde_json::json!({
            "model": "some/model", "prompt": [11, 12, 13], "max_tokens": 3, "temperature": 0.0, "stream": true,
            "stream_options": { "include_usage": true }, "ignore_eos": true
        });
        assert_eq!(body, expected);
    }
    assert_eq!(seen.connections.load(Ordering::Relaxed), 1);
}

#[test]
fn several_tokens_a_chunk_are_counted_by_what_the_server_tells() {
    let script = |connection: &mut Answering, request: Heard| {
        assert_eq!(request.body["return_token_ids"], true);
        connection.begin();
        connection.event(r#"{"choices":[{"index":0,"text":"ab","token_ids":[7,8]}]}"#);
        connection.event(r#"{"choices":[{"index":0,"text":"c","token_ids":[9],"finish_reason":"length"}]}"#);
        connection.event(r#"{"choices":[],"usage":{"completion_tokens":3}}"#);
        connection.event("[DONE]");
        connection.raw("0\r\n\r\n");
    };
    let by_ids = |options| OpenAiOptions { counting: Counting::TokenIds, ..options };
    assert_eq!(outcome(by_ids, script), (finished(FinishReason::Stop), vec![7, 8, 9]));
    // One a chunk is too few; what the server says at its end settles it.
    let by_chunks = |connection: &mut Answering, _: Heard| {
        connection.begin();
        connection.event(r#"{"choices":[{"index":0,"text":"ab","finish_reason":"length"}]}"#);
        connection.event(r#"{"choices":[],"usage":{"completion_tokens":3}}"#);
        connection.event("[DONE]");
        connection.raw("0\r\n\r\n");
    };
    let (end, tokens) = outcome(|options| options, by_chunks);
    assert_eq!((end, tokens.len()), (finished(FinishReason::Stop), 3));
}

#[test]
fn an_early_end_is_recorded_as_one() {
    let (end, tokens) = outcome(
        |options| options,
        |connection, _| {
            connection.begin();
            connection.token();
            connection.event(r#"{"choices":[{"index":0,"text":"","finish_reason":"stop"}]}"#);
            connection.event("[DONE]");
            connection.raw("0\r\n\r\n");
        },
    );
    assert_eq!((end, tokens.len()), (finished(FinishReason::Early), 1));
}

#[test]
fn refusals_are_rejections_and_breakdowns_are_failures() {
    for (status, rejected) in [
        ("400 Bad Request", true),
        ("404 Not Found", true),
        ("429 Too Many Requests", true),
        ("500 Internal Server Error", false),
        ("503 Service Unavailable", false),
    ] {
        let said = r#"{"error":{"message":"the server's own words"}}"#;
        let (end, tokens) = outcome(
            |options| options,
            move |connection, _| connection.whole(status, "application/json", said),
        );
        let reason = match end {
            EventKind::Rejected { reason } if rejected => reason,
            EventKind::Failed { reason } if !rejected => reason,
            other => panic!("{status}: {other:?}"),
        };
        assert_eq!(reason, format!("HTTP {status}: the server's own words"));
        assert!(tokens.is_empty());
    }
    failed(
        |connection, _| {
            connection.raw("HTTP/1.1 307 Temporary Redirect\r\nLocation: /v2/x\r\nContent-Length: 0\r\n\r\n");
        },
        &["307", "/v2/x", "correct `url`"],
    );
    failed(
        |connection, _| connection.whole("200 OK", "application/json", r#"{"choices":[]}"#),
        &["application/json, not with a stream"],
    );
}

#[test]
fn a_cut_stream_is_a_failure_with_what_came() {
    let script = |connection: &mut Answering, _: Heard| {
        connection.begin();
        connection.token();
        connection.token();
        connection.stream.shutdown(std::net::Shutdown::Both).unwrap();
    };
    let (end, tokens) = outcome(|options| options, script);
    let EventKind::Failed { reason } = &end else { panic!("{end:?}") };
    assert!(reason.contains("broke off") && reason.contains("after 2 tokens"), "{reason}");
    assert_eq!(tokens.len(), 2);
    // Cut before there was an answer, and ended in order without one.
    failed(|connection, _| connection.stream.shutdown(std::net::Shutdown::Both).unwrap(), &["connection"]);
    let polite = |connection: &mut Answering, _: Heard| {
        connection.begin();
        connection.token();
        connection.raw("0\r\n\r\n");
    };
    failed(polite, &["it ended after 1 tokens", "finish_reason"]);
}

#[test]
fn garbage_is_a_failure_with_what_it_is() {
    failed(|connection, _| connection.raw("SSH-2.0-OpenSSH_9.6\r\n\r\n"), &["invalid HTTP"]);
    failed(
        |connection, _| {
            connection.begin();
            connection.event("{\"choices\": [");
        },
        &["no chunk of a completion", "EOF"],
    );
    failed(
        |connection, _| {
            connection.begin();
            connection.event(r#"{"error":{"message":"the engine has died","code":500}}"#);
        },
        &["broke off", "the engine has died"],
    );
    failed(
        |connection, _| {
            connection.begin();
            connection.raw("not a chunk size\r\n");
        },
        &["broke off"],
    );
    let endless = |connection: &mut Answering, _: Heard| {
        connection.begin();
        let line = "x".repeat(4000);
        for _ in 0..600 {
            connection.raw(&format!("{:x}\r\n{line}\r\n", line.len()));
        }
    };
    failed(endless, &["an event of more than"]);
    let head = |connection: &mut Answering, _: Heard| {
        connection.raw("HTTP/1.1 200 OK\r\n");
        (0..9000).for_each(|i| connection.raw(&format!("X-{i}: {}\r\n", "y".repeat(60))));
    };
    failed(head, &["head"]);
    let more = |connection: &mut Answering, _: Heard| {
        connection.begin();
        (0..4).for_each(|_| connection.token());
    };
    failed(more, &["more than the 3 tokens"]);
}

#[test]
fn a_slow_server_is_waited_for_up_to_a_limit() {
    let slow = |connection: &mut Answering, _: Heard| {
        std::thread::sleep(ms(300));
        connection.begin();
        connection.token();
        connection.token();
        connection.finish();
    };
    let (url, _) = serve(slow);
    let (mut server, clock) = start(options(&url));
    let sent = clock.now();
    server.submit(request(1, 3)).unwrap();
    let early = server.next_event(clock.now() + ms(50)).unwrap();
    assert_eq!(early, None, "waiting ends at the time that was given");
    let first = next(&mut server, clock);
    assert!(first.at - sent >= ms(290), "{:?}", first.at - sent);

    let silent = |options| OpenAiOptions { silence_timeout: ms(150), ..options };
    let (end, _) = outcome(silent, slow);
    assert!(matches!(&end, EventKind::Failed { reason } if reason == "it was silent for 0.15 s"), "{end:?}");
    let stuck = |connection: &mut Answering, _: Heard| {
        connection.begin();
        connection.token();
        std::thread::sleep(ms(500));
    };
    let (end, tokens) = outcome(silent, stuck);
    let EventKind::Failed { reason } = &end else { panic!("{end:?}") };
    assert!(reason.contains("silent for 0.15 s after 1 tokens"), "{reason}");
    assert_eq!(tokens.len(), 1);
}

#[test]
fn cancellation_closes_the_connection_before_and_amid_the_answer() {
    for begun in [false, true] {
        let (say, closed) = channel();
        let (url, _) = serve(move |connection, _| {
            if begun {
                connection.begin();
                connection.token();
            }
            say.send(connection.closed_within(PATIENCE)).unwrap();
        });
        let (mut server, clock) = start(options(&url));
        server.submit(request(1, 3)).unwrap();
        if begun {
            assert!(matches!(next(&mut server, clock).kind, EventKind::Tokens(_)));
        } else {
            std::thread::sleep(ms(50));
        }
        server.cancel(1).unwrap();
        server.cancel(1).unwrap();
        server.cancel(77).unwrap();
        assert_eq!(next(&mut server, clock).kind, EventKind::Cancelled);
        assert_eq!(server.next_event(clock.now() + ms(50)).unwrap(), None, "it ends once");
        assert_eq!(closed.recv_timeout(PATIENCE), Ok(true), "begun: {begun}");
    }
}

#[test]
fn dropping_it_closes_what_is_open_at_once() {
    let (say, closed) = channel();
    let (url, _) = serve(move |connection, _| say.send(connection.closed_within(PATIENCE)).unwrap());
    let (mut server, _) = start(options(&url));
    server.submit(request(1, 3)).unwrap();
    std::thread::sleep(ms(50));
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(closed.recv_timeout(PATIENCE), Ok(true));
}

/// A request that comes again under an old id, as after a warm-up, must not end with what is left of the old one.
#[test]
fn an_id_may_come_again_while_the_old_connection_lingers() {
    let (url, _) = serve(|connection, request| {
        connection.begin();
        connection.token();
        connection.token();
        if request.number == 0 {
            // No end of the body after [DONE]: the client gives it a moment.
            connection.event(r#"{"choices":[{"index":0,"text":"z","finish_reason":"length"}]}"#);
            connection.event("[DONE]");
            std::thread::sleep(ms(400));
        } else {
            std::thread::sleep(ms(300));
            connection.finish();
        }
    });
    let (mut server, clock) = start(options(&url));
    for _ in 0..2 {
        server.submit(request(5, 3)).unwrap();
        let end = events(&mut server, clock, 5).pop().unwrap();
        assert_eq!(end.kind, finished(FinishReason::Stop));
    }
}

fn burst(requests: usize) -> Workload {
    let fixed = |tokens| LengthDistribution::Fixed { tokens };
    let spec = WorkloadSpec {
        requests,
        lengths: LengthSource::Independent { input: fixed(4), output: fixed(3) },
        arrivals: ArrivalProcess::AllAtOnce {},
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    };
    let limits = ModelLimits { vocab_size: 100, reserved_ids: 5, max_model_len: 64 };
    Workload::generate(&spec, 1, &limits).unwrap()
}

/// Tests run beside each other: a client that is late is no matter here.
fn patient() -> LoadOptions {
    LoadOptions { lag_bound_s: 5.0, ..LoadOptions::default() }
}

/// Each request takes 100 ms at the server.
fn a_tenth_of_a_second(connection: &mut Answering, _: Heard) {
    std::thread::sleep(ms(100));
    connection.begin();
    connection.token();
    connection.token();
    connection.finish();
}

#[test]
fn waiting_for_a_connection_counts_from_the_intended_arrival() {
    let (url, seen) = serve(a_tenth_of_a_second);
    let (mut server, clock) = start(OpenAiOptions { max_connections: 2, ..options(&url) });
    let workload = burst(6);
    let generator = LoadGenerator::new(&workload, patient()).unwrap();
    let result = generator.run(&mut server, &clock, &AtomicBool::new(false), &mut |_| {});
    assert!(result.is_valid(), "{:?} {:?}", result.void, result.protocol_errors);
    assert_eq!(seen.at_once.lock().unwrap().1, 2, "requests at the server at once");
    assert_eq!(result.steps, []);
    let mut waits: Vec<f64> = result.records.iter().map(|record| record.ttft_s().unwrap()).collect();
    waits.sort_by(f64::total_cmp);
    // Three rounds of two.
    for (wait, round) in waits.iter().zip([1, 1, 2, 2, 3, 3]) {
        assert!(*wait >= 0.095 * f64::from(round), "{waits:?}");
    }
    for record in &result.records {
        assert_eq!(record.outcome, Outcome::Finished { reason: FinishReason::Stop });
        assert!(record.intended_s == result.started_s, "{record:?}");
    }
}

#[test]
fn more_than_may_wait_are_rejected() {
    let (url, _) = serve(a_tenth_of_a_second);
    let (mut server, clock) = start(OpenAiOptions { max_connections: 1, max_waiting: 1, ..options(&url) });
    let workload = burst(4);
    let generator = LoadGenerator::new(&workload, patient()).unwrap();
    let result = generator.run(&mut server, &clock, &AtomicBool::new(false), &mut |_| {});
    assert!(result.is_valid(), "{:?}", result.protocol_errors);
    let rejected =
        |outcome: &Outcome| matches!(outcome, Outcome::Rejected { reason } if reason.contains("2 requests"));
    assert_eq!(result.records.iter().filter(|record| rejected(&record.outcome)).count(), 2);
}

#[test]
fn it_does_not_start_without_a_server_or_with_options_that_mean_nothing() {
    let refused = |options: OpenAiOptions| {
        OpenAiServer::start(options, WallClock::start()).map(drop).unwrap_err().to_string()
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let error = refused(options(&url));
    assert!(error.contains("nothing answers") && error.contains("start the server"), "{error}");
    assert!(refused(options("https://localhost/v1")).contains("TLS"));
    assert!(refused(OpenAiOptions { max_connections: 0, ..options(&url) }).contains("`max_connections`"));
    assert!(ApiKey::new("a\r\nHost: b".into()).is_err() && ApiKey::new(String::new()).is_err());
}
