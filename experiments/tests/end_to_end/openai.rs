//! An experiment against an OpenAI-compatible server: a small one in this process, over real HTTP in real time.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;

use quire_experiments::record::CellStatus;
use quire_experiments::table::table;
use quire_experiments::{Experiment, RunData, Target, store};
use quire_workloads::{FinishReason, ModelLimits, Outcome};

use super::figures::resolve;
use super::scripted::CONFIG;

/// Gives every request the tokens it asks for, at once. Its threads end with the process.
fn serve() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || answer(stream));
        }
    });
    url
}

fn answer(mut stream: TcpStream) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            (reader.read_line(&mut head).ok()? > 0).then_some(())?;
        }
        let length = head.to_lowercase().split("content-length: ").nth(1)?.lines().next()?.parse().ok()?;
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body: serde_json::Value = serde_json::from_slice(&body).ok()?;
        let tokens = body["max_tokens"].as_u64()?;
        let event = |finish: &str| {
            format!("data: {{\"choices\":[{{\"text\":\"a\",\"finish_reason\":{finish}}}]}}\n\n")
        };
        let text = event("null").repeat(tokens as usize - 1) + &event("\"length\"") + "data: [DONE]\n\n";
        write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
        .ok()?;
    }
}

/// The scripted configuration with a server in the place of its narrow system, and more load in less time.
fn configuration(url: &str, more: &str) -> String {
    let server =
        format!("serve = {{ kind = \"openai\", url = \"{url}\", model = \"m\", ignore_eos = true{more} }}");
    let text = CONFIG.replacen("serve = { kind = \"external\" }", &server, 1);
    let text = text.replace("rates = [1, 8, 16]", "rates = [50, 100]");
    text.replace("fixed = 8", "fixed = 100").replace("lag_bound_s = 0.02", "lag_bound_s = 5.0")
}

fn experiment(text: &str) -> Experiment {
    let (source, settings) = resolve(text, "--quick --only narrow").unwrap();
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet()
}

#[test]
fn a_server_is_measured_as_any_system() {
    let temp = tempfile::tempdir().unwrap();
    let target = Target::New(temp.path().join("run"));
    let folder = experiment(&configuration(&serve(), "")).run(&target, &AtomicBool::new(false)).unwrap();
    let stored = store::read(&folder).unwrap();
    assert!(stored.cells.iter().all(|cell| cell.status == CellStatus::Done {}), "{:?}", stored.cells);
    assert_eq!(stored.requests.len(), 2 * 40);
    for row in &stored.requests {
        assert_eq!(row.record.outcome, Outcome::Finished { reason: FinishReason::Stop }, "{row:?}");
        assert_eq!((row.record.output_tokens, row.record.prompt_tokens), (11, 20));
    }
    let label = &stored.manifest.labels[1];
    assert!(label.contains("narrow: a server elsewhere over HTTP"), "{label}");
    let data = RunData::load(&folder).unwrap();
    assert!(data.cells.iter().all(|cell| cell.window.as_ref().unwrap().steps.is_none()));
    assert!(table(&data).contains("narrow"));
}

#[test]
fn a_key_that_is_not_there_and_a_server_that_is_not_say_what_to_do() {
    let temp = tempfile::tempdir().unwrap();
    let target = Target::New(temp.path().join("run"));
    let mut no_key = experiment(&configuration(&serve(), ", api_key_env = \"QUIRE_TEST_NO_SUCH_KEY\""));
    let error = no_key.run(&target, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.contains("`api_key_env`") && error.contains("QUIRE_TEST_NO_SUCH_KEY"), "{error}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let target = Target::New(temp.path().join("other"));
    let error = experiment(&configuration(&url, "")).run(&target, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("start the server, or correct `url`"), "{error}");
}

/// Answers everything with `head` and `body`, and closes the connection.
fn answers(head: &'static str, body: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 4096]);
            let _ =
                write!(stream, "{head}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
        }
    });
    url
}

#[test]
fn a_server_that_serves_no_warm_up_request_ends_the_run_with_its_words() {
    let temp = tempfile::tempdir().unwrap();
    let cases = [
        ("HTTP/1.1 404 Not Found", "{\"error\":{\"message\":\"no model m\"}}", "no model m"),
        ("HTTP/1.1 200 OK\r\nContent-Type: application/json", "{\"choices\":[]}", "not with a stream"),
    ];
    for (i, (head, body, words)) in cases.into_iter().enumerate() {
        let text =
            configuration(&answers(head, body), "").replace("warm_up_requests = 0", "warm_up_requests = 2");
        let target = Target::New(temp.path().join(i.to_string()));
        let error = experiment(&text).run(&target, &AtomicBool::new(false)).unwrap_err().to_string();
        assert!(error.contains("cannot start narrow: it served none of its 2 warm-up requests"), "{error}");
        assert!(error.contains(words) && !error.contains("--resume"), "{error}");
    }
}

#[test]
fn a_server_that_dies_voids_the_cell() {
    // It takes the connection that asks whether it is there, serves one, and is gone.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        drop(listener.accept());
        drop(listener.accept());
    });
    let temp = tempfile::tempdir().unwrap();
    let text = configuration(&url, "").replace("rates = [50, 100]", "rates = [50]");
    let target = Target::New(temp.path().join("run"));
    let folder = experiment(&text).run(&target, &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();
    let CellStatus::Void { reason } = &data.cells[0].entry.status else { panic!("{:?}", data.cells[0]) };
    assert!(reason.starts_with("the system stopped: it does not take a connection"), "{reason}");
    assert!(data.unusable().is_some());
}
