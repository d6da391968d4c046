//! Runs made in several sittings or of several parts.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use quire_experiments::config::Device;
use quire_experiments::machine::{Machine, Revision};
use quire_experiments::metrics::Metric;
use quire_experiments::plot::run_figure;
use quire_experiments::record::CellEntry;
use quire_experiments::table::table;
use quire_experiments::{RunData, Target, store};

use super::scripted::{experiment, interrupted, ms, refused, run};

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let temp = tempfile::tempdir().unwrap();
    let whole = run(&temp.path().join("whole"), "", ms(10));
    let folder = temp.path().join("cut");
    assert_eq!(interrupted(&Target::New(folder.clone()), 3), (5, 12));
    // A cell that was cut while it was written: requests without a row of their cell, and half a line.
    let records = folder.join("records.jsonl");
    let line =
        fs::read_to_string(&records).unwrap().lines().last().unwrap().replace("\"seed\":5", "\"seed\":6");
    fs::write(&records, fs::read_to_string(&records).unwrap() + &line + "\n" + &line[..40]).unwrap();

    let resume = Target::Resume(folder.clone());
    experiment("", ms(10)).run(&resume, &AtomicBool::new(false)).unwrap();
    let rows = |folder: &Path| {
        let text = fs::read_to_string(folder.join("records.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    assert!(rows(&folder) == rows(&whole), "a resumed run has the records of one that was not interrupted");
    // Once more: nothing is left to do, and nothing changes.
    experiment("", ms(10)).run(&resume, &AtomicBool::new(false)).unwrap();
    assert!(rows(&folder) == rows(&whole));
    assert_eq!(
        RunData::load(&folder).unwrap().at("fixed", "wide", 8.0).estimate(Metric::Running).unwrap().mean,
        4.0
    );

    let error = experiment("--quick", ms(10)).run(&resume, &AtomicBool::new(false)).unwrap_err().to_string();
    assert!(error.contains("settings differ") && error.contains("profile"), "{error}");
    let again = experiment("", ms(10)).run(&Target::New(folder), &AtomicBool::new(false)).unwrap_err();
    assert!(again.to_string().contains("is a run already"), "{again}");
}

#[test]
fn a_point_has_all_seeds_or_none() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("cut");
    assert_eq!(interrupted(&Target::New(folder.clone()), 3), (5, 12));
    // As if the first repeat's lowest rate had been void, and came out overloaded when it ran again.
    let cells = folder.join("cells.jsonl");
    let text = fs::read_to_string(&cells).unwrap();
    let lowest = |line: &&str| line.contains("\"system\":\"wide\"") && line.contains("\"rate\":1.0");
    let line = text.lines().find(lowest).unwrap();
    let edited = line.replace("\"overloaded\":false", "\"overloaded\":true");
    assert!(edited != *line);
    fs::write(&cells, text.replace(line, &edited)).unwrap();
    experiment("", ms(10)).run(&Target::Resume(folder.clone()), &AtomicBool::new(false)).unwrap();
    let data = RunData::load(&folder).unwrap();
    let seeds = |rate| data.at("fixed", "wide", rate).by_seed(Metric::Tpot).len();
    assert_eq!([1.0, 8.0, 16.0].map(seeds), [2, 2, 0]);
    assert!(data.at("fixed", "wide", 16.0).skipped());
}

#[test]
fn a_packed_run_goes_on_in_a_new_folder() {
    let temp = tempfile::tempdir().unwrap();
    let [first, packed, next] = ["first", "packed", "next"].map(|name| temp.path().join(name));
    assert_eq!(interrupted(&Target::New(first.clone()), 3), (5, 12));
    store::pack(&first, &packed).unwrap();
    let bytes = |folder: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let paths = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        let mut files: Vec<_> = paths.map(|p| (p.clone(), fs::read(p).unwrap())).collect();
        files.sort();
        files
    };
    let before = bytes(&packed);
    let says = |folder: &Path, line: &str| {
        let data = RunData::load(folder).unwrap();
        let text = table(&data);
        assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        assert!(run_figure(&data).caption().iter().any(|l| l == line));
    };
    says(&packed, "Incomplete: 5 of 12 cells.");

    assert!(refused(&Target::Resume(packed.clone())).contains("add --out NEW"));
    let resume = |packed: &Path, out: &Path| Target::ResumePacked { packed: packed.into(), out: out.into() };
    assert!(refused(&resume(&first, &next)).contains("is not packed"));
    assert!(refused(&resume(&packed, &packed)).contains("is a run already"));
    assert!(!next.exists(), "what is refused leaves nothing");
    // Interrupted once more, in its second cell, and then to the end where it is.
    assert_eq!(interrupted(&resume(&packed, &next), 2), (7, 12));
    says(&next, "Incomplete: 7 of 12 cells, made in 2 sittings.");
    experiment("", ms(10)).run(&Target::Resume(next.clone()), &AtomicBool::new(false)).unwrap();
    says(&next, "Made in 3 sittings.");
    assert!(bytes(&packed) == before, "what is packed is not changed");

    // Packed, it is what a run without interruption is, but for the sittings.
    let whole = run(&temp.path().join("whole"), "", ms(10));
    let [all, again] = ["all", "again"].map(|name| temp.path().join(name));
    store::pack(&whole, &all).unwrap();
    store::pack(&next, &again).unwrap();
    let (all, again) = (store::read(&all).unwrap(), store::read(&again).unwrap());
    assert!(all.requests == again.requests);
    for (a, b) in all.cells.iter().zip(&again.cells) {
        assert_eq!(*a, CellEntry { sitting: 0, ..b.clone() });
    }
    assert_eq!(all.manifest.sittings.len(), 1);
    assert_eq!(again.manifest.sittings.len(), 3);
    let sittings: Vec<u32> = again.cells.iter().map(|c| c.sitting).collect();
    assert_eq!(sittings, [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2]);
    // Before it is packed, some cells have steps and some only the figures from them: all are in the figures.
    assert_eq!(store::read(&whole).unwrap().steps.len(), 10);
    assert_eq!(store::read(&next).unwrap().steps.len(), 6);
    let (whole, next) = (RunData::load(&whole).unwrap(), RunData::load(&next).unwrap());
    for metric in [Metric::NormalizedLatency, Metric::Ttft, Metric::Running, Metric::KvUsed] {
        for (panel, system, rate, group) in whole.groups() {
            let (a, b) = (group.by_seed(metric), next.at(panel, system, rate).by_seed(metric));
            assert!(a.keys().eq(b.keys()), "{metric:?} of {system} at {rate}: {a:?}, {b:?}");
            let close = a.values().zip(b.values()).all(|(a, b)| (a - b).abs() <= 1e-3 * a);
            assert!(close, "{metric:?} of {system} at {rate}: {a:?}, {b:?}");
        }
    }
}

#[test]
fn a_run_stays_on_its_machine_and_may_change_its_revision() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    interrupted(&Target::New(folder.clone()), 3);
    let path = folder.join("manifest.json");
    let written = fs::read_to_string(&path).unwrap();
    let edit = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut manifest = serde_json::from_str(&written).unwrap();
        change(&mut manifest);
        fs::write(&path, manifest.to_string()).unwrap();
    };
    edit(&|manifest| manifest["machine"]["cpu"] = "Abacus 3000".into());
    let error = refused(&Target::Resume(folder.clone()));
    let this = Machine::this(Device::Cpu).cpu;
    assert!(error.contains("Abacus 3000") && error.contains(&this) && error.contains("mixed"), "{error}");

    // As an older program wrote it: without sittings, from another revision.
    edit(&|manifest| {
        manifest["revision"]["commit"] = "older".into();
        manifest.as_object_mut().unwrap().remove("sittings").unwrap();
    });
    experiment("", ms(10)).run(&Target::Resume(folder.clone()), &AtomicBool::new(false)).unwrap();
    let manifest = store::read_manifest(&folder).unwrap();
    let [first, second] = &manifest.sittings[..] else { panic!("{:?}", manifest.sittings) };
    assert_eq!((&*first.revision.commit, &first.started), ("older", &manifest.started));
    assert_eq!(second.revision, Revision::current());
    assert!(fs::read_dir(&folder).unwrap().all(|e| e.unwrap().path().extension().unwrap() != "new"));
}

#[test]
fn parts_that_ran_apart_are_one_run() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let whole = run(&at("whole"), "", ms(10));
    let wide = run(&at("wide"), "--only wide", ms(10));
    let narrow = run(&at("narrow"), "--only narrow", ms(10));
    assert_eq!(RunData::load(&wide).unwrap().describe_making(), None, "it is all that was asked for");
    assert!(!table(&RunData::load(&wide).unwrap()).contains("narrow"));
    let packed = at("packed");
    store::pack(&narrow, &packed).unwrap();

    store::join(&[wide.clone(), narrow.clone()], &at("joined")).unwrap();
    let [joined, expected] = [at("joined"), whole.clone()].map(|folder| store::read(&folder).unwrap());
    assert!(joined.requests == expected.requests && joined.steps == expected.steps);
    assert_eq!(joined.manifest.settings, expected.manifest.settings, "nothing is left of the selections");
    for (a, b) in expected.cells.iter().zip(&joined.cells) {
        assert_eq!(CellEntry { sitting: u32::from(a.key.system == "narrow"), ..a.clone() }, *b);
    }
    // Of packed parts, figures; and a part may go on with another selection.
    store::join(&[packed, wide.clone()], &at("of packed")).unwrap();
    let same = |folder: &Path| {
        let [a, b] = [&whole, folder].map(|folder| RunData::load(folder).unwrap());
        for (panel, system, rate, group) in a.groups() {
            let (a, b) = (group.by_seed(Metric::Running), b.at(panel, system, rate).by_seed(Metric::Running));
            assert_eq!(a, b, "{system} at {rate}");
        }
    };
    same(&at("of packed"));
    let resume = Target::Resume(narrow.clone());
    experiment("--only wide", ms(10)).run(&resume, &AtomicBool::new(false)).unwrap();
    same(&narrow);

    let error = |parts: &[PathBuf], dest: &str| store::join(parts, &at(dest)).unwrap_err().to_string();
    assert!(
        error(&[wide.clone(), whole.clone()], "new")
            .contains("wide in fixed at 1 requests/s, seed 5 is in a part")
    );
    let quick = run(&at("quick"), "--quick --only narrow", ms(10));
    assert!(error(&[wide.clone(), quick], "new").contains("the settings differ in profile, run"));
    assert!(!at("new").exists(), "what is refused leaves nothing");
    assert!(error(&[wide.clone(), narrow], "whole").contains("is a run already"));
    assert!(error(&[], "new").contains("no parts"));
}
