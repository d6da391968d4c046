//! Micro-benchmarks: measured small, redrawn, packed, held against claims.

use std::fs;
use std::path::Path;

use clap::Parser;
use quire_experiments::claims::{Judged, Verdict, Why};
use quire_experiments::cli::Cli;
use quire_experiments::config::{Device, Source};
use quire_experiments::micro::{self, MicroConfig, MicroRecord, Times};
use quire_experiments::plot::{Picture, Scale, micro_figure, save};
use quire_experiments::{RunData, store};

pub(super) const ATTENTION: &str = r#"
name = "small"
threads = 1

[figure]
kind = "micro"
over = "contiguous"

[measure]
kind = "attention"
heads = { heads = 9, kv_heads = 3, head_dim = 64 }
kv_dtype = "bf16"
batches = [1, 3]
contexts = [16, 100]
block_sizes = [1, 16]

[run]
repeats = 3
rounds = 5
seed = 4

[quick]
repeats = 2
rounds = 2

[[claim]]
says = "Blocks cost 26 % at most."
source = "A paper"
panel = "batch-3"
line = "paged-16"
over = "contiguous"
x = 100
at_most = 1.26
"#;

pub(super) fn run(text: &str, folder: &Path, arguments: &[&str]) -> Result<MicroRecord, String> {
    let out = folder.display().to_string();
    let line = ["experiment", "small.toml", "--out", &out];
    let cli = Cli::try_parse_from(line.into_iter().chain(arguments.iter().copied())).unwrap();
    let source = Source::new("small.toml", text);
    let folder = micro::run(&source, &cli.run, &[], |_| Ok(())).map_err(|e| format!("{e:#}"))?;
    micro::read(&folder.expect("it was no dry run")).map_err(|e| e.to_string())
}

/// Whether every line has a time above 0 for every round of every point of every repeat.
fn is_complete(record: &MicroRecord) -> bool {
    let plan = &record.plan;
    let points = plan.panels.len() * plan.lines.len() * plan.xs.len();
    record.times.len() == points * record.run.repeats as usize
        && record.times.iter().all(|t| {
            t.seconds.len() == record.run.rounds as usize
                && t.seconds.iter().all(|s| *s > 0.0 && s.is_finite())
        })
}

#[test]
fn attention_is_measured_drawn_and_packed() {
    let temp = tempfile::tempdir().unwrap();
    let [folder, packed] = ["run", "packed"].map(|name| temp.path().join(name));
    let record = run(ATTENTION, &folder, &["--quick"]).unwrap();
    assert!(is_complete(&record));
    assert_eq!(
        record.plan.lines.iter().map(|l| &*l.name).collect::<Vec<_>>(),
        ["contiguous", "paged-1", "paged-16"]
    );
    let longer = record.estimate("batch-3", "contiguous", 100).unwrap().mean;
    let shorter = record.estimate("batch-1", "contiguous", 16).unwrap().mean;
    assert!(longer > shorter, "19 times the K and V: {longer} against {shorter}");
    assert_eq!(record.ratio("batch-1", ["contiguous"; 2], 16).unwrap().ratio, 1.0);

    let Picture::Lines(figure) = micro_figure(&record) else { panic!("it is of lines") };
    assert_eq!((figure.columns.len(), figure.rows.len(), figure.x.scale), (2, 2, Scale::Log2));
    assert_eq!(figure.columns[1].series[1][2].len(), 2);
    assert!(
        record.ratio("batch-1", ["paged-1", "contiguous"], 16).unwrap().interval.is_some(),
        "two repeats"
    );
    save(&micro_figure(&record), &folder.join("small")).unwrap();
    let svg = fs::read_to_string(folder.join("small.svg")).unwrap();
    for text in [
        "Batch of 3",
        "Paged, blocks of 16",
        "Context (tokens, log)",
        "to contiguous",
        "1 threads",
        "Of 1 claims",
    ] {
        assert!(svg.contains(text), "{text} is missing");
    }
    let table = micro::text(&record);
    assert!(table.contains("microseconds") && table.contains("claimed at most 1.26"), "{table}");

    micro::pack(&folder, &packed).unwrap();
    assert_eq!(micro::read(&packed).unwrap(), record);
    assert!(micro::pack(&folder, &packed).is_err(), "committed results are not overwritten");
    assert!(RunData::load(&packed).is_err() && store::pack(&packed, &temp.path().join("other")).is_err());
    assert!(run(ATTENTION, &folder, &["--quick"]).unwrap_err().contains("is a run already"));
    let error = RunData::load(&folder).unwrap_err().to_string();
    assert!(error.contains("a micro-benchmark has no cells"), "{error}");
    let text = fs::read_to_string(folder.join("micro.json")).unwrap();
    fs::write(folder.join("micro.json"), text.replace("\"name\":\"small\"", "\"name\":\"../small\""))
        .unwrap();
    assert!(micro::read(&folder).unwrap_err().to_string().contains("must be letters"));
}

#[test]
fn a_dry_run_measures_nothing() {
    let cli = Cli::try_parse_from(["experiment", "small.toml", "--dry-run"]).unwrap();
    let mut said = String::new();
    let print = |text: &str| {
        said = text.into();
        Ok(())
    };
    assert_eq!(micro::run(&Source::new("small.toml", ATTENTION), &cli.run, &[], print).unwrap(), None);
    // 2 batches, 3 ways, 2 contexts, 3 repeats of 5 rounds.
    assert!(said.contains("180 times") && said.contains("paged-16"), "{said}");

    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("micro.json"), "{}").unwrap();
    let error = run(ATTENTION, temp.path(), &["--dry-run"]).unwrap_err();
    assert!(error.contains("is a run already"), "a folder that the run would refuse: {error}");
}

#[test]
fn preemption_is_measured() {
    let temp = tempfile::tempdir().unwrap();
    let (start, rest) = ATTENTION.split_once("[measure]").unwrap();
    let (_, rest) = rest.split_once("[run]").unwrap();
    let (run_table, _) = rest.split_once("[[claim]]").unwrap();
    let measure = "[measure]\nkind = \"preemption\"\nmodel = \"dummy:smollm2-135m\"\nweights = \"q4_0\"\nkv_dtype = \"bf16\"\n\
                   tokens = [12, 40]\nblock_sizes = [1, 16]\n";
    let text = format!("{}{measure}[run]{run_table}", start.replace("\"contiguous\"", "\"swap\""));
    let record = run(&text, &temp.path().join("run"), &["--quick"]).unwrap();
    assert!(is_complete(&record));
    assert_eq!(
        record.plan.lines.iter().map(|l| &*l.name).collect::<Vec<_>>(),
        ["recompute", "swap", "swap_out", "swap_in"]
    );
    let of = |line: &str| record.estimate("tokens-40", line, 16).unwrap().mean;
    assert!(of("recompute") > of("swap"), "a copy in memory is cheaper than 30 layers");
    let said = micro::text(&record);
    assert!(said.contains("random weights of smollm2-135m's shape (dummy)"));
    assert!(said.contains("each with places in memory of its own"), "the model stays loaded: {said}");
}

/// What records with these seconds a repeat, of blocks of 16 over contiguous, say to the claim.
fn judged(record: &MicroRecord, claim: &str, ratios: [f64; 3]) -> Judged {
    let times = |line: &str, seed: u64, seconds: f64| Times {
        panel: "batch-3".into(),
        line: line.into(),
        x: 100,
        seed,
        // The median leaves the one disturbed round out.
        seconds: vec![seconds, 100.0, seconds],
    };
    let of =
        |(seed, ratio): (u64, f64)| [times("contiguous", seed, 0.5), times("paged-16", seed, 0.5 * ratio)];
    let times = (0..).zip(ratios).flat_map(of).collect();
    let text = ATTENTION.replace("at_most = 1.26", claim);
    micro::judge(&MicroRecord { times, config_text: text, ..record.clone() }).unwrap().remove(0)
}

#[test]
fn claims_are_judged_by_repeats() {
    let temp = tempfile::tempdir().unwrap();
    let record = run(ATTENTION, &temp.path().join("run"), &["--quick"]).unwrap();
    let verdict = |claim: &str, ratios| judged(&record, claim, ratios).verdict;
    assert_eq!(verdict("at_most = 1.26", [1.1, 1.11, 1.12]), Verdict::Holds);
    assert_eq!(verdict("at_least = 1.2", [1.1, 1.11, 1.12]), Verdict::Fails);
    assert_eq!(verdict("at_most = 1.26", [1.0, 1.2, 1.5]), Verdict::Undecided(Why::WithinNoise));
    let needs = "at_most = 1.26\nneeds = \"cuda\"";
    assert_eq!(verdict(needs, [1.1, 1.11, 1.12]), Verdict::Undecided(Why::Needs(Device::Cuda)));
    let one = judged(&record, "at_most = 1.26", [1.1, 1.1, 1.1]);
    assert!((one.value.unwrap() - 1.1).abs() < 1e-9 && one.seeds == 3, "{one:?}");
    assert!(one.what.contains("paged-16 / contiguous in batch-3 at 100"), "{}", one.what);

    // Without a panel it is about the only one: of a GPU here, where the CPU has two.
    let gpu = ATTENTION.split_once("[measure]").unwrap().1.split_once("[run]").unwrap().0;
    let gpu = gpu.replace("[1, 3]", "[3]").replace("block_sizes = [1, 16]", "block_sizes = [8, 16]");
    let config_text = format!("{}\n[cuda.measure]{gpu}", ATTENTION.replace("panel = \"batch-3\"\n", ""));
    let judged = micro::judge(&MicroRecord { config_text, ..record.clone() }).unwrap().remove(0);
    assert_eq!(judged.verdict, Verdict::Undecided(Why::NotRun("the run does not have its panel".into())));
    assert_eq!(judged.what, "time of paged-16 / contiguous at 100");
}

#[test]
fn what_means_nothing_for_a_micro_benchmark_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let refused = |arguments: &[&str]| run(ATTENTION, &temp.path().join("run"), arguments).unwrap_err();
    assert!(refused(&["--trace-steps"]).contains("--trace-steps: nothing is served"));
    assert!(refused(&["--only", "x"]).contains("--only"));
    assert!(refused(&["--device", "cuda"]).contains("no [cuda] table"));
    let parse = |text: &str| MicroConfig::parse(&Source::new("small.toml", text)).unwrap_err().to_string();
    let with = |from: &str, to: &str| {
        assert!(ATTENTION.contains(from), "{from}");
        parse(&ATTENTION.replacen(from, to, 1))
    };
    assert!(with("[16, 100]", "[100, 16]").contains("ascending"));
    assert!(with("[1, 16]", "[1, 512]").contains("1 to 256"));
    assert!(with("heads = 9", "heads = 8").contains("multiple of `kv_heads`"));
    assert!(with("\"bf16\"", "\"fp8\"").contains("for GPUs"));
    assert!(with("batches = [1, 3]", "batches = [1, 300_000]").contains("choose"));
    // One token takes a block.
    let many = with("batches = [1, 3]\ncontexts = [16, 100]", "batches = [4_194_304]\ncontexts = [1]");
    assert!(many.contains("1073741824 tokens of K and V"), "{many}");
    assert!(
        with("over = \"contiguous\"\n\n[measure]", "over = \"contigous\"\n\n[measure]").contains("no line")
    );
    assert!(with("rounds = 5", "rounds = 0").contains("1 or more"));
    assert!(with("batch-3", "batch-4").contains("no panel `batch-4`"));
    assert!(with("x = 100", "x = 101").contains("nothing is measured at 101"));
    assert!(with("line = \"paged-16\"", "line = \"paged-17\"").contains("no line `paged-17`"));
    assert!(with("at_most = 1.26", "").contains("must have a bound"));
    assert!(with("seed = 4", "seed = 4\nseeds = 5").contains("did you mean `seed`?"));
}
