//! Settings: what is accepted, and what an error says.

use quire_engine::{Engine, EngineConfig, KvLayout, PolicyConfig, Reservation};

use crate::fake::Fake;

fn parse(text: &str) -> Result<EngineConfig, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn refusal(text: &str) -> String {
    let config = parse(text).expect("the text is well-formed");
    Engine::new(Fake::new(64, 64, 64), &config).expect_err("the settings do not work").to_string()
}

#[test]
fn a_whole_configuration_is_read() {
    let config = parse(
        r#"{"scheduler": {"policy": {"kind": "static", "batch_size": 8, "timeout_ms": 50}, "token_budget": 64,
            "max_running": 8, "max_waiting": 10},
            "kv": {"kind": "contiguous", "reservation": "pow2"}, "max_model_len": 32}"#,
    )
    .unwrap();
    assert_eq!(config.scheduler.policy, PolicyConfig::Static { batch_size: 8, timeout_ms: 50 });
    assert_eq!(config.kv, KvLayout::Contiguous { reservation: Reservation::Pow2 });
    assert_eq!(parse(&serde_json::to_string(&config).unwrap()).unwrap(), config);
    assert_eq!(parse("{}").unwrap(), EngineConfig::default());
    assert!(Engine::new(Fake::new(64, 64, 64), &config).is_ok());
}

/// Configurations and manifests of before the switch share blocks, and those with it on are written as they were.
#[test]
fn blocks_are_shared_where_nothing_is_said() {
    assert!(parse("{}").unwrap().share_blocks);
    let off = parse(r#"{"share_blocks": false}"#).unwrap();
    assert!(!off.share_blocks && off != EngineConfig::default());
    let text = |config: &EngineConfig| serde_json::to_string(config).unwrap();
    assert_eq!(parse(&text(&off)).unwrap(), off);
    assert!(text(&off).contains("share_blocks") && !text(&EngineConfig::default()).contains("share_blocks"));
}

/// The same of chunked prefill.
#[test]
fn prefill_is_chunked_where_nothing_is_said() {
    let policy = |text: &str| parse(text).unwrap().scheduler.policy;
    let on = policy(r#"{"scheduler": {"policy": {"kind": "priority"}}}"#);
    assert_eq!(on, PolicyConfig::Priority { watermark: 0.01, aging_ms: 10_000, chunked: true });
    let off = parse(r#"{"scheduler": {"policy": {"kind": "priority", "chunked": false}}}"#).unwrap();
    assert_ne!(off.scheduler.policy, on);
    assert_eq!(parse(&serde_json::to_string(&off).unwrap()).unwrap(), off);
    assert_eq!(
        serde_json::to_string(&on).unwrap(),
        r#"{"kind":"priority","watermark":0.01,"aging_ms":10000}"#
    );
}

/// A watermark is refused where it does nothing, but for 0 and for the default, which manifests have in them.
#[test]
fn contiguous_kv_takes_no_watermark() {
    for policy in ["continuous", "prefill_first", "priority"] {
        for (share, works) in [("", true), (r#", "watermark": 0.0"#, true), (r#", "watermark": 0.05"#, false)]
        {
            let text = format!(
                r#"{{"scheduler": {{"token_budget": 64, "policy": {{"kind": "{policy}"{share}}}}},
                    "kv": {{"kind": "contiguous", "reservation": "oracle"}}}}"#
            );
            let config = parse(&text).unwrap();
            assert_eq!(config.validate().is_ok(), works, "{text}");
            let written = parse(&serde_json::to_string(&config).unwrap()).unwrap();
            assert_eq!(written.validate().is_ok(), works, "{text} as it is written down");
        }
    }
}

#[test]
fn unknown_fields_are_refused_everywhere() {
    for text in [
        r#"{"blocksize": 3}"#,
        r#"{"scheduler": {"budget": 3}}"#,
        r#"{"scheduler": {"policy": {"kind": "continuous", "batch_size": 3}}}"#,
        r#"{"scheduler": {"policy": {"kind": "magic"}}}"#,
        r#"{"kv": {"kind": "paged", "block_size": 4, "reservation": "max"}}"#,
        r#"{"kv": {"kind": "contiguous", "reservation": "guess"}}"#,
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.contains("unknown"), "{error}");
    }
}

#[test]
fn settings_that_cannot_work_say_what_to_change() {
    let budget = |rest: &str| format!(r#"{{"scheduler": {{"token_budget": 64, {rest}}}}}"#);
    for (text, expected) in [
        (r#"{"scheduler": {"token_budget": 65}}"#.to_owned(), "takes 64 rows"),
        (budget(r#""max_running": 0"#), "max_running is 0"),
        (budget(r#""policy": {"kind": "continuous", "watermark": 1.0}"#), "watermark is 1"),
        (budget(r#""policy": {"kind": "static", "batch_size": 0, "timeout_ms": 1}"#), "batch_size is 0"),
        (
            budget(r#""max_running": 4, "policy": {"kind": "static", "batch_size": 5, "timeout_ms": 1}"#),
            "exceeds scheduler.max_running 4",
        ),
        (budget(r#""policy": {"kind": "static", "batch_size": 65, "timeout_ms": 1}"#), "token_budget 64"),
        (r#"{"scheduler": {"token_budget": 64}, "max_model_len": 65}"#.to_owned(), "choose 2 to 64"),
        (r#"{"scheduler": {"token_budget": 64}, "max_model_len": 1}"#.to_owned(), "at least 2"),
        (
            r#"{"scheduler": {"token_budget": 64}, "kv": {"kind": "paged", "block_size": 65}}"#.to_owned(),
            "hold no block of 65",
        ),
        (
            budget(r#""policy": {"kind": "continuous", "watermark": 0.1}}, "kv": {"kind": "contiguous", "reservation": "pow2""#),
            "leave it out, or set it to 0",
        ),
        (
            budget(r#""policy": {"kind": "priority", "watermark": 0.02}}, "kv": {"kind": "contiguous", "reservation": "max""#),
            "watermark is 0.02, and contiguous KV",
        ),
        (
            r#"{"scheduler": {"token_budget": 8}, "kv": {"kind": "contiguous", "reservation": "max"}, "share_blocks": false}"#
                .to_owned(),
            "share_blocks is off, and contiguous KV",
        ),
        (
            budget(r#""policy": {"kind": "static", "batch_size": 8, "timeout_ms": 1}}, "preemption": {"kind": "swap", "bytes": 4096"#),
            "static preempts nothing",
        ),
        (r#"{"kv": {"kind": "paged", "block_size": 257}}"#.to_owned(), "choose 1 to 256"),
        (r#"{"kv": {"kind": "paged", "block_size": 0}}"#.to_owned(), "choose 1 to 256"),
    ] {
        let error = refusal(&text);
        assert!(error.contains(expected), "{text}: {error}");
    }
    let max =
        parse(r#"{"scheduler": {"token_budget": 8}, "kv": {"kind": "contiguous", "reservation": "max"}}"#);
    let error = Engine::new(Fake::new(127, 65, 64), &max.unwrap()).unwrap_err().to_string();
    assert!(error.contains("regions of at most 64"), "{error}");
}
