//! The command as a user calls it.

use std::process::{Command, Output};

fn quire(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_quire")).args(args).output().expect("the command starts")
}

fn error(args: &[&str]) -> String {
    let output = quire(args);
    assert!(!output.status.success(), "{args:?} succeeded");
    String::from_utf8(output.stderr).expect("errors are text")
}

#[test]
fn bench_reports_every_figure_as_json() {
    let output = quire(&[
        "bench",
        "--model",
        "dummy:smollm2-135m",
        "--dtype",
        "q8_0",
        "--prefill",
        "3,20",
        "--decode",
        "2x5",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--threads",
        "2",
        "--json",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["model"], "dummy:smollm2-135m");
    assert_eq!(report["dummy"], true);
    let figures = report["figures"].as_array().expect("figures");
    let shapes: Vec<_> = figures.iter().map(|f| (f["kind"].as_str(), f["sequences"].as_u64())).collect();
    assert_eq!(shapes, [(Some("prefill"), Some(1)), (Some("prefill"), Some(1)), (Some("decode"), Some(2))]);
    assert!(figures.iter().all(|f| f["tokens_per_second"].as_f64().is_some_and(|rate| rate > 0.0)));
}

#[test]
fn errors_say_what_to_do() {
    assert!(error(&["generate", "--model", "/nowhere", "hi"]).contains("no such file or folder"));
    assert!(error(&["generate", "--model", "dummy:smollm2-135m", "hi"]).contains("no tokenizer"));
    assert!(error(&["generate", "--model", "x", "--top-p", "0", "hi"]).contains("top_p is 0"));
    assert!(error(&["generate", "--model", "x", "--drafter", "foo", "hi"]).contains("early-exit:LAYERS"));
    assert!(error(&["generate", "--model", "x", "--draft-tokens", "3", "hi"]).contains("--drafter"));
    assert!(error(&["bench", "--model", "dummy:none"]).contains("smollm2-135m"));
    assert!(error(&["bench", "--model", "x", "--decode", "8"]).contains("BATCHxCONTEXT"));
    assert!(error(&["bench", "--model", "dummy:smollm2-135m", "--prefill", "9000"]).contains("8192"));
    assert!(error(&["perplexity", "--model", "dummy:smollm2-135m", "/nowhere.txt"]).contains("/nowhere.txt"));
}

/// No machine has so many GPUs; whatever is missing before that is said as shortly.
#[test]
fn a_gpu_that_is_not_there_is_one_line() {
    let text = error(&["bench", "--model", "dummy:smollm2-135m", "--device", "cuda:1000"]);
    assert_eq!(text.lines().count(), 1, "{text}");
    let missing = match cfg!(feature = "cuda") {
        true => &["libcuda", "NVIDIA driver", "cuBLASLt", "no NVIDIA GPU", "there is no GPU 1000"][..],
        false => &["--features cuda"],
    };
    assert!(missing.iter().any(|what| text.contains(what)), "{text}");
}

#[test]
fn help_has_examples() {
    for command in ["generate", "bench", "perplexity"] {
        let output = quire(&[command, "--help"]);
        assert!(String::from_utf8_lossy(&output.stdout).contains("Example"), "{command}");
    }
}
