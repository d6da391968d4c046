//! What a document reads of runs: the numbers of scripted systems, a run that is not there, and what is refused.

use std::fs;
use std::path::Path;

use quire_experiments::numbers::{Written, write_numbers};
use serde_json::Value;

use super::micro;
use super::scripted::{ms, run};

/// The wide system's throughput over the narrow one's, where both keep up.
const CLAIMS: &str = r#"
[[claim]]
says = "More at once is faster."
source = "A paper, section 1"
quantity = { kind = "metric", metric = "throughput", rate = "lowest" }
system = "wide"
over = "narrow"
at_least = 5.0

[[claim]]
says = "It is fast at a rate of which the run has nothing."
source = "A paper, section 2"
quantity = { kind = "metric", metric = "throughput", rate = 99.0 }
system = "wide"
at_least = 5.0
"#;

fn numbers(list: &str, folder: &Path) -> Result<(Written, Value), String> {
    let path = folder.join("list.toml");
    fs::write(&path, list).unwrap();
    let written = write_numbers(&path, &folder.join("out")).map_err(|error| format!("{error:#}"))?;
    let value = serde_json::from_str(&fs::read_to_string(&written.file).unwrap()).unwrap();
    Ok((written, value))
}

/// The element of `array` whose `key` is `name`.
fn named<'a>(array: &'a Value, key: &str, name: &Value) -> &'a Value {
    array.as_array().unwrap().iter().find(|element| &element[key] == name).unwrap()
}

#[test]
fn numbers_are_those_of_the_records() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "", ms(10));
    let config = temp.path().join("claims.toml");
    fs::write(&config, CLAIMS).unwrap();
    let list = format!(
        "[[run]]\nname = \"here\"\nfolder = {folder:?}\nclaims = {config:?}\nrows = [\"running\"]\nreference = \"wide\"\n\
         [[run]]\nname = \"later\"\nfolder = {:?}\n",
        temp.path().join("nowhere")
    );
    let (written, value) = numbers(&list, temp.path()).unwrap();
    assert_eq!((written.shown, written.left_out.len()), (vec!["here".to_string()], 1));
    assert!(value["later"].is_null());

    let here = &value["here"];
    assert_eq!((here["seeds"].as_u64(), here["cells"]["skipped"].as_u64()), (Some(2), Some(2)));
    assert!(here["caption"].to_string().contains("2 seeds"), "{}", here["caption"]);
    let panel = named(&here["panels"], "name", &"fixed".into());
    let [wide, narrow] = ["wide", "narrow"].map(|name| named(&panel["systems"], "name", &name.into()));
    let at = |system: &Value, rate: f64| named(&system["at"], "rate", &rate.into()).clone();
    // 100 ms to the first token and 10 ms to each of the 10 others.
    let latency = at(wide, 8.0)["metrics"]["normalized_latency"].clone();
    assert!((latency["value"].as_f64().unwrap() - 0.2 / 11.0).abs() < 1e-4, "{latency}");
    assert_eq!((&latency["known"], latency["seeds"].as_u64()), (&"exactly".into(), Some(2)));
    assert!(latency["interval"].is_array());
    let ratio = at(wide, 1.0)["over"]["narrow"]["throughput"]["value"].as_f64().unwrap();
    assert!((ratio - 1.0).abs() < 0.05, "both keep up: {ratio}");
    assert!((at(wide, 8.0)["arrived_rps"].as_f64().unwrap() - 8.0).abs() < 0.5);
    assert_eq!(at(narrow, 16.0)["skipped"], true);
    assert!(at(narrow, 16.0)["metrics"].as_object().unwrap().is_empty());
    // The wide system keeps up at every rate: its rate, and its ratio, are known from below.
    assert_eq!((&wide["rate_at"]["known"], &wide["rate_at"]["value"]), (&"at least".into(), &16.0.into()));
    assert_eq!(wide["rate_at_over"]["narrow"]["known"], "at least");

    let claim = &here["claims"][0];
    assert_eq!((&claim["verdict"], &claim["claimed"]), (&"fails".into(), &"at least 5".into()));
    assert_eq!((&claim["at_least"], claim["at_most"].is_null()), (&5.0.into(), true));
    assert_eq!((&claim["ran"], &here["claims"][1]["ran"]), (&true.into(), &false.into()));
    assert_eq!(here["claims_of"], "claims.toml");

    let svg = fs::read_to_string(temp.path().join("out/here.svg")).unwrap();
    assert!(svg.contains("Running") && !svg.contains("TTFT"), "the rows are those of the list");
    assert!(!svg.contains("2 seeds"), "the caption is the document's");
}

#[test]
fn what_cannot_be_given_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let folder = run(&temp.path().join("run"), "--quick", ms(10));
    let entry = format!("[[run]]\nname = \"a\"\nfolder = {folder:?}\n");
    let refused = |list: &str| numbers(list, temp.path()).unwrap_err();
    assert!(refused(&format!("{entry}{entry}")).contains("two runs have the name a"));
    assert!(refused(&format!("{entry}row = []\n")).contains("row"));
    let twice = refused(&format!("{entry}rows = [\"ttft\", \"ttft\"]\n"));
    assert!(twice.starts_with("a (") && twice.contains("TTFT twice"), "{twice}");
    assert!(refused(&format!("{entry}reference = \"none\"\n")).contains("no system none"));
    fs::create_dir(temp.path().join("empty")).unwrap();
    let empty = refused(&format!("[[run]]\nname = \"b\"\nfolder = {:?}\n", temp.path().join("empty")));
    assert!(empty.starts_with("b ("), "{empty}");
}

/// The paper said that no claim failed, since it could not show those of an operation timed alone.
#[test]
fn a_micro_benchmark_has_numbers_and_claims() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let text = format!("{}at_least = 1e6\n", micro::ATTENTION.replace("at_most = 1.26\n", ""));
    let record = micro::run(&text, &folder, &["--quick"]).unwrap();
    let entry = format!("[[run]]\nname = \"alone\"\nfolder = {folder:?}\n");
    let (written, value) = numbers(&entry, temp.path()).unwrap();
    assert_eq!(written.shown, ["alone"]);

    let alone = &value["alone"];
    let panel = named(&alone["panels"], "name", &"batch-3".into());
    let line = named(&panel["lines"], "name", &"paged-16".into());
    let at = named(&line["at"], "x", &100.into());
    let seconds = record.estimate("batch-3", "paged-16", 100).unwrap();
    let ratio = record.ratio("batch-3", ["paged-16", "contiguous"], 100).unwrap();
    assert_eq!(at["seconds"]["value"], seconds.mean);
    let over = &at["over"]["contiguous"];
    assert_eq!((&over["value"], &over["seeds"]), (&ratio.ratio.into(), &2.into()));
    assert_eq!((over["interval"].is_array(), &over["known"]), (true, &"exactly".into()));
    assert!(at["over"]["paged-16"].is_null(), "a line is not held against itself");

    let claim = &alone["claims"][0];
    assert_eq!((&claim["claimed"], &claim["value"]), (&"at least 1000000".into(), &ratio.ratio.into()));
    assert_ne!(claim["verdict"], "holds", "{claim}");
    assert!(alone["caption"].to_string().contains("2 repeats"), "{}", alone["caption"]);
    let svg = fs::read_to_string(temp.path().join("out/alone.svg")).unwrap();
    assert!(svg.contains("Batch of 3") && !svg.contains("2 repeats"), "the caption is the document's");

    let refused = numbers(&format!("{entry}rows = [\"ttft\"]\n"), temp.path()).unwrap_err();
    assert!(refused.contains("name and a folder alone"), "{refused}");
}
