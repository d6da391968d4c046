//! Configurations that are refused, each with its reason, and its line where it has one.

use std::path::Path;

use clap::Parser;
use quire_experiments::cli::Cli;

use super::{resolve, shipped};

#[test]
fn what_is_given_twice_or_says_nothing_is_refused() {
    let error = |arguments: &str| resolve(&shipped(), arguments).unwrap_err().to_string();
    let twice = error("--trace a/conv.csv --trace conversation=b/conv.csv");
    assert!(twice.contains("two traces for panel `conversation`"), "{twice}");
    let line = ["experiment", "fig3.toml", "--dry-run", "--resume", "run"];
    assert!(Cli::try_parse_from(line).is_err(), "a dry run does not know what is done");

    let online = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/online-1b.toml");
    let text = std::fs::read_to_string(online).unwrap();
    let quick = resolve(&format!("{text}\n[quick]\nrequests = 5\n"), "").unwrap_err().to_string();
    assert!(quick.contains("`run.seconds` stands in the place of `requests`"), "{quick}");
    let both = resolve(&text.replacen("seconds = ", "requests = 100\nseconds = ", 1), "").unwrap_err();
    assert!(both.to_string().contains("leave one of them out") && both.text.contains("requests"), "{both}");
    let neither = resolve(&shipped().replacen("requests = 60\n", "", 1), "").unwrap_err().to_string();
    assert!(neither.contains("`requests` or `seconds` must say"), "{neither}");
}

/// What some switch would not change is not run as if it did.
#[test]
fn switches_that_would_do_nothing_are_refused() {
    let config = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
        std::fs::read_to_string(path).unwrap()
    };
    let speculating = |name: &str| {
        let paged = "kv = { kind = \"paged\"";
        let drafts = "speculation = { drafter = { kind = \"suffix\", depth = 8 }, length = { kind = \"fixed\", tokens = 4 } }";
        assert!(config(name).contains(paged), "{name}");
        resolve(&config(name).replacen(paged, &format!("{drafts}\n{paged}"), 1), "")
    };
    speculating("fig3").unwrap();
    let beams = speculating("fig5").unwrap_err().to_string();
    assert!(beams.contains("nothing is proposed for the beams"), "{beams}");
    let batches = config("fig3").replacen(
        "[system.serve]\nkind = \"engine\"\n",
        "[system.serve]\nkind = \"engine\"\npreemption = { kind = \"swap\", bytes = 4096 }\n",
        1,
    );
    let batches = resolve(&batches, "").unwrap_err().to_string();
    assert!(batches.contains("static preempts nothing"), "{batches}");
}

/// Replaces `from` in the shipped figure by `to` and expects an error with these parts, at a line with `line` in it.
#[track_caller]
fn refused(from: &str, to: &str, line: &str, parts: &[&str]) {
    let text = shipped();
    assert!(text.contains(from), "{from}");
    let error = resolve(&text.replacen(from, to, 1), "").unwrap_err();
    let shown = error.to_string();
    assert!(error.text.contains(line), "line {}: {shown}", error.line);
    assert!(shown.contains("fig3.toml:"), "{shown}");
    for part in parts {
        assert!(shown.contains(part), "{part} is missing in: {shown}");
    }
}

#[test]
fn wrong_configurations_are_refused_with_their_line() {
    refused("repeats = 1", "repaets = 1", "repaets", &["unknown field", "did you mean `repeats`?"]);
    refused("block_size = 1 }", "blok_size = 1 }", "blok_size", &["did you mean `block_size`?"]);
    refused("kind = \"naive\"", "kind = \"naiv\"", "naiv", &["did you mean `naive`?"]);
    refused("max_running = 64", "max_runing = 64", "max_runing", &["did you mean `max_running`?"]);
    refused("reservation = \"max\"", "reservation = \"most\"", "most", &["unknown variant"]);
    refused("block_size = 1 }", "block_size = 300 }", "serve", &["1 to 256"]);
    refused("kv_bytes = ", "kv_bytes = 0 # ", "kv_bytes = 0", &["more than 0"]);
    refused("ttft_s = 2.0", "ttft_s = inf", "ttft_s", &["a number above 0"]);
    refused("repeats = 1", "repeats = 4_000_000_000", "[run]", &["cells are more than"]);
    refused("name = \"decode\"", "name = \"de.code\"", "de.code", &["letters, digits, `-` and `_`"]);
    refused("warm_up = 0.2", "warm_up = 1.5", "warm_up", &["share"]);
    refused("name = \"decode\"", "name = \"conversation\"", "conversation", &["another panel"]);
    refused("kind = \"poisson\"", "kind = \"poison\"", "poison", &["did you mean `poisson`?"]);
    let arrivals = "arrivals = { kind = \"poisson\" }";
    refused(arrivals, &format!("{arrivals}\nclasses = [0]"), "classes", &["a weight must be"]);
    let beams = |width| format!("{arrivals}\ndecoding = {{ kind = \"beam\", width = {width} }}");
    refused(arrivals, &beams(17), "decoding", &["choose 1 to 16"]);
    refused(arrivals, &beams(4), "serve", &["`decoding` asks for several"]);
    for ranks in [0, 65] {
        let ranks = format!("tensor_parallel = {ranks}\nkv_bytes = ");
        refused("kv_bytes = ", &ranks, "tensor_parallel", &["must be 1 to 64"]);
    }
    let servers_alone = |ranks: u32| {
        format!(
            "name = \"a\"\nmodel = \"dummy:smollm2-135m\"\nweights = \"f32\"\nkv_dtype = \"f32\"\nkv_bytes = 1000000\n\
             max_model_len = 256\nlength_scale = 1.0\ntensor_parallel = {ranks}\nslo = {{ ttft_s = 1, tpot_s = 1 }}\n\
             run = {{ requests = 4, repeats = 1, seed = 1, warm_up = 0.2, drain = 0.1, drain_limit_s = 4.0, stop_after_saturation = false, warm_up_requests = 2, lag_bound_s = 0.02, lag_share = 0.02 }}\n\
             [[panel]]\nname = \"p\"\ntitle = \"P\"\nlengths = {{ kind = \"stats\", name = \"azure_conv_2023\" }}\n\
             arrivals = {{ kind = \"poisson\" }}\nrates = [1]\n\
             [[system]]\nname = \"naive\"\nlabel = \"Naive\"\nserve = {{ kind = \"naive\", batch_size = 2, timeout_ms = 10 }}\n"
        )
    };
    resolve(&servers_alone(1), "").unwrap();
    let error = resolve(&servers_alone(3), "").unwrap_err().to_string();
    assert!(error.contains("no system is an engine"), "{error}");
    let system = "[[system]]\n";
    refused(system, &format!("{system}point = {{ line = \"a\", x = 1.0 }}\n"), "point", &["kind `sweep`"]);
    refused("length_scale = ", "length_scale = -", "length_scale", &["more than 0"]);
    refused("conversation = [", "conversatoin = [", "conversatoin", &["no panel"]);
    // The table of a GPU, on a machine without one.
    refused("block_size = 16", "block_size = 4", "engine", &["8 to 256"]);
    refused("block_size = 16", "block_size = 16, swap_bytes = 0", "engine", &["more than 0"]);
    refused("without = [\"naive\"]", "without = [\"nave\"]", "without", &["no system `nave`"]);
    refused("4, 8, 12, 16]", "4, 8, 8]", "conversation", &["ascending"]);
    refused("longest_s = 40.0", "longest_s = 0.0", "longest_s", &["more than 0"]);
    refused(
        "kind = \"continuous\", token_budget",
        "kind = \"continous\", token_budget",
        "continous",
        &["did you mean"],
    );
    refused(
        "token_budget = 2048, max_running = 256, block_size = 16 }\n\n[[p",
        "token_budget = 2048, max_running = 4096, block_size = 16 }\n\n[[p",
        "serve",
        &["`token_budget`"],
    );
    refused(
        "timeout_ms = 100 }\n\n[[cuda",
        "timeout_ms = 100 }\nfrom_rate = 1\n\n[[cuda",
        "from_rate",
        &["unknown field"],
    );
}
