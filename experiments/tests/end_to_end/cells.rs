//! Cells of a real engine, whose weights are loaded once for all.

use std::sync::atomic::AtomicBool;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::Source;
use quire_experiments::{Experiment, Settings, Target, store};

use super::scripted::CONFIG;

/// What one cell left in the prefix cache would spare the next one its prompts, and the rates of a figure would depend on
/// their order.
#[test]
fn a_cell_finds_nothing_of_the_one_before_it_in_the_prefix_cache() {
    let (start, _) = CONFIG.split_once("[[system]]").unwrap();
    let engine = "[[system]]\nname = \"cached\"\nlabel = \"Cached\"\n\
                  serve = { kind = \"engine\", scheduler = {}, kv = { kind = \"paged\", block_size = 8 }, prefix_cache = true }\n";
    let text = format!("{start}{engine}")
        .replace("weights = \"f32\"", "weights = \"q4_0\"")
        .replace("kv_bytes = 1_000_000", "kv_bytes = 20_000_000")
        .replace("requests = 40", "requests = 4")
        .replace("from_rate = { wide = { fixed = 8 } }", "")
        .replace("arrivals = {", "shared_prefix = 64\narrivals = {")
        .replace("rates = [1, 8, 16]", "rates = [4, 5]");
    let source = Source::new("cells.toml", text);
    let cli = Cli::try_parse_from(["experiment", "cells.toml", "--quick"]).unwrap();
    let settings = Settings::resolve(&source, &cli.run).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("run");
    let mut experiment = Experiment::new(source, settings, Vec::new()).quiet();
    experiment.run(&Target::New(folder.clone()), &AtomicBool::new(false)).unwrap();

    let rows = store::read(&folder).unwrap().requests;
    for rate in [4.0, 5.0] {
        let found = |id: u64| {
            let row = rows.iter().find(|row| row.key.rate == rate && row.request() == id);
            row.map(|row| row.record.cached_tokens).unwrap()
        };
        // The prompts begin alike and come a quarter of a second apart: a cell's last finds what its first has computed.
        assert_eq!((found(0), found(3)), (0, 64), "at {rate} requests/s");
    }
}
