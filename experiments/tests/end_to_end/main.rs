//! The whole way with scripted systems on a virtual clock: configuration, runner, records, figures, resume, packing,
//! comparison. Every number is the same on every machine.

mod cells;
mod comparisons;
mod conversations;
mod figures;
mod folders;
mod micro;
mod numbers;
mod openai;
mod ratios;
mod scripted;
mod sittings;
mod speculation;
mod sweeps;
mod traces;
mod trouble;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::compare::{CompareOptions, compare};
use quire_experiments::config::{Device, Source};
use quire_experiments::metrics::{Known, Metric};
use quire_experiments::plot::{run_figure, save};
use quire_experiments::record::CellStatus;
use quire_experiments::summary::write_summary;
use quire_experiments::systems::Launched;
use quire_experiments::table::table;
use quire_experiments::trace_events::write_trace;
use quire_experiments::{Experiment, RunData, Settings, Target, store};
use quire_workloads::ModelLimits;
use quire_workloads::mock::{Script, ScriptedSystem, VirtualClock};

use scripted::{CONFIG, experiment, ms, run, scripted, settings};

#[test]
fn figures_are_those_of_the_script() {
    let temp = tempfile::tempdir().unwrap();
    let data = RunData::load(&run(&temp.path().join("run"), "", ms(10))).unwrap();
    // 3 rates x 2 systems x 2 seeds; the narrow system (200 ms a request) is saturated at 8 requests a second.
    assert_eq!(data.cells.len(), 12);
    let wide = data.at("fixed", "wide", 8.0);
    for (metric, expected) in [
        (Metric::Ttft, 0.1),
        (Metric::Tpot, 0.01),
        (Metric::NormalizedLatency, 0.2 / 11.0),
        (Metric::Goodput, 8.0),
        (Metric::KvUsed, 0.25),
        (Metric::Running, 4.0),
    ] {
        let estimate = wide.estimate(metric).unwrap();
        let close = (estimate.mean - expected).abs() < 0.03 * expected;
        assert!(close, "{metric:?}: {estimate:?}, expected {expected}");
        assert_eq!(estimate.seeds, 2);
        assert!(estimate.half_width.unwrap() < 0.05 * expected, "equal seeds have a narrow interval");
    }
    assert!(!wide.saturated());
    assert!(data.at("fixed", "narrow", 8.0).saturated());
    let skipped = data.at("fixed", "narrow", 16.0);
    assert!(skipped.skipped() && skipped.cells.len() == 2, "it is left out with every seed, and recorded");
    assert_eq!(data.capacity("fixed", "wide").unwrap().known, Some(Known::AtLeast));
    let narrow = data.capacity("fixed", "narrow").unwrap();
    assert!(narrow.known == Some(Known::Exactly) && narrow.rate > 1.0 && narrow.rate < 8.0, "{narrow:?}");
}

#[test]
fn everything_is_drawn_from_the_folder() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let data = RunData::load(&folder).unwrap();
    write_summary(&data, &folder).unwrap();
    save(&run_figure(&data), &folder.join("scripted")).unwrap();
    write_trace(&store::read(&folder).unwrap(), &folder.join("trace.json")).unwrap();
    for file in
        ["manifest.json", "cells.jsonl", "records.jsonl", "steps.parquet", "summary.parquet", "scripted.png"]
    {
        assert!(fs::metadata(folder.join(file)).unwrap().len() > 0, "{file}");
    }
    let csv = fs::read_to_string(folder.join("summary.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 6, "a header and a row a cell");
    let svg = fs::read_to_string(folder.join("scripted.svg")).unwrap();
    assert!(svg.contains("one seed: no intervals"), "one seed is said in the figure");
    assert!(svg.contains("dummy"), "random weights are said in the figure");
    let text = table(&data);
    for part in ["saturated", "left out: 16", "at least 16", "One seed: no intervals"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let trace: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(folder.join("trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().any(|e| e["ph"] == "X" && e["name"] == "execute"));
    let begun = events.iter().filter(|e| e["ph"] == "b").count();
    assert_eq!(begun, events.iter().filter(|e| e["ph"] == "e").count());
}

#[test]
fn committed_runs_can_be_read() {
    for (run, made) in [
        ("fig3", None),
        ("fig3-full", Some("Made in 36 sittings.")),
        ("fig3-quick", None),
        ("fig3-quick-2", None),
    ] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results/cpu").join(run);
        let data = RunData::load(&folder).unwrap();
        // Complete, and where in one sitting there is nothing to say.
        assert_eq!(data.describe_making().as_deref(), made, "{run}");
    }
}

#[test]
fn the_packed_form_gives_the_same_figures() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "", ms(10));
    let dest = temp.path().join("packed");
    let bytes = store::pack(&folder, &dest).unwrap();
    assert!(bytes < 200_000, "{bytes}");
    assert!(!dest.join("steps.parquet").exists() && !dest.join("records.jsonl").exists());
    let (full, packed) = (RunData::load(&folder).unwrap(), RunData::load(&dest).unwrap());
    for metric in
        [Metric::NormalizedLatency, Metric::TtftP90, Metric::Throughput, Metric::Running, Metric::KvUsed]
    {
        let value = |run: &RunData| run.at("fixed", "wide", 8.0).estimate(metric).unwrap().mean;
        assert!((value(&full) - value(&packed)).abs() <= 1e-3 * value(&full), "{metric:?}");
    }
    let same = compare(&full, &packed, CompareOptions { max_regression: 0.01, absolute: false }).unwrap();
    assert!(!same.regressed(), "{same}");
    assert!(store::pack(&folder, &dest).is_err(), "committed results are not overwritten");
}

#[test]
fn a_gpus_clocks_are_said_where_they_were_read() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let without = RunData::load(&folder).unwrap();
    assert_eq!(without.describe_clocks(), None, "nothing ran on a GPU");
    assert!(!table(&without).contains("SM clock"));

    let cells = folder.join("cells.jsonl");
    let text = fs::read_to_string(&cells).unwrap();
    assert!(!text.contains("\"gpu\""), "{text}");
    let done = "\"status\":{\"kind\":\"done\"}";
    assert!(text.contains(done), "{text}");
    let read = r#""gpu":{"sm_mhz":1821.4,"lowest_sm_mhz":1440.0,"watts":646.2,"highest_watts":698.0}"#;
    fs::write(&cells, text.replacen(done, &format!("{read},{done}"), 1)).unwrap();
    let packed = temp.path().join("packed");
    store::pack(&folder, &packed).unwrap();
    let said = "GPU in the windows: SM clock 1,821 MHz on average, 1,440 at the least; 646 W on average, 698 at the most.";
    for folder in [folder, packed] {
        let data = RunData::load(&folder).unwrap();
        assert!(table(&data).contains(said), "{}", table(&data));
        save(&run_figure(&data), &temp.path().join("drawn")).unwrap();
        assert!(fs::read_to_string(temp.path().join("drawn.svg")).unwrap().contains("1,821"));
    }
}

#[test]
fn a_client_that_fell_behind_voids_the_cell() {
    let temp = tempfile::tempdir().unwrap();
    let slow_to_take = |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::healthy(clock.clone(), ms(1), ms(1)).submit_cost(ms(300));
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let mut experiment = experiment("--quick --only wide", ms(10)).external("wide", slow_to_take);
    let folder = experiment.run(&Target::New(temp.path().join("run")), &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();
    let voided = &data.at("fixed", "wide", 8.0).cells[0].entry.status;
    assert!(matches!(voided, CellStatus::Void { reason } if reason.contains("fell behind")), "{voided:?}");
    assert_eq!(data.at("fixed", "wide", 8.0).estimate(Metric::Ttft), None, "a void cell is in no figure");
    assert!(table(&data).contains("Void: wide in fixed at 8"));

    // The client was late, which says nothing of the system at higher rates. `--resume` runs the cells once more.
    assert!(data.cells.iter().any(|cell| cell.entry.overloaded && cell.entry.key.rate == 8.0));
    assert!(matches!(data.at("fixed", "wide", 16.0).cells[0].entry.status, CellStatus::Void { .. }));
    let edit = |from: &str, to: &str| {
        let path = folder.join("cells.jsonl");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(&path, text.replace(from, to)).unwrap();
    };
    // As an older program left a rate out.
    let last = store::read(&folder).unwrap().cells[2].clone();
    let skipped = CellStatus::Skipped { saturated_at: 8.0 };
    edit(&serde_json::to_string(&last.status).unwrap(), &serde_json::to_string(&skipped).unwrap());
    let resume = Target::Resume(folder.clone());
    scripted::experiment("--quick --only wide", ms(10)).run(&resume, &AtomicBool::new(false)).unwrap();
    let again = store::read(&folder).unwrap();
    assert!(again.cells.iter().all(|cell| cell.status == CellStatus::Done {}), "{:?}", again.cells);
    assert_eq!((again.cells.len(), again.requests.len()), (3, 3 * 40), "nothing is there twice");
}

#[test]
fn a_request_unfinished_at_the_limit_is_a_lower_bound() {
    let temp = tempfile::tempdir().unwrap();
    let stalls = |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), |request| match request.id {
            20 => Script::default().tokens(ms(100), &[1]),
            _ => Script::healthy(request, ms(100), ms(10)),
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let mut experiment = experiment("--quick --only wide", ms(10)).external("wide", stalls);
    let folder = experiment.run(&Target::New(temp.path().join("run")), &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();
    let group = data.at("fixed", "wide", 1.0);
    assert_eq!(group.censored(), 1);
    assert!(group.is_bound(Metric::NormalizedLatency));
    // 80 s of 100 were watched, for 11 tokens; the other 31 requests of the window took 0.2 s.
    let mean = group.estimate(Metric::NormalizedLatency).unwrap().mean;
    let expected = (79.8 / 11.0 + 31.0 * 0.2 / 11.0) / 32.0;
    assert!((mean - expected).abs() < 0.02, "{mean} {expected}");
    assert!(!data.at("fixed", "wide", 8.0).skipped(), "one unfinished request of 40 is only long");
}

#[test]
fn a_system_starts_at_its_own_rate() {
    let temp = tempfile::tempdir().unwrap();
    let data = RunData::load(&run(&temp.path().join("run"), "--full", ms(10))).unwrap();
    assert!(data.at("fixed", "wide", 1.0).cells.is_empty());
    assert_eq!(data.at("fixed", "narrow", 1.0).cells.len(), 2);
    // Its lowest rate is the first that it ran at, and nothing it did not run counts against it.
    let capacity = data.capacity("fixed", "wide").unwrap();
    assert!(capacity.known == Some(Known::AtLeast) && capacity.rate == 16.0, "{capacity:?}");

    let wrong = Source::new("wrong.toml", CONFIG.replace("wide = { fixed = 8 }", "wide = { fixt = 8 }"));
    let cli = Cli::try_parse_from(["experiment", "wrong.toml"]).unwrap();
    let error = Settings::resolve(&wrong, &cli.run).unwrap_err().to_string();
    assert!(error.contains("no panel `fixt`") && error.contains("from_rate ="), "{error}");
}

#[test]
fn a_plan_of_any_length_can_be_told() {
    let (source, mut settings) = settings("--quick --only wide");
    settings.panels[0].rates = vec![1e-30];
    let plan = Experiment::new(source, settings, Vec::new()).plan();
    assert!(plan.contains("1 cells, about "), "{plan}");
}

#[test]
fn a_gpu_has_a_table_of_its_own() {
    let resolve = |text: &str, arguments: &[&str]| {
        let source = Source::new("gpu.toml", text);
        let line = ["experiment", "gpu.toml"].into_iter().chain(arguments.iter().copied());
        Settings::resolve(&source, &Cli::try_parse_from(line).unwrap().run).map_err(|e| e.to_string())
    };
    let cuda = ["--device", "cuda"];
    assert!(resolve(CONFIG, &cuda).unwrap_err().contains("no [cuda] table"));
    let table = r#"
[cuda]
model = "dummy:llama-3.1-8b"
weights = "bf16"
kv_dtype = "bf16"
kv_bytes = 2_000_000
max_model_len = 512
length_scale = 0.5
engine = { token_budget = 1024, max_running = 8, block_size = 16 }
without = ["narrow"]
[cuda.run]
requests = 7
rates = { fixed = [3, 4] }
[[cuda.system]]
name = "paged"
label = "Paged"
[cuda.system.serve]
kind = "engine"
scheduler = { policy = { kind = "continuous" }, token_budget = 512, max_running = 64 }
kv = { kind = "paged", block_size = 1 }
"#;
    let text = format!("{CONFIG}{table}");
    let settings = resolve(&text, &cuda).unwrap();
    assert_eq!((settings.device, settings.model.as_str()), (Device::Cuda, "dummy:llama-3.1-8b"));
    assert_eq!((settings.run.requests, settings.run.repeats), (Some(7), 2));
    assert_eq!(settings.panels[0].rates, [3.0, 4.0]);
    let names: Vec<&str> = settings.systems.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["wide", "paged"]);
    let paged = serde_json::to_value(&settings.systems[1].serve).unwrap();
    assert_eq!(paged["kv"]["block_size"], 16);
    assert_eq!(
        (&paged["scheduler"]["token_budget"], &paged["scheduler"]["max_running"]),
        (&1024.into(), &8.into())
    );
    // A system that only a GPU has begins where it is told, and one that it has not may be in a profile of the CPU.
    let added = text.replace("requests = 7", "requests = 7\nfrom_rate = { paged = { fixed = 4 } }");
    assert_eq!(resolve(&added, &cuda).unwrap().systems[1].from_rate["fixed"], 4.0);
    let quick = text.replace("[quick]", "[quick]\nfrom_rate = { narrow = { fixed = 8 } }");
    assert!(resolve(&quick, &cuda).is_ok() && resolve(&quick, &["--quick"]).is_ok());
    // What is wrong with it does not wait for a GPU.
    let refused = |from: &str, to: &str, part: &str| {
        assert!(text.contains(from), "{from}");
        let error = resolve(&text.replacen(from, to, 1), &[]).unwrap_err();
        assert!(error.contains(part) && error.contains("gpu.toml:"), "{part} is missing in: {error}");
    };
    refused("name = \"paged\"", "name = \"../paged\"", "with [cuda], of system `../paged`: `name`");
    refused("length_scale = 0.5", "length_scale = 0.5\nslo = { ttft_s = inf, tpot_s = 1 }", "`ttft_s`");
    refused("[\"narrow\"]", "[\"narrow\", \"wide\", \"paged\"]", "with [cuda]: no [[system]]");
    refused("kv = { kind = \"paged\"", "from_rate = { fixed = inf }\nkv = { kind = \"paged\"", "from_rate");
    let twice =
        "[[cuda.system]]\nname = \"paged\"\nlabel = \"x\"\nserve = { kind = \"external\" }\n[[cuda.system]]";
    refused("[[cuda.system]]", twice, "another system has this name");
    let over = format!("[figure]\nkind = \"speedup\"\nover = \"narrow\"\n{table}");
    let error = resolve(&format!("{CONFIG}{over}"), &[]).unwrap_err();
    assert!(error.contains("with [cuda]: nothing to hold the others against: no system `narrow`"), "{error}");
    // The CPU's settings are as if the table were not there.
    assert_eq!(resolve(&text, &[]).unwrap(), resolve(CONFIG, &[]).unwrap());
    assert!(resolve(&text, &["--device", "cuda", "--quick"]).unwrap_err().contains("--device cpu"));
    let unknown = text.replace("without = [\"narrow\"]", "without = [\"narow\"]");
    assert!(resolve(&unknown, &cuda).unwrap_err().contains("no system `narow`"));
    let misspelt = text.replace("block_size = 16", "blocksize = 16");
    assert!(resolve(&misspelt, &cuda).unwrap_err().contains("unknown field"));
}

#[test]
fn warm_up_requests_are_sent_and_not_recorded() {
    let temp = tempfile::tempdir().unwrap();
    let source = Source::new("warm.toml", CONFIG.replace("warm_up_requests = 0", "warm_up_requests = 3"));
    let cli = Cli::try_parse_from(["experiment", "warm.toml", "--quick", "--only", "wide"]).unwrap();
    let settings = Settings::resolve(&source, &cli.run).unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let counting = move |_: &Settings| {
        let (clock, count) = (VirtualClock::new(), Arc::clone(&count));
        let system = ScriptedSystem::new(clock.clone(), move |request| {
            count.fetch_add(1, Ordering::Relaxed);
            Script::healthy(request, ms(100), ms(10))
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment =
        Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet().external("wide", counting);
    let folder = experiment.run(&Target::New(temp.path().join("run")), &AtomicBool::new(false)).unwrap();
    assert_eq!(seen.load(Ordering::Relaxed), 3 * (3 + 40), "three cells");
    let stored = store::read(&folder).unwrap();
    assert_eq!(stored.requests.len(), 3 * 40);
    assert!(stored.cells.iter().all(|cell| cell.start_s > 0.0), "the workload begins after the warm-up");
}

#[test]
fn engine_systems_that_answer_differently_are_flagged() {
    let temp = tempfile::tempdir().unwrap();
    let engine = "serve = { kind = \"engine\", scheduler = {}, kv = { kind = \"paged\", block_size = 1 } }";
    let text = CONFIG.replace("serve = { kind = \"external\" }", engine);
    let source = Source::new("engines.toml", text);
    let cli = Cli::try_parse_from(["experiment", "engines.toml", "--quick"]).unwrap();
    let settings = Settings::resolve(&source, &cli.run).unwrap();
    let odd = |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), |request| match request.id {
            7 => (0..11).fold(Script::default(), |s, i| s.tokens(ms(10), &[900 + i])).stop(ms(0)),
            _ => Script::healthy(request, ms(100), ms(10)),
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new())
        .with_limits(limits)
        .quiet()
        .external("narrow", scripted(1, ms(10)))
        .external("wide", odd);
    let folder = experiment.run(&Target::New(temp.path().join("run")), &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();
    // Request 7, at the two rates that both systems ran.
    assert_eq!(data.disagreements.len(), 2, "{:?}", data.disagreements);
    assert!(data.disagreements.iter().all(|d| d.request == 7));
    assert!(table(&data).contains("OUTPUTS DISAGREE"));
}

#[test]
fn a_system_that_nobody_gives_says_what_to_do() {
    let temp = tempfile::tempdir().unwrap();
    let (source, settings) = settings("--only wide");
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
    let error = experiment.run(&Target::New(temp.path().join("run")), &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("Experiment::external"), "{error}");
    assert!(!error.to_string().contains("--resume"), "it could not go on: {error}");
    assert!(!temp.path().join("run").exists(), "no run is left");
}
