//! Folders that are not what a run leaves: cut, mixed up, or from somebody else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::{Experiment, RunData, Settings, Target, numbers, store};
use quire_workloads::ModelLimits;

use super::scripted::{CONFIG, experiment, interrupted, ms, refused, run, scripted, settings};

/// A run of 12 cells of which 5 are written, and the steps of one of those.
fn cut(folder: &Path) -> (PathBuf, Vec<u8>) {
    assert_eq!(interrupted(&Target::New(folder.to_owned()), 3), (5, 12));
    let steps = folder.join("steps/fixed.wide.1.5.parquet");
    let bytes = fs::read(&steps).unwrap();
    (steps, bytes)
}

#[test]
fn steps_of_a_cell_that_was_cut_are_not_read() {
    let temp = tempfile::tempdir().unwrap();
    let [folder, packed] = ["run", "packed"].map(|name| temp.path().join(name));
    let (_, bytes) = cut(&folder);
    let half = &bytes[..bytes.len() / 2];
    fs::write(folder.join("steps/fixed.wide.16.5.parquet"), half).unwrap();
    fs::write(folder.join("steps/fixed.wide.16.5.new"), half).unwrap();
    assert_eq!(RunData::load(&folder).unwrap().cells.len(), 5);
    store::pack(&folder, &packed).unwrap();
    experiment("", ms(10)).run(&Target::Resume(folder.clone()), &AtomicBool::new(false)).unwrap();
    assert!(!folder.join("steps").exists() && !folder.join("lock").exists());
}

#[test]
fn steps_count_once_wherever_a_kill_left_them() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let (steps, bytes) = cut(&folder);
    experiment("", ms(10)).run(&Target::Resume(folder.clone()), &AtomicBool::new(false)).unwrap();
    let whole = store::read(&folder).unwrap().steps;
    // Killed after the joined file was written, before those of the cells were removed.
    fs::create_dir(folder.join("steps")).unwrap();
    fs::write(&steps, bytes).unwrap();
    assert!(store::read(&folder).unwrap().steps == whole);
    experiment("", ms(10)).run(&Target::Resume(folder.clone()), &AtomicBool::new(false)).unwrap();
    assert!(store::read(&folder).unwrap().steps == whole);
}

#[test]
fn a_new_run_is_not_mixed_with_what_another_left() {
    let temp = tempfile::tempdir().unwrap();
    for (file, hint) in
        [("records.jsonl", "has records.jsonl"), ("steps", "has steps"), ("micro.json", "is a run already")]
    {
        let folder = temp.path().join(file.replace('.', "-"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(file), "").unwrap();
        let error = refused(&Target::New(folder.clone()));
        assert!(error.contains(hint), "{error}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "what is refused leaves nothing");
    }
}

#[test]
fn two_programs_do_not_write_to_one_run() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    cut(&folder);
    let other = File::create(folder.join("lock")).unwrap();
    other.try_lock().unwrap();
    let error = refused(&Target::Resume(folder.clone()));
    assert!(error.contains("another program writes to it"), "{error}");
    // However the other ended, its lock ended with it.
    drop(other);
    experiment("", ms(10)).run(&Target::Resume(folder), &AtomicBool::new(false)).unwrap();
}

#[test]
fn what_is_there_twice_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    for (file, what) in
        [("cells.jsonl", "is there twice"), ("records.jsonl", "of wide in fixed at 16 requests/s, seed 5")]
    {
        let folder = run(&temp.path().join(file.replace('.', "-")), "--quick", ms(10));
        let text = fs::read_to_string(folder.join(file)).unwrap();
        let last = text.lines().last().unwrap();
        fs::write(folder.join(file), format!("{text}{last}\n")).unwrap();
        let error = RunData::load(&folder).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("twice"), "{error}");
    }
}

#[test]
fn a_folder_from_anywhere_names_no_files_elsewhere() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let error = |file: &str, from: &str, to: &str| {
        let path = folder.join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(&path, text.replace(from, to)).unwrap();
        let error = RunData::load(&folder).unwrap_err().to_string();
        fs::write(&path, text).unwrap();
        error
    };
    let name = error("manifest.json", "\"name\": \"scripted\"", "\"name\": \"../../x\"");
    assert!(name.contains("the experiment's name \"../../x\" must be letters"), "{name}");
    let many = error("manifest.json", "\"repeats\": 1", "\"repeats\": 4000000000");
    assert!(many.contains("24000000000 cells are more than"), "{many}");
    let system = error("cells.jsonl", "\"system\":\"wide\"", "\"system\":\"../wide\"");
    assert!(system.contains("cells.jsonl:2: a system's name \"../wide\""), "{system}");
    let sitting = error("cells.jsonl", "\"status\"", "\"sitting\":4294967295,\"status\"");
    assert!(sitting.contains("no sitting 4294967295"), "{sitting}");
}

#[test]
fn settings_that_json_cannot_keep_are_refused_before_anything_runs() {
    let temp = tempfile::tempdir().unwrap();
    let (source, mut settings) = settings("--quick");
    settings.slo.ttft_s = f64::INFINITY;
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
    let mut experiment =
        experiment.external("narrow", scripted(1, ms(10))).external("wide", scripted(1, ms(10)));
    let folder = temp.path().join("run");
    let error = experiment.run(&Target::New(folder.clone()), &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("cannot be kept in a manifest"), "{error}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

/// 60 requests of `output` tokens in `folder`, one every 100 ms.
fn trace(folder: &Path, output: u32) -> String {
    fs::create_dir_all(folder).unwrap();
    let path = folder.join("conv.csv");
    let rows = (0..60).map(|i| format!("2023-11-16 18:15:{:02}.{}000000,20,{output}\n", i / 10, i % 10));
    let text = ["TIMESTAMP,ContextTokens,GeneratedTokens\n".to_string()].into_iter().chain(rows);
    fs::write(&path, text.collect::<String>()).unwrap();
    path.display().to_string()
}

#[test]
fn a_trace_is_the_same_in_all_sittings_wherever_it_lies() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let replay = |system: &str, trace: &str, target: Target| {
        let source = Source::new("t.toml", CONFIG.replace("[1, 8, 16]", "[1, 8, 16]\nreplay = true"));
        let line = ["experiment", "t.toml", "--quick", "--only", system, "--trace", trace];
        let settings = Settings::resolve(&source, &Cli::try_parse_from(line).unwrap().run).unwrap();
        let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
        let experiment = Experiment::new(source, settings, Vec::new()).with_limits(limits).quiet();
        let wide = scripted(usize::MAX, ms(10));
        let mut experiment = experiment.external("narrow", scripted(1, ms(10))).external("wide", wide);
        experiment.run(&target, &AtomicBool::new(false)).map_err(|error| error.to_string())
    };
    let [first, moved, other] =
        [("a", 11), ("b", 11), ("c", 12)].map(|(name, n)| trace(&temp.path().join(name), n));
    replay("wide", &first, Target::New(folder.clone())).unwrap();
    let error = replay("narrow", &other, Target::Resume(folder.clone())).unwrap_err();
    assert!(error.contains("requests were others than those of the trace"), "{error}");
    assert!(error.contains("go on with --resume"), "{error}");

    let [good, bad] = ["good", "bad"].map(|name| temp.path().join(name));
    replay("narrow", &moved, Target::New(good.clone())).unwrap();
    replay("narrow", &other, Target::New(bad.clone())).unwrap();
    let join = |part: PathBuf, dest: &str| store::join(&[folder.clone(), part], &temp.path().join(dest));
    join(good, "joined").unwrap();
    let error = join(bad, "not joined").unwrap_err().to_string();
    assert!(error.contains("is their trace the same?"), "{error}");
    assert!(!temp.path().join("not joined").exists());
    replay("narrow", &moved, Target::Resume(folder)).unwrap();
}

#[test]
fn figures_of_runs_that_are_shown_no_more_are_removed() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let (list, out) = (temp.path().join("list.toml"), temp.path().join("out"));
    let write = |name: &str| {
        fs::write(&list, format!("[[run]]\nname = \"{name}\"\nfolder = {folder:?}\n")).unwrap();
        numbers::write_numbers(&list, &out).map(drop).map_err(|error| format!("{error:#}"))
    };
    write("first").unwrap();
    fs::write(out.join("own.svg"), "").unwrap();
    write("second").unwrap();
    let files =
        ["first.svg", "first.png", "own.svg", "second.svg", "second.png"].map(|f| out.join(f).exists());
    assert_eq!(files, [false, false, true, true, true]);
    assert!(write("../third").unwrap_err().contains("must be letters"));
}
