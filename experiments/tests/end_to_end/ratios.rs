//! Tables of ratios, from scripted systems' records.

use std::fs;

use quire_experiments::RunData;
use quire_experiments::claims::{Verdict, Why, judge};
use quire_experiments::metrics::Metric;
use quire_experiments::ratios::{RatioCell, Ratios, ratios, write_ratios};
use quire_experiments::record::CellStatus;
use quire_experiments::table::table;

use super::figures::{drawn, resolve, run_with};
use super::scripted::CONFIG;

const TABLE: &str = "[figure]\nkind = \"table\"\nover = \"narrow\"\n";

fn cell<'a>(table: &'a Ratios, band: &str, system: &str, metric: Option<Metric>) -> &'a RatioCell {
    let band = table.panels[0].bands.iter().find(|b| b.title == band).unwrap();
    let place = band.columns.iter().position(|c| c.metric == metric).unwrap();
    &band.rows.iter().find(|row| row.system == system).unwrap().cells[place]
}

#[test]
fn a_table_has_ratios_values_and_what_is_missing() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run_with(TABLE, "", &temp.path().join("run"));
    let svg = drawn(&folder, &temp.path().join("packed"));
    let data = RunData::load(&folder).unwrap();
    let found = ratios(&data).unwrap();
    let titles: Vec<&str> = found.panels[0].bands.iter().map(|band| &*band.title).collect();
    assert_eq!(titles, ["at 1 requests/s", "at 16 requests/s", "sustained"]);

    // Both keep up with one request a second: 100 ms to the first token, 10 ms between tokens.
    for (metric, value) in [(Metric::Ttft, 0.1), (Metric::Tpot, 0.01), (Metric::Throughput, 11.0)] {
        let cell = cell(&found, "at 1 requests/s", "wide", Some(metric));
        let (ratio, own) = (cell.ratio.clone().unwrap(), cell.value.clone().unwrap());
        assert!((ratio.value - 1.0).abs() < 0.01 && ratio.interval.is_some(), "{metric:?}: {ratio:?}");
        assert!((own.value / value - 1.0).abs() < 0.05 && own.side.is_empty(), "{metric:?}: {own:?}");
        assert_eq!(ratio.seeds, 2);
    }
    // The narrow system was left out there.
    let missing = cell(&found, "at 16 requests/s", "wide", Some(Metric::Ttft));
    assert!(missing.ratio.as_ref().unwrap_err().contains("narrow was left out"));
    assert!((missing.value.as_ref().unwrap().value - 0.1).abs() < 0.01);

    // At 8 requests/s the narrow one, which takes 200 ms for each, is too late for nearly all: by hand, of the requests of
    // the window (numbers 4 to 35, each 75 ms later than the one before) those up to number 5 have TTFT up to 0.5 s. So 30 of
    // 32 miss; 10 % do at 1 + 7 * 0.1 / (30 / 32) requests/s.
    let narrow = cell(&found, "sustained", "narrow", None).value.clone().unwrap();
    let by_hand = 1.0 + 7.0 * 0.1 / (30.0 / 32.0);
    assert!((narrow.value / by_hand - 1.0).abs() < 0.05 && narrow.side.is_empty(), "{narrow:?}, {by_hand}");
    let wide = cell(&found, "sustained", "wide", None);
    assert_eq!(wide.value.as_ref().map(|v| (v.value, v.side)), Ok((16.0, ">")));
    let ratio = wide.ratio.clone().unwrap();
    assert!((ratio.value * narrow.value / 16.0 - 1.0).abs() < 1e-6 && ratio.side == ">", "{ratio:?}");
    assert_eq!(cell(&found, "sustained", "narrow", None).ratio.clone().unwrap().value, 1.0);

    for text in ["Rate within SLO", "less is better", ">16.0", "At 1 requests/s", "One at a time", "1.00x"] {
        assert!(svg.contains(&text.replace('>', "&gt;")), "{text} is missing in the figure");
    }
    let text = table(&data);
    assert!(!text.contains("Highest rate"), "a table has its own rates");
    for part in ["ratios to narrow", "(more is better)", "narrow was left out", "90 % of the requests"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

/// Two lower bounds have no ratio, but a system's ratio to itself is 1.
#[test]
fn what_is_known_from_one_side_is_said_so() {
    let temp = tempfile::tempdir().unwrap();
    let mut data = RunData::load(&run_with(TABLE, "--quick", &temp.path().join("run"))).unwrap();
    let mut bounds = |systems: &[&str]| {
        for cell in &mut data.cells {
            let Some(window) = cell.window.as_mut() else { continue };
            window.ttft.lower_bounds = u64::from(systems.contains(&&*cell.entry.key.system));
        }
        let found = ratios(&data).unwrap();
        ["narrow", "wide"].map(|system| {
            let cell = cell(&found, "at 1 requests/s", system, Some(Metric::Ttft));
            (cell.ratio.as_ref().map(|r| r.side).map_err(String::clone), cell.value.as_ref().unwrap().side)
        })
    };
    let nothing = Err("known from such sides only that nothing follows".to_string());
    assert_eq!(bounds(&["narrow", "wide"]), [(Ok(""), ">"), (nothing, ">")]);
    assert_eq!(bounds(&["narrow"]), [(Ok(""), ">"), (Ok("<"), "")]);
    assert_eq!(bounds(&["wide"]), [(Ok(""), ""), (Ok(">"), ">")]);
}

#[test]
fn a_table_is_written_for_other_tools() {
    let temp = tempfile::tempdir().unwrap();
    let columns = "columns = [\"throughput\", \"ttft_p90\"]\nat = [\"lowest\"]\n";
    let folder = run_with(&format!("{TABLE}{columns}"), "--quick", &temp.path().join("run"));
    let data = RunData::load(&folder).unwrap();
    write_ratios(&data, &folder).unwrap();
    let csv = fs::read_to_string(folder.join("ratios.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 2 * (2 + 1), "a row a system and quantity: {csv}");
    let wide = csv.lines().find(|line| line.starts_with("fixed,wide,rate within the SLO")).unwrap();
    assert!(wide.contains(",>,"), "{wide}");
    let markdown = fs::read_to_string(folder.join("ratios.md")).unwrap();
    assert!(markdown.contains("| at 1 requests/s | throughput, tokens/s (more is better) | TTFT P90, s"));
    assert!(markdown.contains("| All at once | 1.00x, "), "one seed has no interval: {markdown}");
    // A figure of another kind leaves nothing.
    let other = run_with("", "--quick", &temp.path().join("other"));
    write_ratios(&RunData::load(&other).unwrap(), &other).unwrap();
    assert!(!other.join("ratios.csv").exists() && !other.join("ratios.md").exists());
}

fn claim_on(quantity: &str, more: &str) -> String {
    format!(
        "[[claim]]\nsays = \"More.\"\nsource = \"A paper\"\nquantity = {{ {quantity} }}\nsystem = \"wide\"\n{more}\n"
    )
}

#[test]
fn a_seed_without_a_value_above_zero_leaves_no_ratio() {
    let temp = tempfile::tempdir().unwrap();
    let goodput = "kind = \"metric\", metric = \"goodput\", rate = 8";
    let claim = claim_on(goodput, "over = \"narrow\"\nat_least = 2.0");
    let mut data = RunData::load(&run_with(&claim, "", &temp.path().join("run"))).unwrap();
    let cell = data.cells.iter_mut().find(|c| c.entry.key.system == "narrow" && c.entry.key.rate == 8.0);
    cell.unwrap().window.as_mut().unwrap().goodput_rps = Some(0.0);
    let found = judge(&data);
    let why = found[0].why();
    assert!(why.contains("no ratio where a value is 0") && why.contains("of wide, 0."), "{why}");
    assert_eq!(found[0].value, None);
}

#[test]
fn a_rate_that_rests_on_lower_bounds_is_known_from_one_side() {
    let temp = tempfile::tempdir().unwrap();
    let capacity = |system: &str| {
        claim_on("kind = \"capacity\"", "at_most = 12.0").replace("\"wide\"", &format!("\"{system}\""))
    };
    let more = [capacity("wide"), capacity("narrow")].concat();
    let folder = run_with(&more, "", &temp.path().join("run"));
    let judged = |bounded: f64| {
        let mut data = RunData::load(&folder).unwrap();
        for cell in data.cells.iter_mut().filter(|cell| cell.entry.key.rate == bounded) {
            cell.window.as_mut().unwrap().normalized_latency.lower_bounds = 1;
        }
        let verdicts = judge(&data).into_iter().map(|claim| (claim.value.unwrap(), claim.verdict));
        <[(f64, Verdict); 2]>::try_from(verdicts.collect::<Vec<_>>()).unwrap()
    };
    // The wide system is within its bound at all rates, the narrow one crosses it before 8 requests/s.
    let [(16.0, Verdict::Fails), (narrow, Verdict::Holds)] = judged(0.0) else { panic!("{:?}", judged(0.0)) };
    // With an unfinished request at 8, the wide one surely takes 1 only; the narrow one's crossing is where it was or before.
    assert_eq!(judged(8.0), [(1.0, Verdict::Undecided(Why::OneSided)), (narrow, Verdict::Holds)]);
    // At the lowest rate, whose latency the bound is a multiple of: the crossing may lie behind.
    assert_eq!(judged(1.0), [(16.0, Verdict::Fails), (narrow, Verdict::Undecided(Why::OneSided))]);

    // Without the lowest rate nothing bounds; another rate's latency is not in its place.
    let mut data = RunData::load(&folder).unwrap();
    for cell in data.cells.iter_mut().filter(|cell| cell.entry.key.rate == 1.0) {
        cell.entry.status = CellStatus::Void { reason: "the client fell behind".into() };
        cell.window = None;
    }
    for claim in judge(&data) {
        assert!(matches!(claim.verdict, Verdict::Undecided(Why::Missing(_))), "{claim:?}");
    }
    assert!(table(&data).contains("not measured"));
}

#[test]
fn a_rate_within_limits_can_be_claimed() {
    let temp = tempfile::tempdir().unwrap();
    let claim = |bound: &str| {
        format!(
            "[[claim]]\nsays = \"More.\"\nsource = \"A paper\"\nquantity = {{ kind = \"within_slo\" }}\n\
             system = \"wide\"\nover = \"narrow\"\n{bound}\n"
        )
    };
    let more = [claim("at_least = 5.0"), claim("at_most = 5.0")].concat();
    let data = RunData::load(&run_with(&more, "", &temp.path().join("run"))).unwrap();
    let judged = judge(&data);
    assert_eq!(judged[0].verdict, Verdict::Holds, "{:?}", judged[0]);
    assert_eq!(judged[1].verdict, Verdict::Fails, "{:?}", judged[1]);
    assert!(judged[0].what.contains("rate within the SLO of wide / narrow in fixed"), "{}", judged[0].what);
}

#[test]
fn wrong_tables_are_refused_with_their_line() {
    let refused = |figure: &str, part: &str| {
        let error = resolve(&format!("{CONFIG}[figure]\nkind = \"table\"\n{figure}\n"), "").unwrap_err();
        assert!(error.contains(part), "{part} is missing in: {error}");
    };
    refused("over = \"narow\"", "no system `narow`");
    refused("", "missing field `over`");
    refused("over = \"wide\"\ncolumns = []", "one metric or more");
    refused("over = \"wide\"\ncolumns = [\"ttft\", \"ttft\"]", "TTFT twice");
    refused("over = \"wide\"\nat = [\"lowest\", \"lowest\"]", "`at` must be");
    refused("over = \"wide\"\nat = [\"middle\"]", "middle");
}
