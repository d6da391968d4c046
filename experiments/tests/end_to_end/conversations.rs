//! Turns of conversations and priority classes, the whole way from the configuration to the figure.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::metrics::Metric;
use quire_experiments::plot::run_figure;
use quire_experiments::record::RequestRow;
use quire_experiments::summary::summary;
use quire_experiments::systems::Launched;
use quire_experiments::table::table;
use quire_experiments::{Experiment, RunData, Settings, Target, store};
use quire_workloads::mock::{Script, ScriptedSystem, VirtualClock};
use quire_workloads::{EventKind, FinishReason, GenerationRequest, ModelLimits, SystemError};

use super::scripted::{CONFIG, ms};

/// Two turns of 20 prompt and 11 answer tokens each, 200 ms of thought between them; half of the users are of each class.
const TALKS: &str = "conversations = { turns = { kind = \"fixed\", turns = 2 }, think = { kind = \"fixed\", seconds = 0.2 } }\n\
                     classes = [1, 1]\narrivals =";

const ROWS: &str = "[figure]\nkind = \"rates\"\n\
                    rows = [\"cached_share\", \"ttft_best_class\", \"ttft_worst_class\", \"normalized_latency_worst_class\", \"goodput_best_class\"]\n";

fn resolve(text: &str, arguments: &str) -> Result<(Source, Settings), String> {
    let source = Source::new("scripted.toml", text);
    let line = format!("experiment scripted.toml {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let settings = Settings::resolve(&source, &cli.run).map_err(|e| e.to_string())?;
    Ok((source, settings))
}

/// The first token comes after 100 ms, of the worse class after 200; what came before a later turn is found in a cache. Of
/// the requests 0 to 7, `narrow` rejects the first.
fn serve(rejects: bool) -> impl FnMut(&Settings) -> Result<Launched, SystemError> {
    move |_: &Settings| {
        let clock = VirtualClock::new();
        let system = ScriptedSystem::new(clock.clone(), move |request: &GenerationRequest| {
            if rejects && request.id == 0 {
                return Script::default().rejected(ms(1), "no");
            }
            let first = ms(100 * (1 + u64::from(request.class)));
            let script = (0..11).fold(Script::default(), |script, i| {
                script.tokens(if i == 0 { first } else { ms(10) }, &[i])
            });
            let cached_tokens = request.prompt.len() as u32 - 20;
            script.event(
                ms(0),
                EventKind::Finished { reason: FinishReason::Stop, preemptions: 0, cached_tokens },
            )
        });
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    }
}

fn records(folder: &std::path::Path) -> Vec<RequestRow> {
    store::read(folder).unwrap().requests
}

#[test]
fn turns_and_classes_go_from_the_configuration_to_the_figure() {
    let temp = tempfile::tempdir().unwrap();
    let (folder, packed) = (temp.path().join("run"), temp.path().join("packed"));
    let text = format!("{}{ROWS}", CONFIG.replace("arrivals =", TALKS));
    let (source, settings) = resolve(&text, "--quick").unwrap();
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new())
        .with_limits(limits)
        .quiet()
        .external("narrow", serve(true))
        .external("wide", serve(false));
    experiment.run(&Target::New(folder.clone()), &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();

    let wide = data.at("fixed", "wide", 8.0);
    let value = |metric| wide.estimate(metric).unwrap().mean;
    assert!((value(Metric::TtftBestClass) - 0.1).abs() < 1e-9);
    assert!((value(Metric::TtftWorstClass) - 0.2).abs() < 1e-9);
    let of_classes = value(Metric::GoodputBestClass) + value(Metric::GoodputWorstClass);
    assert!(value(Metric::GoodputBestClass) > 0.0 && (of_classes - value(Metric::Goodput)).abs() < 1e-9);
    assert!((value(Metric::NormalizedLatencyBestClass) - 0.2 / 11.0).abs() < 1e-9);
    assert!((value(Metric::NormalizedLatencyWorstClass) - 0.3 / 11.0).abs() < 1e-9);
    // Of 20 prompt tokens of a first turn none, of 51 of a second 31.
    let share = value(Metric::CachedShare);
    assert!((31.0 / 71.0 - share).abs() < 0.05, "{share}");
    let report = |system: &str| data.at("fixed", system, 8.0).cells[0].entry.conversations.unwrap();
    assert_eq!((report("wide").begun, report("wide").broken), (20, 0));
    assert_eq!((report("narrow").begun, report("narrow").broken), (20, 1));

    let rows = records(&folder);
    let mut turns = BTreeMap::new();
    for row in rows.iter().filter(|row| row.key.system == "wide" && row.key.rate == 8.0) {
        let turn = row.record.turn.unwrap();
        assert_eq!(row.record.prompt_tokens, [20, 51][turn.turn as usize]);
        turns.insert((turn.conversation, turn.turn), row.record.intended_s);
        assert!(row.record.class.is_some_and(|class| class < 2));
    }
    // Conversations begin each 0.25 s: 8 requests a second of 2 turns each.
    assert!((turns[&(3, 0)] - turns[&(2, 0)] - 0.25).abs() < 1e-9, "{turns:?}");
    assert!([0.4, 0.5].iter().any(|later| (turns[&(2, 1)] - turns[&(2, 0)] - later).abs() < 1e-9));

    store::pack(&folder, &packed).unwrap();
    let again = records(&packed);
    assert!(
        rows.iter()
            .zip(&again)
            .all(|(a, b)| (a.record.turn, a.record.class) == (b.record.turn, b.record.class))
    );
    assert_eq!(rows.len(), again.len());
    assert!(
        summary(&data).column("class1_ttft_mean_s").is_ok() && summary(&data).column("cached_share").is_ok()
    );
    assert!(table(&data).contains("1 conversations broken off"), "{}", table(&data));
    let caption = run_figure(&data).caption().join("\n");
    assert!(caption.contains("A turn is sent when the answer before it has ended"), "{caption}");
}

#[test]
fn what_no_panel_has_is_no_setting() {
    let (_, plain) = resolve(CONFIG, "").unwrap();
    let text = serde_json::to_string(&plain).unwrap();
    assert!(!text.contains("conversations") && !text.contains("classes"), "{text}");
    let (_, talks) = resolve(&CONFIG.replace("arrivals =", TALKS), "").unwrap();
    assert_ne!(plain.sha256(), talks.sha256());
    // A panel's own scale is beside the configuration's.
    let (_, half) = resolve(&CONFIG.replace("arrivals =", "length_scale = 0.5\narrivals ="), "").unwrap();
    assert_eq!(half.panels[0].spec(10, 0.25).length_scale, 0.125);
    assert!(
        half.describe_memory().ends_with("lengths as they are (in fixed by 1/2)"),
        "{}",
        half.describe_memory()
    );
}

#[test]
fn a_trace_has_its_own_turns() {
    let panel = format!("replay = true\nshared_prefix = 8\n{TALKS}");
    let (_, settings) = resolve(&CONFIG.replace("arrivals =", &panel), "--trace some.jsonl").unwrap();
    assert!(settings.panels[0].conversations.is_none() && settings.panels[0].shared_prefix == 0);
    assert_eq!(settings.panels[0].classes, [1, 1]);
}

#[test]
fn a_trace_may_be_replayed_in_part() {
    let resolved = |panel: &str, arguments: &str| {
        resolve(&CONFIG.replace("arrivals =", &format!("{panel}\narrivals =")), arguments)
    };
    let part = "replay = true\nreplay_one_in = 32";
    let (_, settings) = resolved(part, "--trace some.jsonl").unwrap();
    let what = settings.describe_traces().unwrap();
    assert!(what.contains("of one conversation in 32 of the trace some"), "{what}");
    // It is in the lengths; without a trace it says nothing, and is no setting.
    let text = serde_json::to_string(&settings).unwrap();
    assert!(text.contains("\"one_in\":32") && !text.contains("replay_one_in"), "{text}");
    let [with, without] = [part, "replay = true"].map(|panel| resolved(panel, "").unwrap().1.sha256());
    assert_eq!(with, without);
    // A profile may take more.
    let text = CONFIG.replace("arrivals =", &format!("{part}\narrivals ="));
    let full = text.replace("[full]", "[full]\nreplay_one_in = { fixed = 4 }");
    assert_ne!(text, full);
    let what = resolve(&full, "--full --trace some.jsonl").unwrap().1.describe_traces().unwrap();
    assert!(what.contains("one conversation in 4 of"), "{what}");
    assert!(resolve(&full.replace("{ fixed = 4", "{ fixed = 0"), "").unwrap_err().contains("1 or more"));
    assert!(resolved("replay_one_in = 32", "").unwrap_err().contains("replay_one_in"));
    assert!(resolved("replay = true\nreplay_one_in = 0", "").unwrap_err().contains("1 or more"));
}

/// It was found in the cell that needed too much, after those before it had run.
#[test]
fn a_trace_that_is_too_short_is_found_first() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("three.csv");
    let rows = (10..13).map(|s| format!("2023-11-16 18:15:{s}.0000000,20,5\n"));
    fs::write(&path, format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{}", rows.collect::<String>()))
        .unwrap();
    let text = CONFIG.replace("arrivals =", "replay = true\narrivals =");
    let (source, settings) = resolve(&text, &format!("--trace {}", path.display())).unwrap();
    let limits = ModelLimits { vocab_size: 100, reserved_ids: 0, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
    let error = experiment.check().unwrap_err().to_string();
    assert!(error.contains("requests asked for, 3 from request 0 on"), "{error}");
}

#[test]
fn wrong_conversations_are_refused_with_their_panel() {
    let refused = |from: &str, to: &str| {
        let text = CONFIG.replace("arrivals =", TALKS).replace(from, to);
        resolve(&text, "").unwrap_err()
    };
    assert!(refused("turns = 2", "turns = 0").contains("conversations.turns"));
    assert!(refused("seconds = 0.2", "seconds = -1").contains("conversations.think"));
    assert!(refused("think =", "thikn =").contains("did you mean `think`?"));
    assert!(refused("classes = [1, 1]", "classes = [1, 0]").contains("classes"));
}
