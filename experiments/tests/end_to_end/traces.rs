//! The figure of traces: with a trace, without one, redrawn, packed.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use clap::Parser;
use quire_experiments::claims::{Verdict, Why};
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::plot::{save, traces_figure};
use quire_experiments::traces::{self, Axis, CurveKind, TracesConfig};
use quire_experiments::{RunData, store};

const CONFIG: &str = r#"
name = "shapes"

[figure]
kind = "traces"

[[figure.source]]
name = "chat"
title = "Chat"
fit = "azure_conv_2023"

[[figure.source]]
name = "like"
title = "ShareGPT-like"
fit = "share_gpt_like"

[[claim]]
says = "Half of the answers have 129 tokens or fewer."
source = "A paper"
trace = "chat"
of = "output"
statistic = "median"
at_least = 129
at_most = 129

[[claim]]
says = "Answers have 338 tokens."
source = "Another"
trace = "like"
of = "output"
statistic = "mean"
at_least = 330
"#;

fn run(folder: &Path, arguments: &[&str]) -> Result<traces::TracesRecord, String> {
    let out = folder.display().to_string();
    let line = ["experiment", "shapes.toml", "--out", &out];
    let cli = Cli::try_parse_from(line.into_iter().chain(arguments.iter().copied())).unwrap();
    let source = Source::new("shapes.toml", CONFIG);
    let folder = traces::run(&source, &cli.run, &[]).map_err(|e| format!("{e:#}"))?;
    traces::read(&folder).map_err(|e| e.to_string())
}

/// A trace of equal gaps whose answers have 200 tokens.
fn regular(folder: &Path) -> String {
    let mut text = String::from("TIMESTAMP,ContextTokens,GeneratedTokens\n");
    for i in 0..40 {
        let _ = writeln!(text, "2023-11-16 18:15:{i:02}.0000000,{},200", 100 + i);
    }
    let path = folder.join("regular.csv");
    fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[test]
fn without_a_trace_the_fits_are_drawn_and_called_fits() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let record = run(&folder, &[]).unwrap();
    assert!(record.sources.iter().all(|source| source.data.is_none()));
    let judged = traces::judge(&record).unwrap();
    assert_eq!(judged[0].verdict, Verdict::Holds, "the carried median is the trace's");
    let Verdict::Undecided(Why::Missing(why)) = &judged[1].verdict else { panic!("{judged:?}") };
    assert!(why.contains("--trace like=PATH"), "a fit to a mean says nothing of the mean: {why}");
    save(&traces_figure(&record), &folder.join("shapes")).unwrap();
    let svg = fs::read_to_string(folder.join("shapes.svg")).unwrap();
    for text in
        ["fit to 19366 requests", "fit to stated means", "no trace was given", "Prompts", "gap / mean gap"]
    {
        assert!(svg.contains(text), "{text} is missing");
    }
}

#[test]
fn a_trace_lies_beside_its_fit() {
    let temp = tempfile::tempdir().unwrap();
    let trace = format!("chat={}", regular(temp.path()));
    let [folder, packed] = ["run", "packed"].map(|name| temp.path().join(name));
    let record = run(&folder, &["--trace", &trace]).unwrap();
    let chat = &record.sources[0];
    let data = chat.data.as_ref().unwrap();
    assert_eq!((&*data.file, data.requests), ("regular.csv", 40), "without the machine's folders");
    let of = |axis| chat.distributions.iter().find(|d| d.of == axis).unwrap();
    let outputs = of(Axis::Output);
    assert_eq!((outputs.curves[0].kind, outputs.curves[0].p50), (CurveKind::Trace, 200.0));
    assert!(outputs.distance.unwrap() > 0.25, "all answers are of one length: {:?}", outputs.distance);
    // Equal gaps are the mean gap.
    assert_eq!(of(Axis::Gap).curves[0].points, [[1.0, 1.0]]);
    assert_eq!(traces::judge(&record).unwrap()[0].verdict, Verdict::Fails);

    traces::pack(&folder, &packed).unwrap();
    assert_eq!(traces::read(&packed).unwrap(), record);
    assert!(traces::text(&record).contains("40 requests of regular.csv"), "{}", traces::text(&record));
    assert!(traces::pack(&folder, &packed).is_err(), "committed results are not overwritten");
    let error = RunData::load(&packed).unwrap_err().to_string();
    assert!(error.contains("has no cells"), "{error}");
    assert!(store::pack(&packed, &temp.path().join("other")).is_err());
}

const TALKS: &str = r#"
name = "talks"
model = "dummy:smollm2-135m"
weights = "f32"
kv_dtype = "f32"
kv_bytes = 1
max_model_len = 64
length_scale = 0.5
slo = { ttft_s = 1.0, tpot_s = 0.1 }
[run]
requests = 2
repeats = 1
seed = 1
warm_up = 0.0
drain = 0.0
drain_limit_s = 1.0
stop_after_saturation = true
warm_up_requests = 0
lag_bound_s = 0.05
lag_share = 0.02
[[panel]]
name = "pairs"
title = "Pairs"
lengths = { kind = "independent", input = { kind = "fixed", tokens = 100 }, output = { kind = "fixed", tokens = 10 } }
shared_prefix = 40
arrivals = { kind = "poisson" }
over_limit = "drop"
rates = [1]
conversations = { turns = { kind = "fixed", turns = 2 } }
[[system]]
name = "any"
label = "Any"
serve = { kind = "external" }
"#;

/// A panel of conversations says what each turn adds: whole prompts are those of its turns, at full length.
#[test]
fn a_fit_may_be_what_another_configuration_draws() {
    let temp = tempfile::tempdir().unwrap();
    let panel = "panel = { config = \"talks.toml\", name = \"pairs\", fitted_to = \"some talks\", fitted_requests = 7 }";
    let text = CONFIG.replace("fit = \"share_gpt_like\"", panel);
    let (config, ticks) = (temp.path().join("shapes.toml"), temp.path().join("ticks.jsonl"));
    fs::write(&config, &text).unwrap();
    fs::write(temp.path().join("talks.toml"), TALKS).unwrap();
    let row = |at: u32| {
        format!("{{\"timestamp\": {at}, \"input_length\": 140, \"output_length\": 10, \"hash_ids\": []}}\n")
    };
    fs::write(&ticks, [0, 0, 0, 3000, 3000].map(row).concat()).unwrap();

    let run = |out: &str, trace: &[String]| {
        let out = temp.path().join(out).display().to_string();
        let line = ["experiment", "shapes.toml", "--out", &out].map(String::from);
        let cli = Cli::try_parse_from(line.iter().chain(trace)).unwrap();
        let folder = traces::run(&Source::read(&config).unwrap(), &cli.run, &[]).unwrap();
        traces::read(&folder).unwrap()
    };
    let alone = run("alone", &[]);
    let talks = &alone.sources[1];
    assert_eq!((talks.fitted_requests, talks.drawn), (7, Some(10_000)));
    // 140 tokens, then these, an answer and 100 more.
    let prompts = &talks.distributions[0].curves[0];
    assert_eq!((prompts.mean, prompts.p95, talks.distributions.len()), (195.0, 250.0, 2), "{prompts:?}");
    let Verdict::Undecided(Why::Missing(why)) = &traces::judge(&alone).unwrap()[1].verdict else { panic!() };
    assert!(why.contains("drawn"), "{why}");

    let record = run("ticks", &["--trace".into(), format!("like={}", ticks.display())]);
    let talks = &record.sources[1];
    assert_eq!(talks.data.as_ref().unwrap().tick_s, Some(3.0));
    let gaps = &talks.distributions[2];
    let kinds: Vec<CurveKind> = gaps.curves.iter().map(|curve| curve.kind).collect();
    assert_eq!((gaps.of, kinds), (Axis::Gap, vec![CurveKind::Trace, CurveKind::Poisson]));
    assert!(gaps.curves[0].points[0][0] > 0.0, "no two came at once: {:?}", gaps.curves[0].points);
    assert!(matches!(traces::judge(&record).unwrap()[1].verdict, Verdict::Fails));
    let figure = temp.path().join("ticks/shapes");
    save(&traces_figure(&record), &figure).unwrap();
    assert!(fs::read_to_string(figure.with_extension("svg")).unwrap().contains("ticks of 3.0 s"));
}

#[test]
fn what_means_nothing_for_a_trace_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| run(&temp.path().join("run"), arguments).unwrap_err();
    assert!(refused(&["--quick"]).contains("nothing runs"));
    assert!(refused(&["--device", "cuda"]).contains("--device"));
    assert!(refused(&["--trace", "x.csv"]).contains("one of chat, like"));
    assert!(refused(&["--trace", "chat=nowhere.csv"]).contains("nowhere.csv"));
    assert!(refused(&["--trace", "chat=a.csv", "--trace", "chat=b.csv"]).contains("two traces for chat"));
    run(&temp.path().join("run"), &[]).unwrap();
    assert!(refused(&[]).contains("is a run already"));

    let parse = |text: &str| TracesConfig::parse(&Source::new("shapes.toml", text)).unwrap_err().to_string();
    assert!(parse(&CONFIG.replace("name = \"like\"", "name = \"chat\"")).contains("another source"));
    assert!(parse(&CONFIG.replace("trace = \"like\"", "trace = \"lik\"")).contains("no source `lik`"));
    assert!(parse(&CONFIG.replace("at_least = 330", "")).contains("must have a bound"));
    let neither = CONFIG.replace("fit = \"share_gpt_like\"", "");
    assert!(parse(&neither).contains("`fit` or `panel`"));
    let with_model = CONFIG.replace("[figure]", "model = \"dummy:x\"\n[figure]");
    assert!(parse(&with_model).contains("unknown field `model`"));
}
