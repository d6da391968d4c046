//! The protocol against a scripted peer: a thread at the other end of two pipes.

use std::io::{BufRead, BufReader, Lines, PipeReader, PipeWriter, Write};
use std::time::Duration;

use quire_workloads::{
    Clock, Decoding, EventKind, FinishReason, GenerationRequest, ServingSystem, SystemError, TokenEvent,
    WallClock,
};

use super::protocol::{Batching, Command, Hello, PROTOCOL};
use super::{SCRIPT, TransformersBatching, TransformersModel, TransformersOptions, TransformersServer};

const READY: &str = r#"{"type":"ready","protocol":2,"versions":{"torch":"0"},"vocab_size":10}"#;
const PATIENCE: Duration = Duration::from_secs(20);

struct Peer {
    lines: Lines<BufReader<PipeReader>>,
    out: PipeWriter,
}

impl Peer {
    fn next(&mut self) -> Option<Command> {
        self.lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }

    fn say(&mut self, line: &str) {
        writeln!(self.out, "{line}").unwrap();
    }
}

fn static_batches(batch_size: usize) -> TransformersBatching {
    TransformersBatching::Static { batch_size, timeout: Duration::from_millis(100) }
}

fn options() -> TransformersOptions {
    let model = TransformersModel::Dummy { config: "{}".into(), seed: 1 };
    TransformersOptions { start_timeout: PATIENCE, ..TransformersOptions::new(model) }
}

/// A server whose peer does what `script` says.
fn with_peer(
    script: impl FnOnce(Peer) + Send + 'static,
) -> (Result<TransformersServer, SystemError>, WallClock, std::thread::JoinHandle<()>) {
    let (their_in, our_out) = std::io::pipe().unwrap();
    let (our_in, their_out) = std::io::pipe().unwrap();
    let peer = Peer { lines: BufReader::new(their_in).lines(), out: their_out };
    let thread = std::thread::spawn(move || script(peer));
    let clock = WallClock::start();
    (TransformersServer::connect(our_in, our_out, None, &options(), clock), clock, thread)
}

fn request(id: u64) -> GenerationRequest {
    GenerationRequest {
        id,
        prompt: vec![1, 2],
        max_tokens: 2,
        true_output_len: Some(1),
        class: 0,
        decoding: Decoding::Single {},
    }
}

fn next(server: &mut TransformersServer, clock: WallClock) -> Result<TokenEvent, SystemError> {
    server.next_event(clock.now() + PATIENCE).map(|event| event.expect("an event in time"))
}

fn start_failure(script: impl FnOnce(Peer) + Send + 'static) -> String {
    let (server, _, thread) = with_peer(script);
    thread.join().unwrap();
    server.err().expect("it cannot start").to_string()
}

#[test]
fn a_conversation_from_hello_to_the_end() {
    let (server, clock, thread) = with_peer(|mut peer| {
        let Some(Command::Hello(hello)) = peer.next() else { panic!("no hello") };
        assert_eq!(hello.protocol, PROTOCOL);
        assert_eq!(hello.batching, Batching::Static { batch_size: 8, timeout_s: 0.1 });
        peer.say(READY);
        assert!(matches!(peer.next(), Some(Command::Clock { now_s }) if now_s > 0.0));
        for expected in 1..=3 {
            let Some(Command::Submit { id, prompt, max_tokens: 2, end: Some(1) }) = peer.next() else {
                panic!("no request")
            };
            assert_eq!((id, prompt), (expected, vec![1, 2]));
        }
        assert!(matches!(peer.next(), Some(Command::Cancel { id: 3 })));
        peer.say(r#"{"type":"rejected","id":2,"reason":"too large"}"#);
        peer.say(r#"{"type":"tokens","tokens":[[1,7],[3,8]]}"#);
        peer.say(
            r#"{"type":"step","step":0,"start_s":0.5,"schedule_s":0.125,"execute_s":0.25,"commit_s":0.0,"running":2,"waiting":0,
                "prefill_tokens":4,"decode_tokens":0,"padding_tokens":0,"preempted":1,"kv_used":4,"kv_reserved":1,
                "kv_internal":3,"kv_free":9}"#
                .replace('\n', "")
                .as_str(),
        );
        peer.say(r#"{"type":"finished","id":1,"reason":"stop","preemptions":2}"#);
        peer.say(r#"{"type":"cancelled","id":3}"#);
        assert!(peer.next().is_none(), "our end closes the stream");
    });
    let mut server = server.unwrap();
    assert_eq!(server.versions()["torch"], "0");
    for id in 1..=3 {
        server.submit(request(id)).unwrap();
    }
    server.cancel(3).unwrap();
    server.cancel(77).unwrap();
    let events: Vec<(u64, EventKind)> =
        (0..5).map(|_| next(&mut server, clock).unwrap()).map(|event| (event.request, event.kind)).collect();
    let finished = EventKind::Finished { reason: FinishReason::Stop, preemptions: 2, cached_tokens: 0 };
    assert_eq!(
        events,
        [
            (2, EventKind::Rejected { reason: "too large".into() }),
            (1, EventKind::Tokens(vec![7])),
            (3, EventKind::Tokens(vec![8])),
            (1, finished),
            (3, EventKind::Cancelled),
        ]
    );
    let steps = server.take_steps();
    assert_eq!((steps.len(), steps[0].kv_free, steps[0].preempted), (1, 9, 1));
    assert_eq!((steps[0].schedule_s, steps[0].execute_s), (0.125, 0.25));
    assert_eq!(server.next_event(clock.now() + Duration::from_millis(10)).unwrap(), None);
    drop(server);
    thread.join().unwrap();
}

#[test]
fn what_a_peer_may_not_say_stops_the_run() {
    let cases = [
        ("", "no line of the protocol"),
        ("Loading weights...", "Loading weights"),
        (r#"{"type":"tokens","tokens":[[5,1]]}"#, "request 5, which does not run"),
        (r#"{"type":"tokens","tokens":[[1,1],[1,1],[1,1]]}"#, "more tokens than it wants"),
        (r#"{"type":"finished","id":1,"reason":"tired","preemptions":0}"#, "tired"),
        (r#"{"type":"cancelled","id":1,"extra":0}"#, "extra"),
        (READY, "after it was ready"),
    ];
    for (line, word) in cases {
        let (server, clock, thread) = with_peer(move |mut peer| {
            peer.next();
            peer.say(READY);
            peer.next();
            peer.next();
            peer.say(line);
            while peer.next().is_some() {}
        });
        let mut server = server.unwrap();
        server.submit(request(1)).unwrap();
        let error = loop {
            match next(&mut server, clock) {
                Ok(event) => assert!(matches!(event.kind, EventKind::Tokens(_))),
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains("stopped") && error.contains(word), "{line}: {error}");
        let again = next(&mut server, clock).unwrap_err().to_string();
        assert_eq!(error, again);
        drop(server);
        thread.join().unwrap();
    }
}

#[test]
fn a_peer_that_cannot_start_says_why() {
    let missing = start_failure(|mut peer| {
        peer.next();
        peer.say(r#"{"type":"missing","packages":["torch","transformers"]}"#);
    });
    assert!(missing.contains("torch and transformers") && missing.contains("pip install"), "{missing}");
    let failed = start_failure(|mut peer| {
        peer.next();
        peer.say(r#"{"type":"start_failed","reason":"OSError: no such folder"}"#);
    });
    assert!(failed.contains("cannot start transformers") && failed.contains("no such folder"), "{failed}");
    let old = start_failure(|mut peer| {
        peer.next();
        peer.say(&READY.replace(r#""protocol":2"#, r#""protocol":7"#));
    });
    assert!(old.contains("protocol 7, expected 2"), "{old}");
    let silent = start_failure(|mut peer| {
        peer.next();
    });
    assert!(silent.contains("output ended"), "{silent}");
}

#[test]
fn a_python_that_is_not_there_is_named_with_what_to_install() {
    let options = TransformersOptions { python: "/nonexistent/python".into(), ..options() };
    let error = TransformersServer::start(&options, WallClock::start()).err().unwrap().to_string();
    assert!(
        error.contains("/nonexistent/python") && error.contains("pip install torch transformers psutil"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn a_child_s_standard_error_is_shown_when_it_fails() {
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "read hello; echo 'out of memory' >&2; exit 3"]);
    let (process, output, input) = super::child::Process::start(command).unwrap();
    let error = TransformersServer::connect(output, input, Some(process), &options(), WallClock::start());
    let error = error.err().unwrap().to_string();
    assert!(error.contains("out of memory") && error.contains('3'), "{error}");
}

#[test]
fn options_that_cannot_work_are_refused() {
    let continuous = |token_budget, max_running, block_size| TransformersOptions {
        batching: TransformersBatching::Continuous { token_budget, max_running, block_size },
        kv_bytes: Some(1 << 20),
        ..options()
    };
    let cases = [
        (TransformersOptions { threads: 0, ..options() }, "threads"),
        (TransformersOptions { batching: static_batches(0), ..options() }, "batch_size"),
        (continuous(64, 0, 16), "max_running"),
        (continuous(64, 8, 2), "block_size"),
        (continuous(4, 8, 16), "token_budget"),
        (TransformersOptions { kv_bytes: None, ..continuous(64, 8, 16) }, "kv_bytes"),
    ];
    for (options, word) in cases {
        let (reader, writer) = std::io::pipe().unwrap();
        let error = TransformersServer::connect(reader, writer, None, &options, WallClock::start());
        let error = error.err().unwrap().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn batching_is_told_in_the_first_line() {
    let options = TransformersOptions {
        batching: TransformersBatching::Continuous { token_budget: 64, max_running: 8, block_size: 16 },
        kv_bytes: Some(1 << 20),
        ..options()
    };
    let hello = serde_json::to_value(Hello::new(&options).unwrap()).unwrap();
    let expected = serde_json::json!(
        {"kind": "continuous", "token_budget": 64, "max_running": 8, "block_size": 16}
    );
    assert_eq!(hello["batching"], expected);
    assert_eq!(hello["protocol"], PROTOCOL);
}

/// Each file is a raw string of Python in the program: it ends where its quotes come again.
#[test]
fn the_program_s_files_do_not_hold_its_quotes() {
    let files = SCRIPT.matches("module('").count();
    assert_eq!((files, SCRIPT.matches("'''").count()), (4, 8));
}
