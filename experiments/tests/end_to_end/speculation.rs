//! Systems that propose tokens: what their records say of what was accepted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Parser;
use polars_io::prelude::{ParquetReader, SerReader};
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::metrics::Metric;
use quire_experiments::summary::write_summary;
use quire_experiments::systems::Launched;
use quire_experiments::{Experiment, RunData, Settings, Target, store};
use quire_workloads::mock::{ScriptedSystem, VirtualClock};
use quire_workloads::{ModelLimits, StepRecord};

use super::scripted::{CONFIG, ms};

/// A system that reads what it proposes off the text, one whose model proposes, and one for which chance decides.
fn config() -> String {
    let (before, _) = CONFIG.split_once("[[system]]").unwrap();
    let system = |name: &str, drafter: &str| {
        format!(
            "[[system]]\nname = \"{name}\"\nlabel = \"{name}\"\n[system.serve]\nkind = \"engine\"\n\
             scheduler = {{ policy = {{ kind = \"continuous\" }}, token_budget = 64, max_running = 4 }}\n\
             kv = {{ kind = \"paged\", block_size = 16 }}\n\
             speculation = {{ drafter = {drafter}, length = {{ kind = \"fixed\", tokens = 2 }} }}\n"
        )
    };
    let found = system("found", "{ kind = \"n_gram\" }");
    before.replace("wide", "found")
        + &found
        + &system("exit", "{ kind = \"early_exit\", layers = 1 }")
        + &system("chance", "{ kind = \"synthetic\", acceptance = 0.75 }")
}

/// Runs it with scripted systems in the place of all, of which three of four proposals are accepted.
fn run(folder: PathBuf, arguments: &str) -> PathBuf {
    let source = Source::new("scripted.toml", config());
    let line = format!("experiment scripted.toml --quick {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let settings = Settings::resolve(&source, &cli.run).unwrap();
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let scripted = |_: &Settings| {
        let clock = VirtualClock::new();
        let steps = (0..100).map(|i| StepRecord {
            step: i,
            start_s: i as f64,
            execute_s: 1.0,
            running: 1,
            drafted_tokens: 4,
            accepted_tokens: 3,
            refused_drafts: 1,
            ..StepRecord::default()
        });
        let system = ScriptedSystem::healthy(clock.clone(), ms(100), ms(10)).steps(steps.collect());
        Ok(Launched { system: Box::new(system), clock: Arc::new(clock) })
    };
    let experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
    let mut experiment =
        ["found", "exit", "chance"].into_iter().fold(experiment, |all, name| all.external(name, scripted));
    experiment.run(&Target::New(folder), &AtomicBool::new(false)).unwrap()
}

/// Acceptance of the look-ups, of the model's proposals, and of chance.
fn acceptances(run: &RunData) -> [Option<f64>; 3] {
    let acceptance = |system| run.at("fixed", system, 1.0).estimate(Metric::Acceptance);
    ["found", "exit", "chance"].map(|system| acceptance(system).map(|estimate| estimate.mean))
}

/// Prompts are random tokens whatever the weights, and greedy text of random weights repeats itself: what look-ups guess of
/// either would be taken for what they guess of real text.
#[test]
fn acceptance_is_given_where_chance_decides_it_and_where_real_models_do() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(temp.path().join("run"), "");
    let data = RunData::load(&folder).unwrap();
    assert_eq!(acceptances(&data), [None, None, Some(0.75)]);
    write_summary(&data, &folder).unwrap();
    let csv = fs::read_to_string(folder.join("summary.csv")).unwrap();
    let mut lines = csv.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let column = |name: &str| header.iter().position(|known| *known == name).unwrap();
    for row in lines {
        let is_given = row[column("system")] == "chance";
        for name in ["acceptance", "full_acceptance"] {
            assert_eq!(!row[column(name)].is_empty(), is_given, "{name}");
        }
        assert!(!row[column("drafted")].is_empty(), "what was proposed is work all the same");
    }
    // A packed run has what was computed from its steps when it ran.
    let packed = temp.path().join("packed");
    store::pack(&folder, &packed).unwrap();
    let data = RunData::load(&packed).unwrap();
    assert_eq!(acceptances(&data), [None, None, Some(0.75)]);

    let real = RunData::load(&run(temp.path().join("real"), "--model some/folder")).unwrap();
    assert_eq!(acceptances(&real), [None, Some(0.75), Some(0.75)]);
}

#[test]
fn packed_rows_say_which_are_synthetic() {
    let temp = tempfile::tempdir().unwrap();
    let [packed, plain] = ["packed", "plain"].map(|name| temp.path().join(name));
    store::pack(&run(temp.path().join("run"), ""), &packed).unwrap();
    store::pack(&run(temp.path().join("found"), "--only found"), &plain).unwrap();
    let marks = |folder: &Path| {
        let file = File::open(folder.join("records.parquet")).unwrap();
        let table = ParquetReader::new(file).finish().unwrap();
        table.column("synthetic").ok().map(|marks| marks.bool().unwrap().iter().flatten().collect::<Vec<_>>())
    };
    let stored = store::read(&packed).unwrap();
    let expected: Vec<bool> = stored.requests.iter().map(|row| row.key.system == "chance").collect();
    assert!(expected.contains(&true) && expected.contains(&false));
    assert_eq!(marks(&packed), Some(expected.clone()));
    assert_eq!(stored.requests.iter().map(|row| row.record.synthetic).collect::<Vec<_>>(), expected);
    assert_eq!(marks(&plain), None, "the column is there where it says something");

    // Packed before there was a column: its manifest tells.
    let older = Path::new(env!("CARGO_MANIFEST_DIR")).join("../results/cpu/fig11");
    assert_eq!(marks(&older), None);
    assert!(
        store::read(&older)
            .unwrap()
            .requests
            .iter()
            .all(|row| { row.record.synthetic == (row.key.system != "none") })
    );
}
