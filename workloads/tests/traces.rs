//! Loaders against small files with known content, and against wrong ones.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use quire_workloads::TraceSource;
use quire_workloads::trace::{LogFilter, ReadOptions, TokenCounter, Trace, TraceFormat, Turn, Turns};

fn load(name: &str, options: &ReadOptions) -> Trace {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    Trace::load(&path, options).unwrap()
}

fn shape(trace: &Trace) -> Vec<(f64, u32, u32)> {
    trace.requests.iter().map(|r| (r.arrival_s, r.input_len, r.output_len)).collect()
}

fn error(bytes: &str) -> String {
    Trace::parse(bytes.as_bytes(), "t", &ReadOptions::default()).unwrap_err().to_string()
}

#[test]
fn a_byte_order_mark_is_no_part_of_any_format() {
    for name in ["azure_2023.csv", "burst_gpt.csv", "mooncake.jsonl", "share_gpt.json"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
        let plain = std::fs::read(path).unwrap();
        let marked = [b"\xef\xbb\xbf".to_vec(), plain.clone()].concat();
        let [plain, marked] =
            [plain, marked].map(|bytes| Trace::parse(&bytes, name, &ReadOptions::default()).unwrap());
        assert_eq!(plain, marked, "{name}");
    }
}

#[test]
fn azure_2023() {
    let trace = load("azure_2023.csv", &ReadOptions::default());
    assert_eq!(trace.meta.format, TraceFormat::Azure);
    assert_eq!(shape(&trace), [(0.0, 374, 44), (0.5, 396, 109), (3.0, 879, 55)]);
    assert_eq!((trace.meta.rows, trace.meta.out_of_order), (5, 0));
    assert_eq!((trace.meta.left_out.empty_prompt, trace.meta.left_out.empty_output), (1, 1));
}

#[test]
fn azure_2024_has_zones_and_whole_seconds_and_is_sorted() {
    let trace = load("azure_2024.csv", &ReadOptions::default());
    assert_eq!(shape(&trace), [(0.0, 100, 10), (0.5, 300, 30), (0.75, 200, 20)]);
    assert_eq!(trace.meta.out_of_order, 1);
}

#[test]
fn burst_gpt_leaves_out_failures_and_filters_services() {
    let trace = load("burst_gpt.csv", &ReadOptions::default());
    assert_eq!(shape(&trace), [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 300, 40)]);
    assert_eq!((trace.meta.left_out.failed, trace.meta.left_out.filtered), (1, 0));
    let chat = load("burst_gpt.csv", &ReadOptions { log: LogFilter::Conversation, ..Default::default() });
    assert_eq!(shape(&chat), [(0.0, 472, 18), (40.0, 1087, 230)]);
    assert_eq!((chat.meta.left_out.failed, chat.meta.left_out.filtered), (1, 1));
    let sessions = load("burst_gpt_sessions.csv", &ReadOptions::default());
    assert_eq!(shape(&sessions), [(0.0, 10, 20), (1.5, 11, 21)]);
}

#[test]
fn mooncake_keeps_blocks_and_spreads_ticks() {
    let mut trace = load("mooncake.jsonl", &ReadOptions::default());
    assert_eq!(shape(&trace), [(0.0, 1500, 52), (0.0, 1024, 26), (3.0, 600, 8), (9.0, 512, 5)]);
    assert_eq!(trace.requests[2].prefix.as_ref().unwrap().ids, [0, 3]);
    assert_eq!(trace.tick_s(), Some(3.0));
    let before = trace.clone();
    trace.spread_ticks(5);
    assert!(trace.requests[0].arrival_s < trace.requests[1].arrival_s);
    for (moved, own) in trace.requests.iter().zip(&before.requests) {
        assert!((0.0..3.0).contains(&(moved.arrival_s - own.arrival_s)));
        assert_eq!(moved.input_len, own.input_len);
    }
    let mut again = before;
    again.spread_ticks(5);
    assert_eq!(again, trace);
}

#[test]
fn share_gpt_counts_by_estimate_or_tokenizer() {
    let trace = load("share_gpt.json", &ReadOptions::default());
    // "Answer." 7 and "What is a page?" 15 characters: 2 + 4 tokens at 4 each; "A block of memory." 18: 5.
    assert_eq!(shape(&trace), [(0.0, 6, 5)]);
    assert!(!trace.meta.timed && trace.meta.tokens_by.as_deref().unwrap().contains("estimate"));
    assert_eq!((trace.meta.rows, trace.meta.left_out.no_exchange), (3, 2));
    let words = |text: &str| text.split_whitespace().count();
    let options =
        ReadOptions { turns: Turns::Each, tokens: TokenCounter::Tokenizer(&words), ..Default::default() };
    let trace = load("share_gpt.json", &options);
    // 1 + 4 words, then 4 more of the answer and 3 of the next question.
    assert_eq!(shape(&trace), [(0.0, 5, 4), (0.0, 12, 3)]);
    assert_eq!(trace.requests[1].turn, Some(Turn { conversation: 0, turn: 1 }));
    assert_eq!(trace.meta.tokens_by.as_deref(), Some("tokenizer"));
}

/// They were read and dropped in silence.
#[test]
fn options_of_another_format_are_refused() {
    let path = |name: &str| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let files = [
        ("azure", "azure_2023.csv"),
        ("burst_gpt", "burst_gpt.csv"),
        ("mooncake", "mooncake.jsonl"),
        ("share_gpt", "share_gpt.json"),
    ];
    for (option, value, of) in [
        ("log", "\"conversation\"", "burst_gpt"),
        ("turns", "\"each\"", "share_gpt"),
        ("chars_per_token", "3.5", "share_gpt"),
    ] {
        for (format, file) in files {
            let text = format!("{{\"path\": {:?}, {option:?}: {value}}}", path(file));
            let source: TraceSource = serde_json::from_str(&text).unwrap();
            let loaded = source.load(Path::new(""));
            if format == of {
                loaded.unwrap();
                continue;
            }
            let expected = format!("`{option}` is for {of}, and this trace is {format}: leave it out");
            let error = loaded.unwrap_err().to_string();
            assert!(error.contains(file) && error.ends_with(&expected), "{error}");
        }
    }
    for (format, file) in files {
        let text = format!("{{\"path\": {:?}, \"spread_ticks\": true}}", path(file));
        let source: TraceSource = serde_json::from_str(&text).unwrap();
        let loaded = source.load(Path::new(""));
        assert_eq!(loaded.is_err(), format == "share_gpt", "only its traces have no times");
        if let Err(error) = loaded {
            assert!(error.to_string().contains("`spread_ticks` is for traces with times"), "{error}");
        }
    }
    for (format, file) in files {
        // What a file need not say is no harm, and a tokenizer is for whatever has texts.
        let text = format!(
            "{{\"path\": {:?}, \"log\": \"all\", \"turns\": \"first\", \"chars_per_token\": 4.0}}",
            path(file)
        );
        serde_json::from_str::<TraceSource>(&text).unwrap().load(Path::new("")).unwrap();
        let words = |text: &str| text.split_whitespace().count();
        let trace =
            load(file, &ReadOptions { tokens: TokenCounter::Tokenizer(&words), ..Default::default() });
        assert_eq!(trace.meta.tokens_by.is_some(), format == "share_gpt");
    }
}

#[test]
fn reading_stops_at_the_requests_asked_for() {
    let options = ReadOptions { max_requests: Some(2), ..Default::default() };
    assert_eq!(load("azure_2023.csv", &options).requests.len(), 2);
    assert_eq!(load("burst_gpt.csv", &options).requests.len(), 2);
    assert_eq!(load("mooncake.jsonl", &options).requests.len(), 2);
    let options = ReadOptions { max_requests: Some(1), ..Default::default() };
    assert_eq!(load("share_gpt.json", &options).meta.rows, 1);
}

#[test]
fn errors_say_where() {
    let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n";
    let after = |row: &str| error(&format!("{azure}{row}\n"));
    assert_eq!(
        after("2023-11-16 18:15:46.68,-3,44"),
        "t:3:24: ContextTokens \"-3\": not a whole number of tokens"
    );
    assert_eq!(
        after("2023-11-16 18:15:46.68,3,4e1"),
        "t:3:26: GeneratedTokens \"4e1\": not a whole number of tokens"
    );
    assert_eq!(
        after("2023-11-31 18:15:46.68,3,4"),
        "t:3:1: TIMESTAMP \"2023-11-31 18:15:46.68\": no such day in that month"
    );
    assert_eq!(after("2023-11-16 18:15:46.68,3"), "t:3:25: the row has 2 fields, the header 3");
    assert_eq!(
        after("2023-11-16 18:15:46.68,99999999999,4"),
        "t:3:24: ContextTokens \"99999999999\": more than 16777216 tokens"
    );
    let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n";
    assert_eq!(
        error(&format!("{burst}5,x,1,2,3,Dog log\n")),
        "t:2:11: Log Type \"Dog log\": neither \"Conversation log\" nor \"API log\""
    );
    assert_eq!(
        error(&format!("{burst}nan,x,1,2,3,API log\n")),
        "t:2:1: Timestamp \"nan\": not a time between 0 and 1e12 seconds"
    );
    assert_eq!(error("{\"timestamp\": 0, \"input_length\": 5}\n"), "t:1:35: missing field `output_length`");
    assert!(
        error("{\"timestamp\":0,\"input_length\":5,\"output_length\":1,\"hash_ids\":[1,2]}")
            .contains("2 hash_ids")
    );
    assert!(error("{\"timestamp\":-1,\"input_length\":5,\"output_length\":1}").contains("not a time"));
    assert_eq!(
        error("[{\"id\": 3,\n \"conversations\": 4}]"),
        "t:2:20: invalid type: integer `4`, expected a sequence"
    );
    assert!(error("[{\"id\": 3").starts_with("t:1:9: EOF"));
    assert!(error("[] trailing").starts_with("t:1:4: trailing"));
}

#[test]
fn what_is_no_trace_is_refused() {
    assert!(error("").contains("it is empty"));
    assert!(error("a,b,c\n1,2,3\n").contains("begins \"a,b,c\""));
    assert!(
        error("\u{feff}TIMESTAMP,ContextTokens,GeneratedTokens\n").contains("no usable request in 0 rows")
    );
    let wrong = ReadOptions { format: Some(TraceFormat::BurstGpt), ..Default::default() };
    let bytes = b"TIMESTAMP,ContextTokens,GeneratedTokens\n";
    assert_eq!(
        Trace::parse(bytes, "t", &wrong).unwrap_err().to_string(),
        "t:1:1: the header has no column \"Timestamp\""
    );
}

fn any_format() -> impl Strategy<Value = Option<TraceFormat>> {
    use TraceFormat::{Azure, BurstGpt, Mooncake, ShareGpt};
    prop::sample::select(vec![None, Some(Azure), Some(BurstGpt), Some(Mooncake), Some(ShareGpt)])
}

/// A valid file with some bytes overwritten, cut or repeated: nearer to what damaged files look like than noise.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let files: Vec<&'static [u8]> = vec![
        include_bytes!("data/azure_2023.csv"),
        include_bytes!("data/azure_2024.csv"),
        include_bytes!("data/burst_gpt.csv"),
        include_bytes!("data/mooncake.jsonl"),
        include_bytes!("data/share_gpt.json"),
    ];
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 0..6);
    (prop::sample::select(files), edits).prop_map(|(file, edits)| {
        let mut bytes = file.to_vec();
        for (place, byte, how) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = place.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.truncate(at),
                _ => bytes.insert(at, byte),
            }
        }
        bytes
    })
}

proptest! {
    #[test]
    fn no_bytes_make_a_loader_panic(bytes in damaged(), format in any_format()) {
        let options = ReadOptions { format, ..Default::default() };
        if let Ok(trace) = Trace::parse(&bytes, "t", &options) {
            prop_assert!(!trace.requests.is_empty());
            prop_assert_eq!(trace.requests[0].arrival_s, 0.0);
            for pair in trace.requests.windows(2) {
                prop_assert!(pair[0].arrival_s <= pair[1].arrival_s);
            }
            for request in &trace.requests {
                prop_assert!(request.input_len > 0 && request.output_len > 0);
            }
        }
    }

    #[test]
    fn noise_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), format in any_format()) {
        let _ = Trace::parse(&bytes, "t", &ReadOptions { format, ..Default::default() });
    }
}
