//! Figures over a parameter and figures of ratios, from scripted systems.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::plot::{Picture, Ratio, RatioBar, Scale, run_figure, save};
use quire_experiments::systems::SystemConfig;
use quire_experiments::table::table;
use quire_experiments::{Experiment, RunData, Settings, Target, store};
use quire_workloads::ModelLimits;

use super::scripted::{CONFIG, ms, scripted};

/// One rate, and systems whose tokens are 10, 20 and 40 ms apart; points of a figure that has them.
fn config(figure: &str) -> String {
    let system = |name: &str, x: u32| {
        let point = match figure.contains("kind = \"sweep\"") {
            true => format!("point = {{ line = \"Scripted\", x = {x} }}\n"),
            false => String::new(),
        };
        format!(
            "[[system]]\nname = \"{name}\"\nlabel = \"Gaps of {x} ms\"\nserve = {{ kind = \"external\" }}\n{point}"
        )
    };
    let (start, _) = CONFIG.split_once("[[system]]").unwrap();
    // A setting need not ascend in the order of the systems.
    let systems = [system("slow", 40), system("fast", 10), system("middle", 20)].concat();
    format!("{}{systems}[figure]\n{figure}", start.replace("[1, 8, 16]", "[8]").replace("wide", "fast"))
}

fn resolve(text: &str, arguments: &str) -> Result<(Source, Settings), String> {
    let source = Source::new("scripted.toml", text);
    let line = format!("experiment scripted.toml {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let settings = Settings::resolve(&source, &cli.run).map_err(|e| e.to_string())?;
    Ok((source, settings))
}

fn run(figure: &str, arguments: &str, folder: &Path) -> RunData {
    let (source, settings) = resolve(&config(figure), arguments).unwrap();
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
    for (name, gap) in [("slow", 40), ("fast", 10), ("middle", 20)] {
        experiment = experiment.external(name, scripted(usize::MAX, ms(gap)));
    }
    experiment.run(&Target::New(folder.to_owned()), &AtomicBool::new(false)).unwrap();
    RunData::load(folder).unwrap()
}

/// The text of the figure, which the packed form must give too.
fn drawn(run: &RunData, folder: &Path) -> String {
    let packed = folder.with_extension("packed");
    store::pack(folder, &packed).unwrap();
    assert_eq!(run_figure(&RunData::load(&packed).unwrap()), run_figure(run));
    save(&run_figure(run), &folder.join("figure")).unwrap();
    fs::read_to_string(folder.join("figure.svg")).unwrap()
}

const SWEEP: &str = "kind = \"sweep\"\nx = \"Gap (ms)\"\nscale = \"log2\"\nrows = [\"tpot\", \"preemptions\", \"swapped_tokens\"]\n";

#[test]
fn a_sweep_has_a_point_a_system_in_the_order_of_the_setting() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let data = run(SWEEP, "", &folder);
    let Picture::Lines(figure) = run_figure(&data) else { panic!("it is of lines") };
    assert_eq!((figure.series.len(), &*figure.series[0].name), (1, "Scripted"));
    assert_eq!((&*figure.x.label, figure.x.scale), ("Gap (ms)", Scale::Log2));
    let points: Vec<(f64, f64)> = figure.columns[0].series[0][0].iter().map(|p| (p.x, p.y)).collect();
    assert_eq!(points.iter().map(|p| p.0).collect::<Vec<_>>(), [10.0, 20.0, 40.0]);
    assert!(points.iter().all(|(x, y)| (y * 1e3 / x - 1.0).abs() < 0.01), "{points:?}");
    assert_eq!(figure.columns[0].series[1][0].iter().map(|p| p.y).collect::<Vec<_>>(), [0.0; 3]);
    let svg = drawn(&data, &folder);
    for text in
        ["Gap (ms, log)", "8 requests/s, mean 20 tokens in, 11 out", "Preemptions", "bands are 95% intervals"]
    {
        assert!(svg.contains(text), "{text} is missing");
    }
    assert!(table(&data).contains("swapped tokens"), "{}", table(&data));
}

#[test]
fn an_ablation_has_a_bar_a_system_relative_to_one() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let ablation =
        "kind = \"ablation\"\nover = \"middle\"\nrows = [\"tpot\", \"throughput\", \"preemptions\"]\n";
    let data = run(ablation, "", &folder);
    let Picture::Ratios(figure) = run_figure(&data) else { panic!("it is of ratios") };
    assert_eq!(figure.labels, ["Gaps of 40 ms", "Gaps of 10 ms"], "it is not held against itself");
    let ratio = |row: usize, system: usize| match &figure.columns[0].bars[row][system] {
        RatioBar::Ratio(ratio) => *ratio,
        RatioBar::Missing(note) => panic!("{note}"),
    };
    for (system, expected) in [(0, 2.0), (1, 0.5)] {
        let Ratio { value, interval, hollow, bound } = ratio(0, system);
        assert!((value - expected).abs() < 0.01, "{value}");
        let (low, high) = interval.expect("two seeds");
        assert!(low <= value && value <= high && !hollow && bound.is_empty());
    }
    assert!(!figure.rows[0].higher_is_better && figure.rows[1].higher_is_better);
    let RatioBar::Missing(note) = &figure.columns[0].bars[2][0] else { panic!("nobody was preempted") };
    assert_eq!(note, "0.000 against 0.000");
    let svg = drawn(&data, &folder);
    for text in ["2.00x", "0.50x", "less is better", "Ratios to", "Gaps of 20 ms", "of log-ratios"] {
        assert!(svg.contains(text), "{text} is missing");
    }
}

#[test]
fn one_seed_gives_no_intervals() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let data = run("kind = \"ablation\"\nover = \"middle\"\nrows = [\"ttft\"]\n", "--quick", &folder);
    let Picture::Ratios(figure) = run_figure(&data) else { panic!("it is of ratios") };
    assert!(matches!(figure.columns[0].bars[0][0], RatioBar::Ratio(Ratio { interval: None, .. })));
    assert!(drawn(&data, &folder).contains("one seed: no intervals"));
}

/// An engine whose block size is swept.
fn swept(sweep: &str, more: &str) -> String {
    let (start, _) = CONFIG.split_once("[[system]]").unwrap();
    let start = start.replace("[1, 8, 16]", "[8]").replace("from_rate = { wide = { fixed = 8 } }", "");
    format!(
        "{start}[figure]\n{SWEEP}[cuda]\nmodel = \"dummy:smollm2-135m\"\nweights = \"bf16\"\nkv_dtype = \"bf16\"\n\
         kv_bytes = 1_000_000\nmax_model_len = 256\nlength_scale = 1.0\n\
         engine = {{ token_budget = 128, block_size = 16 }}\nwithout = [\"paged-4\"]\n\
         [[system]]\nname = \"paged\"\nlabel = \"Paged\"\nsweep = {sweep}\n[system.serve]\nkind = \"engine\"\n\
         scheduler = {{ policy = {{ kind = \"continuous\" }}, token_budget = 64, max_running = 8 }}\n\
         kv = {{ kind = \"paged\", block_size = 2 }}\n{more}"
    )
}

#[test]
fn a_swept_setting_gives_a_system_a_value() {
    let text = swept("{ block_size = [4, 8, 16] }", "");
    let of = |arguments: &str| -> Vec<(String, serde_json::Value)> {
        let (_, settings) = resolve(&text, arguments).unwrap();
        let engine = |serve: &SystemConfig| serde_json::to_value(serve).unwrap();
        settings.systems.iter().map(|s| (s.name.clone(), engine(&s.serve))).collect()
    };
    let systems = of("");
    assert_eq!(systems.iter().map(|s| &*s.0).collect::<Vec<_>>(), ["paged-4", "paged-8", "paged-16"]);
    assert_eq!(systems.iter().map(|s| &s.1["kv"]["block_size"]).collect::<Vec<_>>(), [4, 8, 16]);
    let gpu = of("--device cuda");
    assert_eq!(
        gpu.iter().map(|s| &*s.0).collect::<Vec<_>>(),
        ["paged-8", "paged-16"],
        "one is left out there"
    );
    assert_eq!(gpu[0].1["kv"]["block_size"], 8, "what is swept is not changed by the device");
    assert_eq!(gpu[0].1["scheduler"]["token_budget"], 128, "what is not is");
    let (_, settings) = resolve(&text, "--only paged").unwrap();
    assert_eq!(settings.selected_systems().count(), 3, "all points");
    assert!(resolve(&text, "--only page").is_err());
    // Where rates begin, and what a GPU leaves out, is said for all points or for one.
    let from =
        text.replace("[quick]", "[quick]\nfrom_rate = { paged = { fixed = 8 }, paged-4 = { fixed = 7 } }");
    let (_, settings) = resolve(&from, "--quick").unwrap();
    let rates: Vec<f64> = settings.systems.iter().map(|s| s.from_rate["fixed"]).collect();
    assert_eq!(rates, [7.0, 8.0, 8.0]);
    let other = "[[system]]\nname = \"other\"\nlabel = \"Other\"\nserve = { kind = \"external\" }\npoint = { line = \"x\", x = 1 }\n";
    let without = format!("{}{other}", text.replace("without = [\"paged-4\"]", "without = [\"paged\"]"));
    let (_, settings) = resolve(&without, "--device cuda").unwrap();
    assert_eq!(settings.systems.iter().map(|s| &*s.name).collect::<Vec<_>>(), ["other"]);
    // A claim is about one system.
    let claim = "[[claim]]\nsays = \"x\"\nsource = \"x\"\nquantity = { kind = \"capacity\" }\nsystem = \"paged\"\nat_least = 1\n";
    let error = resolve(&format!("{text}{claim}"), "").unwrap_err();
    assert!(error.contains("several systems: name one of `paged-4`, `paged-8`, `paged-16`"), "{error}");
    let (_, settings) = resolve(&text, "--only paged-8").unwrap();
    let system = settings.selected_systems().next().unwrap();
    assert_eq!(system.label, "Paged, blocks of 8");
    let point = system.point.as_ref().unwrap();
    assert_eq!((&*point.line, point.x, system.sweep.is_none()), ("Paged", 8.0, true));
}

#[test]
fn wrong_sweeps_are_refused_with_their_line() {
    let refused = |text: &str, parts: &[&str]| {
        let error = resolve(text, "").unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    };
    let sound = swept("{ block_size = [4, 8] }", "");
    assert!(resolve(&sound, "").is_ok());
    refused(&swept("{ block_size = [] }", ""), &["one value or more", "sweep = "]);
    refused(&swept("{ block_size = [8, 4] }", ""), &["ascending"]);
    refused(&swept("{ block_size = [4, 512] }", ""), &["at 512", "1 to 256"]);
    refused(&swept("{ block_sise = [4] }", ""), &["did you mean `block_size`?"]);
    refused(&swept("{ block_size = [8] }", ""), &["no system `paged-4`", "without"]);
    let contiguous = "kv = { kind = \"contiguous\", reservation = \"max\" }";
    refused(
        &sound.replace("kv = { kind = \"paged\", block_size = 2 }", contiguous),
        &["there are no blocks"],
    );
    refused(&sound.replace("sweep = { block_size = [4, 8] }", ""), &["must have a `sweep`, or a `point`"]);
    refused(&sound.replace("rates = [8]", "rates = [8, 9]"), &["one rate a panel", "rates = [8, 9]"]);
    refused(&sound.replace("[quick]", "[quick]\nrates = { fixed = [1, 2] }"), &["one rate a panel"]);
    refused(&config(&SWEEP.replace("log2", "log3")), &["log3"]);
    refused(&config(SWEEP).replace("x = 40", "x = 0"), &["more than 0"]);
    refused(&config("kind = \"ablation\"\nover = \"none\"\nrows = [\"tpot\"]\n"), &["no system `none`"]);
    let external = "[[system]]\nname = \"other\"\nlabel = \"Other\"\nsweep = { max_running = [1] }\nserve = { kind = \"external\" }\n";
    refused(&swept("{ block_size = [4, 8] }", external), &["it needs serve.kind = \"engine\""]);
    let twice = "[[system]]\nname = \"paged-8\"\nlabel = \"Again\"\nserve = { kind = \"external\" }\npoint = { line = \"x\", x = 1 }\n";
    refused(&swept("{ block_size = [4, 8] }", twice), &["another system has this name"]);
}
