//! Every kind of figure, drawn from scripted systems' records, and claims held against them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use clap::Parser;
use quire_experiments::claims::{Judged, Verdict, Why, judge, write_claims};
use quire_experiments::cli::Cli;
use quire_experiments::config::{Device, Source};
use quire_experiments::plot::{Picture, run_figure, save};
use quire_experiments::table::table;
use quire_experiments::{Experiment, RunData, Settings, Target, store};
use quire_workloads::ModelLimits;

use super::scripted::{CONFIG, ms, scripted};

pub(crate) fn resolve(text: &str, arguments: &str) -> Result<(Source, Settings), String> {
    let source = Source::new("scripted.toml", text);
    let line = format!("experiment scripted.toml {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    let settings = Settings::resolve(&source, &cli.run).map_err(|e| e.to_string())?;
    Ok((source, settings))
}

/// Runs the scripted configuration with `more` at its end.
pub(crate) fn run_with(more: &str, arguments: &str, folder: &Path) -> PathBuf {
    let (source, settings) = resolve(&format!("{CONFIG}{more}"), arguments).unwrap();
    let limits = ModelLimits { vocab_size: 1000, reserved_ids: 10, max_model_len: 256 };
    let mut experiment = Experiment::new(source, settings, Vec::new())
        .with_limits(limits)
        .quiet()
        .external("narrow", scripted(1, ms(10)))
        .external("wide", scripted(usize::MAX, ms(10)));
    experiment.run(&Target::New(folder.to_owned()), &AtomicBool::new(false)).unwrap()
}

/// The figure's text, from the full records and, the same, from the packed ones.
pub(crate) fn drawn(folder: &Path, packed: &Path) -> String {
    store::pack(folder, packed).unwrap();
    let [full, packed] = [folder, packed].map(|folder| {
        let figure = run_figure(&RunData::load(folder).unwrap());
        save(&figure, &folder.join("figure")).unwrap();
        fs::read_to_string(folder.join("figure.svg")).unwrap()
    });
    assert_eq!(full.matches("<text").count(), packed.matches("<text").count());
    packed
}

#[test]
fn a_figure_of_memory_has_a_bar_a_system_and_a_group_a_rate() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run_with("[figure]\nkind = \"memory\"\n", "--quick", &temp.path().join("run"));
    let svg = drawn(&folder, &temp.path().join("packed"));
    // Tokens hold a quarter of the slots; nobody waits.
    for text in [
        "25 %",
        "75 %",
        "1 requests/s",
        "16 requests/s",
        "One at a time",
        "All at once",
        "left out: saturated below",
    ] {
        assert!(svg.contains(text), "{text} is missing");
    }
    let text = table(&RunData::load(&folder).unwrap());
    assert!(text.contains("KV tokens") && !text.contains("Highest rate"), "{text}");
}

#[test]
fn a_figure_of_rates_has_the_rows_it_names() {
    let temp = tempfile::tempdir().unwrap();
    let rows = "[figure]\nkind = \"rates\"\nrows = [\"running\", \"itl_max\"]\n";
    let folder = run_with(rows, "--quick", &temp.path().join("run"));
    let svg = drawn(&folder, &temp.path().join("packed"));
    assert!(svg.contains("Running") && svg.contains("longest, s") && !svg.contains("TTFT"));
    assert!(!svg.contains("Goodput counts"), "limits that nothing in it depends on are not in its caption");
    let text = table(&RunData::load(&folder).unwrap());
    assert!(text.contains("ITL max") && text.contains("norm. latency"), "{text}");
}

#[test]
fn a_tradeoff_has_a_point_a_rate() {
    let temp = tempfile::tempdir().unwrap();
    let more = "[figure]\nkind = \"tradeoff\"\nx = \"throughput\"\nrows = [\"itl_p90\"]\n";
    let folder = run_with(more, "", &temp.path().join("run"));
    drawn(&folder, &temp.path().join("packed"));
    let data = RunData::load(&folder).unwrap();
    let Picture::Lines(figure) = run_figure(&data) else { panic!("it is of lines") };
    assert_eq!(figure.x.label, "Throughput (output tokens/s)");
    let wide = &figure.columns[0].series[0][1];
    let points: Vec<(f64, f64)> = wide.iter().map(|p| (p.x, p.y)).collect();
    // 11 tokens a request, 10 ms between them.
    for ((x, y), rate) in points.iter().zip([1.0, 8.0, 16.0]) {
        assert!((x / (11.0 * rate) - 1.0).abs() < 0.1 && (y - 0.01).abs() < 1e-3, "{points:?}");
    }
    assert_eq!((points.len(), figure.columns[0].series[0][0].len()), (3, 2));
    assert!(
        figure
            .caption
            .iter()
            .any(|line| line.contains("Each point is a rate") || line.contains("each point"))
    );
}

#[test]
fn the_default_figure_is_no_setting() {
    let (_, plain) = resolve(CONFIG, "").unwrap();
    let (_, named) = resolve(&format!("{CONFIG}[figure]\nkind = \"rates\"\n"), "").unwrap();
    let (_, other) = resolve(&format!("{CONFIG}[figure]\nkind = \"memory\"\n"), "").unwrap();
    let (_, claimed) = resolve(&format!("{CONFIG}{}", claim("")), "").unwrap();
    assert!(!serde_json::to_string(&plain).unwrap().contains("figure"));
    assert_eq!(plain.sha256(), named.sha256());
    assert_eq!(plain.sha256(), claimed.sha256(), "a claim whose text is mended does not end a run");
    assert_ne!(plain.sha256(), other.sha256());
}

/// A claim on the throughput of the wide system over that of the narrow one, with `changes` instead of lines of the
/// same key.
fn claim(changes: &str) -> String {
    let mut lines: Vec<String> = [
        "says = \"Wider is faster.\"",
        "source = \"A paper\"",
        "quantity = { kind = \"metric\", metric = \"throughput\", rate = 8 }",
        "system = \"wide\"",
        "over = \"narrow\"",
        "at_least = 1.3",
    ]
    .map(str::to_string)
    .into();
    for change in changes.split('\n').filter(|line| !line.is_empty()) {
        let key = change.split(' ').next().unwrap();
        lines.retain(|line| line.split(' ').next() != Some(key));
        lines.push(change.to_string());
    }
    lines.retain(|line| !line.ends_with("= none"));
    format!("[[claim]]\n{}\n", lines.join("\n"))
}

/// What a run of two seeds whose throughputs at 8 requests/s are as given says to each claim.
fn judged(claims: &[&str], wide: [f64; 2], narrow: [f64; 2]) -> Vec<Judged> {
    let temp = tempfile::tempdir().unwrap();
    let more: String = claims.iter().map(|changes| claim(changes)).collect();
    let mut data = RunData::load(&run_with(&more, "", &temp.path().join("run"))).unwrap();
    for cell in data.cells.iter_mut().filter(|c| c.entry.key.rate == 8.0) {
        let values = if cell.entry.key.system == "wide" { wide } else { narrow };
        cell.window.as_mut().unwrap().throughput_tps = values[cell.entry.key.repeat as usize];
    }
    judge(&data)
}

#[test]
fn claims_hold_fail_and_stay_undecided() {
    let verdicts = |wide, narrow| -> Vec<Verdict> {
        let all = judged(&["", "at_least = none\nat_most = 1.3"], wide, narrow);
        all.into_iter().map(|j| j.verdict).collect()
    };
    use Verdict::{Fails, Holds, Undecided};
    // Ratios of one seed each, paired: 1.50 and 1.51, though each system's own values differ by much.
    assert_eq!(verdicts([150.0, 302.0], [100.0, 200.0]), [Holds, Fails]);
    assert_eq!(verdicts([110.0, 221.0], [100.0, 200.0]), [Fails, Holds]);
    let noise = Undecided(Why::WithinNoise);
    assert_eq!(verdicts([130.0, 302.0], [100.0, 200.0]), [noise.clone(), noise]);
}

#[test]
fn a_ratio_is_geometric_and_a_value_is_plain() {
    let all = judged(&["", "over = none\nat_least = 100"], [150.0, 600.0], [100.0, 100.0]);
    assert!((all[0].value.unwrap() - 3.0).abs() < 1e-9, "{all:?}");
    assert!((all[1].value.unwrap() - 375.0).abs() < 1e-9, "{all:?}");
    assert_eq!(all[0].seeds, 2);
    assert!(all[0].what.contains("throughput of wide / narrow in fixed at 8 requests/s"), "{}", all[0].what);
}

#[test]
fn a_claim_without_what_it_needs_is_undecided() {
    let rate =
        |rate: &str| format!("quantity = {{ kind = \"metric\", metric = \"throughput\", rate = {rate} }}");
    let capacity = "quantity = { kind = \"capacity\" }";
    let all = judged(
        &[
            "needs = \"cuda\"",
            &rate("\"highest\""),
            capacity,
            &format!("{capacity}\nat_least = none\nat_most = 100"),
            &format!("{capacity}\nsystem = \"narrow\"\nover = \"wide\""),
            &rate("\"highest_served\""),
        ],
        [1.0; 2],
        [1.0; 2],
    );
    let why = |i: usize| match &all[i].verdict {
        Verdict::Undecided(why) => why.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(why(0), Why::Needs(Device::Cuda));
    assert!(matches!(why(1), Why::Missing(what) if what.contains("narrow was left out")));
    // The wide system takes every rate: its capacity is at least the highest, so that the ratio is at least 16 / c.
    assert_eq!(all[2].verdict, Verdict::Holds, "{:?}", all[2]);
    assert_eq!(why(3), Why::OneSided, "it may be any more");
    assert_eq!(all[4].verdict, Verdict::Fails, "at most c / 16");
    assert!(
        all[5].what.ends_with("at 8 requests/s") && all[5].value.is_some(),
        "narrow ran there: {:?}",
        all[5]
    );
}

#[test]
fn one_seed_is_said_with_what_it_suggests() {
    let temp = tempfile::tempdir().unwrap();
    let more = [claim(""), claim("at_least = none\nat_most = 1.3")].concat();
    let folder = run_with(&more, "--quick", &temp.path().join("run"));
    let data = RunData::load(&folder).unwrap();
    let all = judge(&data);
    assert!(matches!(all[0].verdict, Verdict::Undecided(Why::OneSeed { agrees: Some(true) })), "{all:?}");
    assert!(matches!(all[1].verdict, Verdict::Undecided(Why::OneSeed { agrees: Some(false) })));
    let text = table(&data);
    for part in
        ["undecided", "one seed, whose value disagrees", "claimed at least 1.3", "A paper: Wider is faster."]
    {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    let line = "Of 2 claims of papers: 2 are undecided; of the values of one seed, which decide nothing, 1 agrees and 1 does not.";
    assert!(run_figure(&data).caption().iter().any(|l| l == line), "{:?}", run_figure(&data).caption());
    write_claims(&all, &folder).unwrap();
    let csv = fs::read_to_string(folder.join("claims.csv")).unwrap();
    assert_eq!(csv.lines().count(), 3, "{csv}");
}

#[test]
fn wrong_figures_and_claims_are_refused_with_their_line() {
    let refused = |more: &str, parts: &[&str]| {
        let error = resolve(&format!("{CONFIG}{more}"), "").unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part} is missing in: {error}");
        }
    };
    refused("[figure]\nkind = \"memroy\"\n", &["did you mean `memory`?"]);
    refused("[figure]\nkind = \"rates\"\nrows = []\n", &["one metric or more", "rows = []"]);
    refused("[figure]\nkind = \"tradeoff\"\nx = \"throughput\"\nrows = [\"itl_p98\"]\n", &["itl_p98"]);
    refused(&claim("system = \"wied\""), &["no system `wied`", "system = \"wied\""]);
    refused(&claim("panel = \"fixt\""), &["no panel `fixt`"]);
    refused(&claim("at_least = none"), &["must have a bound"]);
    refused(&claim("at_most = 1.0"), &["nothing can hold"]);
    refused(
        &claim("quantity = { kind = \"metric\", metric = \"running\", rate = 7 }"),
        &["has no rate 7 in any profile"],
    );
    refused(&claim("sorce = \"x\""), &["did you mean `source`?"]);
}
