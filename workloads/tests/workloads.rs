//! Workloads: what is drawn has the stated statistics, is the same every time, and hides what it should.

use std::path::PathBuf;

use proptest::prelude::*;
use quire_workloads::stats::{StatsName, TraceStats, azure_code_2023, azure_conv_2023};
use quire_workloads::*;

const LIMITS: ModelLimits = ModelLimits { vocab_size: 49_152, reserved_ids: 17, max_model_len: 2048 };
const UNBOUND: ModelLimits = ModelLimits { max_model_len: 1 << 20, ..LIMITS };

fn spec(name: StatsName, arrivals: ArrivalProcess, requests: usize) -> WorkloadSpec {
    let lengths = LengthSource::Stats { name };
    WorkloadSpec {
        requests,
        lengths,
        arrivals,
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    }
}

fn trace_spec(file: &str, requests: usize, arrivals: ArrivalProcess) -> WorkloadSpec {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(file);
    let lengths = LengthSource::Trace(TraceSource::new(path));
    WorkloadSpec {
        requests,
        lengths,
        arrivals,
        length_scale: 1.0,
        over_limit: OverLimit::Keep,
        shared_prefix: 0,
        conversations: None,
        classes: Vec::new(),
        decoding: Decoding::Single {},
    }
}

fn gaps(workload: &Workload) -> Vec<f64> {
    workload.requests.windows(2).map(|pair| pair[1].arrival_s - pair[0].arrival_s).collect()
}

fn mean_and_cv(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
    (mean, variance.sqrt() / mean)
}

fn near(what: &str, got: f64, stated: f64, tolerance: f64) {
    assert!((got / stated - 1.0).abs() <= tolerance, "{what}: {got}, stated {stated}");
}

fn check(what: &str, mut lengths: Vec<u32>, mean: f64, p50: f64, p95: f64) {
    lengths.sort_unstable();
    let quantile = |p: f64| f64::from(lengths[(p * (lengths.len() - 1) as f64) as usize]);
    let sum: f64 = lengths.iter().map(|&v| f64::from(v)).sum();
    near(&format!("{what} mean"), sum / lengths.len() as f64, mean, 0.03);
    near(&format!("{what} p50"), quantile(0.5), p50, 0.04);
    near(&format!("{what} p95"), quantile(0.95), p95, 0.05);
}

fn lengths(name: StatsName) -> (Vec<u32>, Vec<u32>) {
    let workload =
        Workload::generate(&spec(name, ArrivalProcess::AllAtOnce {}, 20_000), 7, &UNBOUND).unwrap();
    let pair = |r: &WorkloadRequest| (r.prompt.len() as u32, r.true_output_len.unwrap());
    workload.requests.iter().map(pair).unzip()
}

#[test]
fn azure_conversation_is_as_stated() {
    let (input, output) = lengths(StatsName::AzureConv2023);
    check("input", input, 1155.0, 1020.0, 4083.0);
    check("output", output, 211.0, 129.0, 451.0);
    let stats = azure_conv_2023();
    assert_eq!(stats.requests, 19_366);
    let own = stats.arrivals.unwrap();
    near("rate", own.rate, 5.53, 0.001);
    near("cv", own.cv, 1.09, 0.005);
    let drawn =
        Workload::generate(&spec(StatsName::AzureConv2023, stats.arrivals_at(own.rate), 20_000), 1, &LIMITS);
    let (mean, cv) = mean_and_cv(&gaps(&drawn.unwrap()));
    near("drawn rate", 1.0 / mean, 5.53, 0.03);
    near("drawn cv", cv, 1.09, 0.03);
}

#[test]
fn azure_code_is_as_stated() {
    let (input, output) = lengths(StatsName::AzureCode2023);
    check("input", input, 2048.0, 1469.0, 7303.0);
    check("output", output, 28.0, 13.0, 90.0);
    let own = azure_code_2023().arrivals.unwrap();
    near("rate", own.rate, 2.57, 0.002);
    near("cv", own.cv, 13.2, 0.005);
    near("busy cv", own.busy_cv, 2.2, 0.01);
}

#[test]
fn sharegpt_like_has_the_stated_means() {
    let (input, output) = lengths(StatsName::ShareGptLike);
    let mean = |values: &[u32]| values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
    near("input", mean(&input), 161.0, 0.03);
    near("output", mean(&output), 338.0, 0.03);
    assert!(StatsName::ShareGptLike.stats().source.contains("not data"));
}

#[test]
fn carried_tables_keep_the_correlation_of_lengths() {
    let stats: TraceStats = azure_conv_2023();
    let (input, output) = lengths(StatsName::AzureConv2023);
    let rank = |values: &[u32]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by_key(|&i| values[i]);
        let mut ranks = vec![0.0; values.len()];
        order.iter().enumerate().for_each(|(rank, &i)| ranks[i] = rank as f64);
        ranks
    };
    let (a, b) = (rank(&input), rank(&output));
    let mean = (a.len() - 1) as f64 / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let got = product(&a, &b) / product(&a, &a);
    assert!((got - stats.rank_correlation).abs() < 0.05, "{got}, stated {}", stats.rank_correlation);
}

#[test]
fn arrivals_have_their_rate_and_burstiness() {
    for (arrivals, cv) in [
        (ArrivalProcess::Poisson { rate: 4.0 }, 1.0),
        (ArrivalProcess::Gamma { rate: 4.0, cv: 2.0 }, 2.0),
        (ArrivalProcess::Gamma { rate: 4.0, cv: 0.5 }, 0.5),
    ] {
        let workload =
            Workload::generate(&spec(StatsName::ShareGptLike, arrivals, 20_000), 3, &LIMITS).unwrap();
        let (mean, got) = mean_and_cv(&gaps(&workload));
        near("mean gap", mean, 0.25, 0.05);
        near("cv", got, cv, 0.05);
    }
    // A clipped Poisson process has no gap beyond 3 means; this one has the share that it should have.
    let poisson = spec(StatsName::ShareGptLike, ArrivalProcess::Poisson { rate: 1.0 }, 20_000);
    let gaps = gaps(&Workload::generate(&poisson, 3, &LIMITS).unwrap());
    let beyond = gaps.iter().filter(|gap| **gap > 3.0).count() as f64 / gaps.len() as f64;
    near("share of gaps beyond 3 means", beyond, (-3.0_f64).exp(), 0.1);
}

#[test]
fn the_rate_changes_times_alone() {
    let slow = spec(StatsName::AzureConv2023, ArrivalProcess::Gamma { rate: 1.0, cv: 1.09 }, 50);
    let fast = slow.at_rate(4.0).unwrap();
    let (slow, fast) =
        (Workload::generate(&slow, 9, &LIMITS).unwrap(), Workload::generate(&fast, 9, &LIMITS).unwrap());
    for (a, b) in slow.requests.iter().zip(&fast.requests) {
        assert_eq!(a.arrival_s / 4.0, b.arrival_s);
        assert_eq!((&a.prompt, a.true_output_len), (&b.prompt, b.true_output_len));
    }
}

#[test]
fn bytes_are_the_same_for_ever() {
    let spec = WorkloadSpec {
        length_scale: 0.125,
        over_limit: OverLimit::Drop,
        shared_prefix: 0,
        ..spec(StatsName::AzureConv2023, ArrivalProcess::Gamma { rate: 5.53, cv: 1.09 }, 100)
    };
    let workload = Workload::generate(&spec, 42, &LIMITS).unwrap();
    // A change of these means that every result made before cannot be repeated: only with a new schema.
    assert_eq!(workload.sha256(), "37d4a78c12a3d5bac6c6a0b7e7557b26638d2ea2a03f7cd964d2d76132c8793d");
}

#[test]
fn where_a_trace_lies_is_no_part_of_the_hash() {
    let temp = std::env::temp_dir().join(format!("quire-trace-{}", std::process::id()));
    std::fs::create_dir_all(&temp).unwrap();
    let spec = trace_spec("azure_2023.csv", 3, ArrivalProcess::TraceAt { rate: 1.0 });
    let LengthSource::Trace(source) = &spec.lengths else { unreachable!() };
    let copy = temp.join("other.csv");
    std::fs::copy(&source.path, &copy).unwrap();
    let moved = WorkloadSpec { lengths: LengthSource::Trace(TraceSource::new(&copy)), ..spec.clone() };
    let [here, there] = [&spec, &moved].map(|spec| Workload::generate(spec, 1, &LIMITS).unwrap());
    std::fs::remove_dir_all(&temp).unwrap();
    assert_eq!(here.sha256(), there.sha256());
    assert_ne!(here.sha256(), Workload::generate(&spec, 2, &LIMITS).unwrap().sha256());
}

#[test]
fn what_would_never_end_or_fit_is_refused_at_once() {
    let refused = |spec: &WorkloadSpec| Workload::generate(spec, 1, &LIMITS).unwrap_err().to_string();
    let even = ArrivalProcess::Gamma { rate: 1.0, cv: 1e-170 };
    assert!(refused(&spec(StatsName::AzureConv2023, even, 2)).contains("choose 0.001 to 100"));
    let all = spec(StatsName::AzureConv2023, ArrivalProcess::AllAtOnce {}, usize::MAX);
    assert!(refused(&all).contains("prompt tokens in all"));
    // Some 1,000 tokens a prompt: the limit is met long before all shapes are drawn.
    let many = WorkloadSpec { requests: 1 << 28, ..all };
    assert!(refused(&many).contains("prompt tokens in all"));
}

#[test]
fn closed_loops_and_bursts() {
    let burst =
        Workload::generate(&spec(StatsName::AzureConv2023, ArrivalProcess::AllAtOnce {}, 5), 1, &LIMITS);
    let burst = burst.unwrap();
    assert!(burst.requests.iter().all(|r| r.arrival_s == 0.0) && burst.offered_rate().is_none());
    let think = Some(ThinkTime::Exponential { mean_s: 2.0 });
    let closed = spec(StatsName::AzureConv2023, ArrivalProcess::ClosedLoop { users: 3, think }, 2000);
    let closed = Workload::generate(&closed, 1, &LIMITS).unwrap();
    assert_eq!(closed.header.users, Some(3));
    let thinks: Vec<f64> = closed.requests.iter().map(|r| r.arrival_s).collect();
    near("think time", mean_and_cv(&thinks).0, 2.0, 0.1);
}

#[test]
fn equal_blocks_have_equal_tokens() {
    let spec = trace_spec("mooncake.jsonl", 4, ArrivalProcess::Trace { rate_scale: 1.0 });
    let whole = Workload::generate(&spec, 1, &UNBOUND).unwrap();
    let [a, b, c, d] = &whole.requests[..] else { panic!("four requests") };
    assert_eq!((a.prompt.len(), b.prompt.len(), c.prompt.len(), d.prompt.len()), (1500, 1024, 600, 512));
    assert_eq!(a.prompt[..1024], b.prompt[..1024]);
    assert_eq!(a.prompt[..512], c.prompt[..512]);
    assert_ne!(a.prompt[512..600], c.prompt[512..600]);
    assert_ne!(a.prompt[..512], d.prompt[..512]);
    // Scaled by 1/8, the blocks of 512 are blocks of 64.
    let small = Workload::generate(&WorkloadSpec { length_scale: 0.125, ..spec }, 1, &UNBOUND).unwrap();
    let [a, b, c, _] = &small.requests[..] else { panic!("four requests") };
    assert_eq!((a.prompt.len(), b.prompt.len(), c.prompt.len()), (188, 128, 75));
    assert_eq!(a.prompt[..128], b.prompt[..]);
    assert_eq!(a.prompt[..64], c.prompt[..64]);
    assert_ne!(a.prompt[64..75], c.prompt[64..75]);
}

/// Blocks were scaled each for itself: at a scale that does not divide them, prompts shared more or less than their trace does.
#[test]
fn blocks_end_where_the_scaled_trace_has_them() {
    let row = |ids: std::ops::Range<u32>| {
        let ids: Vec<u32> = (0..10).chain(ids).collect();
        format!("{{\"timestamp\": 0, \"input_length\": 7680, \"output_length\": 5, \"hash_ids\": {ids:?}}}")
    };
    let text = [row(10..15), row(20..25)].join("\n");
    let trace = Trace::parse(text.as_bytes(), "t", &Default::default()).unwrap();
    let spec = |length_scale| WorkloadSpec {
        length_scale,
        ..trace_spec("mooncake.jsonl", 2, ArrivalProcess::AllAtOnce {})
    };
    // Ten of fifteen blocks of 512 are equal: 5,120 of 7,680 tokens.
    for (scale, len, shared) in [(1.0, 7680, 5120), (0.1, 768, 512), (0.003125, 24, 16), (0.0008, 6, 4)] {
        let workload = Workload::generate_from(&spec(scale), Some(&trace), 1, &UNBOUND).unwrap();
        let [a, b] = &workload.requests[..] else { panic!("two requests") };
        let common = a.prompt.iter().zip(&b.prompt).take_while(|(a, b)| a == b).count();
        assert_eq!((a.prompt.len(), common), (len, shared), "scaled by {scale}");
    }
}

#[test]
fn prompts_may_begin_alike() {
    let fixed = |tokens| LengthDistribution::Fixed { tokens };
    let spec = WorkloadSpec {
        lengths: LengthSource::Independent { input: fixed(40), output: fixed(10) },
        length_scale: 0.5,
        shared_prefix: 61,
        ..spec(StatsName::ShareGptLike, ArrivalProcess::Poisson { rate: 1.0 }, 3)
    };
    let workload = Workload::generate(&spec, 1, &LIMITS).unwrap();
    let [a, b, c] = &workload.requests[..] else { panic!("three requests") };
    // Half of 61, rounded, and half of 40.
    assert_eq!([a, b, c].map(|r| r.prompt.len()), [51; 3]);
    assert_eq!(a.prompt[..31], b.prompt[..31]);
    assert!(a.prompt[31..] != b.prompt[31..] && a.prompt[31..] != c.prompt[31..]);
    let other = Workload::generate(&spec, 2, &LIMITS).unwrap();
    assert_ne!(a.prompt[..31], other.requests[0].prompt[..31]);
    // The own part is what it is without.
    let plain = Workload::generate(&WorkloadSpec { shared_prefix: 0, ..spec }, 1, &LIMITS).unwrap();
    assert_eq!(plain.requests[1].prompt[..], b.prompt[31..]);
}

#[test]
fn trace_times_are_sped_up_and_windows_shift_them() {
    let mut spec = trace_spec("azure_2023.csv", 2, ArrivalProcess::Trace { rate_scale: 2.0 });
    let times = |spec: &WorkloadSpec| {
        let workload = Workload::generate(spec, 1, &UNBOUND).unwrap();
        workload.requests.iter().map(|r| (r.arrival_s, r.prompt.len())).collect::<Vec<_>>()
    };
    assert_eq!(times(&spec), [(0.0, 374), (0.25, 396)]);
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.window = Window::Skip { requests: 1 };
    assert_eq!(times(&spec), [(0.0, 396), (1.25, 879)]);
    // At a rate, the requests taken have it, whatever that of the whole trace is.
    assert_eq!(times(&spec.at_rate(4.0).unwrap()), [(0.0, 396), (0.25, 879)]);
    let one = WorkloadSpec { requests: 1, ..spec.at_rate(4.0).unwrap() };
    assert_eq!(times(&one), [(0.0, 396)]);
    spec.requests = 3;
    let short = Workload::generate(&spec, 1, &UNBOUND).unwrap_err().to_string();
    assert!(short.ends_with("3 requests asked for, 2 from request 1 on"), "{short}");
}

#[test]
fn random_windows_differ_by_seed_and_stay_inside() {
    let mut spec = trace_spec("azure_2023.csv", 2, ArrivalProcess::Poisson { rate: 1.0 });
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.window = Window::Random {};
    let first = |seed| Workload::generate(&spec, seed, &UNBOUND).unwrap().requests[0].prompt.len();
    let seen: std::collections::BTreeSet<usize> = (0..20).map(first).collect();
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [374, 396]);
}

/// Forty conversations of three turns, one turn of each after the other; all prompts begin with block 0.
fn talks() -> Trace {
    let row = |i: u32| {
        let (talk, turn) = (i % 40, i / 40);
        let ids: Vec<u32> = std::iter::once(0).chain((0..=turn).map(|t| 1 + talk * 10 + t)).collect();
        let (len, at) = (512 * ids.len(), i * 1000);
        format!(
            "{{\"timestamp\": {at}, \"input_length\": {len}, \"output_length\": 5, \"hash_ids\": {ids:?}}}"
        )
    };
    let text = (0..120).map(row).collect::<Vec<_>>().join("\n");
    Trace::parse(text.as_bytes(), "talks", &Default::default()).unwrap()
}

#[test]
fn a_sample_of_a_trace_has_whole_conversations() {
    let trace = talks();
    let mut spec = trace_spec("mooncake.jsonl", 12, ArrivalProcess::TraceAt { rate: 2.0 });
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.one_in = 4;
    let sample = |spec: &WorkloadSpec, seed| Workload::generate_from(spec, Some(&trace), seed, &UNBOUND);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..10 {
        // How many conversations there are is chance.
        let most = (1..=120)
            .take_while(|&requests| sample(&WorkloadSpec { requests, ..spec.clone() }, seed).is_ok());
        let spec = WorkloadSpec { requests: most.last().unwrap(), ..spec.clone() };
        let all = sample(&spec, seed).unwrap();
        assert!(all.requests.len() % 3 == 0 && (4..=17).contains(&(all.requests.len() / 3)));
        assert_eq!(all.header.dropped, 0, "what is not in the sample was not refused");
        assert!((all.offered_rate().unwrap() - 2.0).abs() < 1e-9);
        let talks = all.requests.len() / 3;
        for (first, last) in all.requests.iter().zip(&all.requests[2 * talks..]) {
            assert_eq!(first.prompt[..], last.prompt[..1024], "a turn goes on with the one before");
        }
        seen.insert(all.sha256());
        assert_eq!(all.sha256(), sample(&spec, seed).unwrap().sha256());
    }
    assert_eq!(seen.len(), 10, "every seed takes others");
    let short = sample(&WorkloadSpec { requests: 100, ..spec.clone() }, 1).unwrap_err().to_string();
    assert!(short.contains("of one conversation in 4"), "{short}");

    // Where nothing tells what belongs together, each request is for itself.
    let mut spec = trace_spec("azure_2023.csv", 1, ArrivalProcess::AllAtOnce {});
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.one_in = 3;
    let lens = (0..40).filter_map(|seed| Workload::generate(&spec, seed, &UNBOUND).ok());
    let lens: std::collections::BTreeSet<usize> = lens.map(|w| w.requests[0].prompt.len()).collect();
    assert_eq!(lens.into_iter().collect::<Vec<_>>(), [374, 396, 879]);
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.one_in = 0;
    assert!(spec.validate().unwrap_err().to_string().contains("one_in"));
}

#[test]
fn over_the_limit_is_kept_or_dropped_and_counted() {
    let limits = ModelLimits { max_model_len: 450, ..LIMITS };
    let mut spec = trace_spec("azure_2023.csv", 3, ArrivalProcess::AllAtOnce {});
    let kept = Workload::generate(&spec, 1, &limits).unwrap();
    let room: Vec<u32> = kept.requests.iter().map(|r| r.max_tokens).collect();
    assert_eq!(room, [76, 54, 1]);
    assert_eq!((kept.header.dropped, kept.header.inadmissible, kept.header.shortened), (0, 1, 1));
    (spec.over_limit, spec.requests) = (OverLimit::Drop, 1);
    let LengthSource::Trace(source) = &mut spec.lengths else { unreachable!() };
    source.window = Window::Skip { requests: 0 };
    let dropped = Workload::generate(&spec, 1, &limits).unwrap();
    assert_eq!(
        (dropped.requests.len(), dropped.requests[0].prompt.len(), dropped.header.dropped),
        (1, 374, 0)
    );
    spec.requests = 2;
    assert!(
        Workload::generate(&spec, 1, &limits)
            .unwrap_err()
            .to_string()
            .contains("2 requests asked for, 1 from")
    );
    // Synthetic lengths are drawn again until enough fit, or the limit is said to admit hardly any.
    let mut spec = self::spec(StatsName::AzureConv2023, ArrivalProcess::AllAtOnce {}, 200);
    spec.over_limit = OverLimit::Drop;
    let workload = Workload::generate(&spec, 1, &limits).unwrap();
    assert_eq!(workload.requests.len(), 200);
    assert!(workload.header.dropped > 200 && workload.header.inadmissible + workload.header.shortened == 0);
    let tiny = ModelLimits { max_model_len: 2, ..LIMITS };
    assert!(Workload::generate(&spec, 1, &tiny).unwrap_err().to_string().contains("hardly any fits"));
}

#[test]
fn specifications_read_from_toml_and_refuse_what_they_do_not_know() {
    let text = r#"
        requests = 60
        length_scale = 0.125
        over_limit = "drop"
        lengths = { kind = "stats", name = "azure_conv_2023" }
        arrivals = { kind = "closed_loop", users = 4, think = { kind = "fixed", seconds = 1.5 } }
    "#;
    let spec: WorkloadSpec = toml::from_str(text).unwrap();
    spec.validate().unwrap();
    assert_eq!(toml::from_str::<WorkloadSpec>(&toml::to_string(&spec).unwrap()).unwrap(), spec);
    for (from, to) in [
        ("users = 4", "users = 4, rate = 3"),
        ("name =", "seed = 1, name ="),
        ("requests = 60", "requests = 60\nrepeats = 2"),
        ("azure_conv_2023", "azure"),
        ("seconds = 1.5", "seconds = 1.5, mean_s = 2"),
    ] {
        assert!(toml::from_str::<WorkloadSpec>(&text.replace(from, to)).is_err(), "{to}");
    }
    let trace = r#"kind = "trace"
        path = "t.csv"
        window = { kind = "random" }"#;
    assert!(toml::from_str::<LengthSource>(trace).is_ok());
    assert!(toml::from_str::<LengthSource>(&format!("{trace}\nskip = 3")).is_err());
    assert!(toml::from_str::<LengthSource>(&trace.replace("random\"", "random\", requests = 1")).is_err());
    let table = r#"kind = "empirical"
        quantiles = [[0.0, 1.0], [0.5, 9.0], [1.0, 4.0]]"#;
    assert!(toml::from_str::<LengthDistribution>(table).unwrap_err().to_string().contains("comes after"));
}

#[test]
fn settings_without_meaning_are_refused() {
    let wrong = |change: fn(&mut WorkloadSpec)| {
        let mut spec = spec(StatsName::AzureConv2023, ArrivalProcess::Poisson { rate: 1.0 }, 10);
        change(&mut spec);
        Workload::generate(&spec, 1, &LIMITS).unwrap_err().to_string()
    };
    assert!(wrong(|s| s.requests = 0).starts_with("requests:"));
    assert!(wrong(|s| s.length_scale = f64::NAN).starts_with("length_scale:"));
    assert!(wrong(|s| s.arrivals = ArrivalProcess::Poisson { rate: -1.0 }).starts_with("arrivals.rate:"));
    assert!(wrong(|s| s.arrivals = ArrivalProcess::Gamma { rate: 1.0, cv: 0.0 }).starts_with("arrivals.cv:"));
    assert!(wrong(|s| s.arrivals = ArrivalProcess::Trace { rate_scale: 1.0 }).starts_with("arrivals.kind:"));
    assert!(wrong(|s| s.lengths = LengthSource::Pairs { pairs: vec![[3, 0]] }).starts_with("lengths.pairs:"));
    let limits = ModelLimits { reserved_ids: LIMITS.vocab_size, ..LIMITS };
    let spec = spec(StatsName::AzureConv2023, ArrivalProcess::AllAtOnce {}, 1);
    assert!(Workload::generate(&spec, 1, &limits).unwrap_err().to_string().starts_with("vocab_size:"));
}

fn any_length() -> impl Strategy<Value = LengthDistribution> {
    prop_oneof![
        (1..500_u32).prop_map(|tokens| LengthDistribution::Fixed { tokens }),
        (1..200_u32, 0..200_u32).prop_map(|(min, more)| LengthDistribution::Uniform { min, max: min + more }),
        (1.0..300.0, 0.1..1.5).prop_map(|(median, sigma)| LengthDistribution::Lognormal { median, sigma }),
        (1.0..300.0, 0.1..1.5).prop_map(|(mean, sigma)| LengthDistribution::LognormalMean { mean, sigma }),
        (1.0..300.0, 1.1..5.0)
            .prop_map(|(p50, times)| LengthDistribution::LognormalPercentiles { p50, p95: p50 * times }),
    ]
}

fn any_arrivals() -> impl Strategy<Value = ArrivalProcess> {
    prop_oneof![
        (0.01..100.0).prop_map(|rate| ArrivalProcess::Poisson { rate }),
        (0.01..100.0, 0.1..20.0).prop_map(|(rate, cv)| ArrivalProcess::Gamma { rate, cv }),
        (0.01..100.0).prop_map(|rate| ArrivalProcess::Uniform { rate }),
        Just(ArrivalProcess::AllAtOnce {}),
        (1..9_u32).prop_map(|users| ArrivalProcess::ClosedLoop { users, think: None }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn workloads_are_valid_repeatable_and_survive_a_file(
        (input, output, arrivals) in (any_length(), any_length(), any_arrivals()),
        (requests, seed, length_scale) in (1..30_usize, any::<u64>(), 0.05..2.0),
    ) {
        let lengths = LengthSource::Independent { input, output };
        let spec = WorkloadSpec { requests, lengths, arrivals, length_scale, over_limit: OverLimit::Keep, shared_prefix: 0, conversations: None, classes: Vec::new(), decoding: Decoding::Single {} };
        let limits = ModelLimits { vocab_size: 100, reserved_ids: 3, max_model_len: 512 };
        let workload = Workload::generate(&spec, seed, &limits).unwrap();
        workload.validate().unwrap();
        prop_assert_eq!(workload.requests.len(), requests);
        for request in &workload.requests {
            prop_assert!(request.prompt.iter().all(|token| (3..100).contains(token)));
            // What a system may see does not say where the answer ends.
            prop_assert_eq!(request.max_tokens, 512_u32.saturating_sub(request.prompt.len() as u32).max(1));
        }
        prop_assert_eq!(workload.sha256(), Workload::generate(&spec, seed, &limits).unwrap().sha256());
        let mut file = Vec::new();
        workload.write_jsonl(&mut file).unwrap();
        prop_assert_eq!(Workload::read_jsonl(&file[..], "w").unwrap(), workload);
    }
}
