//! Runs compared with each other, from scripted systems' records.

use quire_experiments::compare::{CompareOptions, Verdict, compare, compare_ratios};
use quire_experiments::metrics::{CellMetrics, Metric};
use quire_experiments::record::CellStatus;
use quire_experiments::{CellData, RunData};
use serde_json::{Value, json};

use super::scripted::{ms, run};

#[test]
fn a_slower_run_is_a_regression_and_the_same_is_none() {
    let temp = tempfile::tempdir().unwrap();
    let old = RunData::load(&run(&temp.path().join("old"), "", ms(10))).unwrap();
    let mut new = RunData::load(&run(&temp.path().join("new"), "", ms(12))).unwrap();
    let options = CompareOptions { max_regression: 0.05, absolute: false };
    assert!(!compare(&old, &old, options).unwrap().regressed());
    let found = compare(&old, &new, options).unwrap();
    assert!(found.regressed());
    let line = found.lines.iter().find(|l| l.system == "wide" && l.metric == Metric::Tpot).unwrap();
    assert_eq!(line.verdict, Verdict::Regression);
    assert!((line.ratio.ratio - 1.2).abs() < 1e-3, "{line:?}");
    assert!(line.ratio.interval.is_some(), "two seeds give an interval");
    assert!(found.to_string().contains("REGRESSION"));
    // A suite looks at ratios between systems on the same machine too.
    let ratios = compare_ratios(&old, &new, 0.05).unwrap();
    assert!(!ratios.regressed() && ratios.lines.iter().all(|l| l.system == "narrow"), "{ratios}");

    // On another machine everything slower by as much is no change: the ratio between the systems is as it was.
    new.manifest.machine.cores += 1;
    let elsewhere = compare(&old, &new, options).unwrap();
    let tpot = elsewhere.lines.iter().find(|l| l.metric == Metric::Tpot).unwrap();
    assert!((tpot.ratio.ratio - 1.0).abs() < 1e-3, "{tpot:?}");
    assert!(elsewhere.to_string().contains("the machines differ"));
    assert!(compare(&old, &new, CompareOptions { absolute: true, ..options }).unwrap().regressed());

    new.manifest.settings.name = "other".into();
    assert!(compare(&old, &new, options).is_err());
}

#[test]
fn figures_that_the_new_run_lost_are_regressions() {
    let temp = tempfile::tempdir().unwrap();
    let load = |name: &str, gap| RunData::load(&run(&temp.path().join(name), "", ms(gap))).unwrap();
    let options = CompareOptions { max_regression: 0.05, absolute: false };
    let old = load("old", 10);
    let reported = |new: &RunData, part: &str| {
        let found = compare(&old, new, options).unwrap();
        let text = found.to_string();
        assert!(text.contains(part), "{part} is missing in\n{text}");
        found.regressed()
    };
    // The narrow system takes 2.1 s a request: it is saturated at its lowest rate already, where it was not.
    let slow = load("slow", 200);
    assert!(reported(&slow, "LOST: narrow in fixed at 1 requests/s was steady and is saturated"));
    // Nothing is said of what was saturated before.
    assert!(!compare(&old, &slow, options).unwrap().to_string().contains("narrow in fixed at 8"));
    // On another machine it might be so, but there is nothing left to judge by.
    let mut elsewhere = load("again", 10);
    elsewhere.manifest.machine.cores += 1;
    assert!(!reported(&elsewhere, "the machines differ"));
    for cell in elsewhere.cells.iter_mut().filter(|cell| cell.entry.key.system == "narrow") {
        cell.window.iter_mut().for_each(|window| window.censored = 1);
    }
    assert!(reported(
        &elsewhere,
        "Not compared: narrow in fixed at 1 requests/s was steady and is with 2 unf"
    ));
    assert!(reported(&elsewhere, "LOST: TPOT of narrow / wide in fixed: nothing that was steady is left"));

    let edited = |change: &dyn Fn(&mut CellData)| {
        let mut new = RunData::load(&temp.path().join("old")).unwrap();
        let wide = |cell: &&mut CellData| cell.entry.key.system == "wide";
        new.cells.iter_mut().filter(wide).filter(|cell| cell.entry.key.rate == 8.0).for_each(change);
        new
    };
    // Goodput of nothing has no ratio.
    let none = edited(&|cell| cell.window.as_mut().unwrap().goodput_rps = Some(0.0));
    assert!(reported(&none, "LOST: goodput of wide in fixed at 8 requests/s: 8."));
    assert!(!compare(&none, &old, options).unwrap().regressed(), "the other way it is none");
    assert!(!compare(&none, &none, options).unwrap().regressed());
    // As a divisor of narrow's, with one seed of two: the other would be compared alone.
    let mut divided = RunData::load(&temp.path().join("old")).unwrap();
    divided.manifest.machine.cores += 1;
    let first = |cell: &&mut CellData| cell.entry.key.system == "wide" && cell.entry.key.repeat == 0;
    divided
        .cells
        .iter_mut()
        .filter(first)
        .for_each(|cell| cell.window.as_mut().unwrap().goodput_rps = Some(0.0));
    assert!(reported(
        &divided,
        "LOST: goodput of narrow / wide in fixed at 1 requests/s: there is no ratio where the divisor is 0"
    ));
    assert!(!compare(&divided, &divided, options).unwrap().regressed(), "as it was");
    // Nor have cells whose client fell behind, with all seeds; with one of two, the other is compared.
    let void = |cell: &mut CellData| {
        cell.entry.status = CellStatus::Void { reason: "late".into() };
        cell.window = None;
    };
    assert!(reported(&edited(&void), "wide in fixed at 8 requests/s was steady and is void"));
    let first = edited(&|cell| {
        if cell.entry.key.repeat == 0 {
            void(cell)
        }
    });
    assert!(!reported(
        &first,
        "Not compared: wide in fixed at 8 requests/s was steady and is void or not run with 1"
    ));
}

#[test]
fn counts_are_compared_where_they_depend_on_settings_alone() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let options = CompareOptions { max_regression: 0.05, absolute: false };
    // Changes in the count of requests, and so on, of the narrow system's first cell.
    let changed = |setting: &dyn Fn(&mut Value), change: &dyn Fn(&mut CellMetrics)| {
        let [old, mut new] = [(); 2].map(|()| {
            let mut data = RunData::load(&folder).unwrap();
            let mut settings = serde_json::to_value(&data.manifest.settings).unwrap();
            setting(&mut settings);
            data.manifest.settings = serde_json::from_value(settings).unwrap();
            data
        });
        change(new.cells[0].full.as_mut().unwrap());
        compare(&old, &new, options).unwrap().counts.len()
    };
    let [requests, rejected, failed]: [&dyn Fn(&mut CellMetrics); 3] =
        [&|full| full.requests -= 1, &|full| full.rejected += 1, &|full| full.failed += 1];
    assert_eq!(changed(&|_| {}, requests), 1);
    assert_eq!(changed(&|_| {}, failed), 1);
    assert_eq!(changed(&|_| {}, rejected), 0, "its queue may have been full");
    let engine = |max_waiting: u32| {
        move |settings: &mut Value| {
            settings["systems"][0]["serve"] = json!({
                "kind": "engine",
                "scheduler": { "max_waiting": max_waiting },
                "kv": { "kind": "paged", "block_size": 1 },
            });
        }
    };
    assert_eq!(changed(&engine(39), rejected), 0, "it may have been full");
    assert_eq!(changed(&engine(40), rejected), 1, "it had room for all");
    let server = |settings: &mut Value| {
        let serve =
            json!({ "kind": "openai", "url": "http://localhost:1", "model": "m", "ignore_eos": true });
        settings["systems"][0]["serve"] = serve;
    };
    assert_eq!(changed(&server, failed), 0, "it is elsewhere");
    let turns = |settings: &mut Value| {
        settings["panels"][0]["conversations"] = json!({ "turns": { "kind": "fixed", "turns": 2 } });
    };
    assert_eq!(changed(&turns, requests), 0, "later turns wait for answers");
}
