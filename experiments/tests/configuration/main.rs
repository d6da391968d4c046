//! Configurations: the shipped ones are valid, and mean what they say.

mod documented;
mod refused;

use std::path::Path;

use clap::Parser;
use quire_experiments::cli::Cli;
use quire_experiments::config::{ConfigError, Source, SystemEntry};
use quire_experiments::manifest::Manifest;
use quire_experiments::micro::MicroConfig;
use quire_experiments::settings::Profile;
use quire_experiments::traces::TracesConfig;
use quire_experiments::{Experiment, Settings};

fn shipped() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/fig3.toml");
    std::fs::read_to_string(path).unwrap()
}

fn resolve(text: &str, arguments: &str) -> Result<Settings, ConfigError> {
    let line = format!("experiment fig3.toml {arguments}");
    let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
    Settings::resolve(&Source::new("fig3.toml", text), &cli.run)
}

#[test]
fn rates_are_multiplied_for_another_machine() {
    let (as_written, slower) =
        (resolve(&shipped(), "--full").unwrap(), resolve(&shipped(), "--full --rates-times 0.35").unwrap());
    for (panel, scaled) in as_written.panels.iter().zip(&slower.panels) {
        for (rate, scaled) in panel.rates.iter().zip(&scaled.rates) {
            assert!((scaled / rate - 0.35).abs() < 1e-5, "{rate} became {scaled}");
            assert!(scaled.to_string().len() <= 7, "{scaled} is no number to read");
        }
    }
    for (system, scaled) in as_written.systems.iter().zip(&slower.systems) {
        for (from, scaled) in system.from_rate.values().zip(scaled.from_rate.values()) {
            assert!((scaled / from - 0.35).abs() < 1e-5, "{from} became {scaled}");
        }
    }
    assert!(as_written.systems.iter().any(|system| !system.from_rate.is_empty()), "some lines start later");
    // Which cells run does not change, and a run at other rates is another matrix.
    assert_eq!(as_written.cells().len(), slower.cells().len());
    assert_ne!(as_written.sha256(), slower.sha256());
    assert_eq!(as_written.sha256(), resolve(&shipped(), "--full --rates-times 1").unwrap().sha256());
    let close = shipped().replace("rates = [4.5, 7, 9.5]", "rates = [4.5, 4.5000001, 9.5]");
    resolve(&close, "").unwrap();
    let one = resolve(&close, "--rates-times 0.5").unwrap_err().to_string();
    assert!(one.contains("to six digits") && one.contains("conversation"), "{one}");
    for wrong in ["0", "-1", "inf", "NaN", "half", "1001"] {
        assert!(Cli::try_parse_from(["experiment", "fig3.toml", "--rates-times", wrong]).is_err(), "{wrong}");
    }
}

#[test]
fn every_shipped_configuration_resolves_in_every_profile() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut found = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") {
            continue;
        }
        let mut text = std::fs::read_to_string(&path).unwrap();
        // Systems that are read at another's end.
        if let Some((before, _)) = path.to_str().unwrap().split_once("-servers.toml") {
            text = std::fs::read_to_string(format!("{before}.toml")).unwrap() + &text;
        }
        if text.contains("kind = \"traces\"") {
            // Nothing runs for it: it has a shape of its own and no profiles.
            let source = Source::new(path.display().to_string(), &*text);
            TracesConfig::parse(&source).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            continue;
        }
        if text.contains("kind = \"micro\"") {
            // Nothing is served for it: it has a shape of its own, which is checked with all its profiles.
            let source = Source::new(path.display().to_string(), &*text);
            MicroConfig::parse(&source).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            continue;
        }
        let profiles = match needs_a_gpu(&text) {
            true => ["--device cuda", "--dry-run", "--device cuda --dry-run"],
            false => ["", "--quick", "--full"],
        };
        for profile in profiles {
            resolve(&text, profile).unwrap_or_else(|e| panic!("{} {profile}: {e}", path.display()));
        }
        found += 1;
    }
    assert!(found > 0);
}

#[test]
fn servers_of_others_stand_beside_those_of_table1() {
    let read =
        |path: &str| Source::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap();
    let with = read("configs/table1.toml").and(read("configs/table1-servers.toml")).unwrap();
    let names = |arguments: &str| {
        let cli = format!("experiment table1.toml {arguments}");
        let run = Cli::try_parse_from(cli.split_whitespace()).unwrap().run;
        let settings = Settings::resolve(&with, &run).unwrap_or_else(|e| panic!("{arguments}: {e}"));
        settings.systems.into_iter().map(|system| system.name).collect::<Vec<_>>()
    };
    let all = ["naive", "static", "paged", "hf_static", "hf_continuous", "llamacpp"];
    assert_eq!(names(""), all);
    assert_eq!(names("--device cuda"), all, "a GPU's are in their places");
}

#[test]
fn the_example_adds_a_line_to_fig10() {
    let read =
        |path: &str| Source::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)).unwrap();
    let fig10 = read("configs/fig10.toml");
    let with = fig10.clone().and(read("examples/shortest_first.toml")).unwrap();
    for arguments in ["", "--quick", "--device cuda", "--only shortest_first"] {
        let cli = format!("experiment fig10.toml {arguments}");
        let run = Cli::try_parse_from(cli.split_whitespace()).unwrap().run;
        let settings = Settings::resolve(&with, &run).unwrap_or_else(|e| panic!("{arguments}: {e}"));
        let names: Vec<&str> = settings.systems.iter().map(|system| &*system.name).collect();
        let own = ["prefill_first", "largest", "large", "small", "smallest", "shortest_first"];
        assert_eq!(names, own, "{arguments}");
    }
    assert_eq!(with.text(), format!("{}{}", fig10.text(), read("examples/shortest_first.toml").text()));
}

/// Above the first table: claims have a `needs` of their own.
fn needs_a_gpu(text: &str) -> bool {
    text.lines().take_while(|line| !line.starts_with('[')).any(|line| line == "needs = \"cuda\"")
}

/// With a `cargo` that writes down what it is asked for and does nothing.
#[cfg(unix)]
#[test]
fn all_figures_of_a_machine_are_those_that_need_no_other() {
    use std::os::unix::fs::PermissionsExt;

    let temp = tempfile::tempdir().unwrap();
    let (cargo, asked) = (temp.path().join("cargo"), temp.path().join("asked"));
    std::fs::write(&cargo, "#!/bin/sh\necho \"$@\" >> \"$ASKED\"\n").unwrap();
    std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", temp.path().display(), std::env::var("PATH").unwrap());
    let figures = |arguments: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/figures");
        std::fs::write(&asked, "").unwrap();
        let mut command = std::process::Command::new("bash");
        command.arg(script).args(arguments).env("PATH", &path).env("ASKED", &asked);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let asked = std::fs::read_to_string(&asked).unwrap();
        assert!(asked.starts_with("build ") && asked.contains("\nrun "), "{asked}");
        // Before ` -- `: what follows is the program's.
        let with =
            |line: &str| line.split(" -- ").next().unwrap().contains("--features quire-experiments/cuda");
        let on_gpu = asked.lines().filter(|line| with(line)).count();
        assert!(
            [0, asked.lines().count()].contains(&on_gpu),
            "some are built otherwise than others: {asked}"
        );
        (String::from_utf8(output.stdout).unwrap(), on_gpu > 0)
    };
    for arguments in [&[][..], &["--device", "cpu"], &["--quick"]] {
        let (here, on_gpu) = figures(arguments);
        assert!(!on_gpu, "no GPU was asked for");
        assert!(here.ends_with("Left out, since they need --device cuda: fig3-1b\n"), "{here}");
        assert!(here.contains("== fig8\n") && here.contains("== table1\n"), "{here}");
        assert!(!here.contains("-servers"), "they are no figure: {here}");
    }
    for arguments in [&["--device", "cuda"][..], &["--quick", "--device=cuda"]] {
        let (there, on_gpu) = figures(arguments);
        assert!(on_gpu, "a program without the feature refuses {arguments:?}");
        assert!(there.contains("== fig3-1b\n") && !there.contains("Left out"), "{there}");
    }
}

/// `scripts/figures` ran fig3-1b for an hour on a CPU.
#[test]
fn what_is_for_a_gpu_is_refused_elsewhere() {
    assert!(!needs_a_gpu(&shipped()));
    for name in ["fig3-1b", "online-1b", "online-8b"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        assert!(needs_a_gpu(&text), "{name}");
        for arguments in ["", "--quick", "--full"] {
            let error = resolve(&text, arguments).unwrap_err().to_string();
            assert!(error.contains("is for --device cuda"), "{name} {arguments}: {error}");
            assert!(error.contains("needs = \"cuda\""), "with its line: {error}");
        }
    }
    let elsewhere = format!("needs = \"cpu\"\n{}", shipped());
    assert!(resolve(&elsewhere, "").is_ok());
    assert!(resolve(&elsewhere, "--device cuda").unwrap_err().to_string().contains("is for --device cpu"));
    let (before, _) = elsewhere.split_once("[cuda]").unwrap();
    let (_, panels) = elsewhere.split_once("[[panel]]").unwrap();
    let bare = format!("{}[[panel]]{panels}", before.replace("\"cpu\"", "\"cuda\""));
    assert!(resolve(&bare, "").unwrap_err().to_string().contains("there is no [cuda] table"));
}

/// Runs that began before figures had kinds and claims go on under the same settings.
#[test]
fn the_settings_of_fig3_are_what_they_were() {
    let full = resolve(&shipped(), "--full --threads 2").unwrap();
    assert_eq!(full.sha256(), "a169d69d4a74774965d6d9a0bbc5cba397ce0ff580a296958d403cd917315eeb");
}

/// Switches came after these runs ended; they are matrices of before still.
#[test]
fn the_settings_of_committed_runs_are_what_they_were() {
    for run in ["fig3-full", "fig10-3", "fig12-3", "fig12-classes"] {
        let path = format!("{}/../results/cpu/{run}/manifest.json", env!("CARGO_MANIFEST_DIR"));
        let manifest: Manifest = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(manifest.settings.sha256(), manifest.settings_sha256, "{run}");
    }
}

#[test]
fn figures_of_the_paper_have_a_variant_for_a_gpu_in_short_cells() {
    let figures =
        ["fig1", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11", "fig12", "table1"];
    for name in figures {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
        let text = std::fs::read_to_string(path).unwrap();
        for arguments in ["", "--device cuda"] {
            let settings = resolve(&text, arguments).unwrap();
            for key in settings.cells() {
                let longest =
                    f64::from(settings.run.requests_at(key.rate)) / key.rate + settings.run.drain_limit_s;
                assert!(longest < 115.0, "{name} {arguments}: {key} takes {longest} s");
            }
        }
        let claims = text.matches("[[claim]]").count();
        assert!(claims >= 2, "{name} has {claims} claims");
    }
}

#[test]
fn a_figures_default_run_takes_five_minutes_at_most() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut judged = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if !(name.starts_with("fig") || name == "table1") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let is_served = !text.contains("kind = \"traces\"") && !text.contains("kind = \"micro\"");
        if !is_served || needs_a_gpu(&text) {
            continue;
        }
        // What --dry-run says counts rates that are left out once a system is overloaded. In fig3 these are many, and more minutes
        // than it runs: in results/cpu/fig3 16 of its 42 cells were left out, and the others took 257 s.
        let most = if name == "fig3" { 360.0 } else { 300.0 };
        let settings = resolve(&text, "").unwrap();
        let estimate = Experiment::new(Source::new(name.clone(), text), settings, Vec::new()).expected_s();
        assert!(
            estimate <= most,
            "{name} takes about {estimate:.0} s while systems keep up, more than {most}"
        );
        judged += 1;
    }
    assert!(judged >= 12, "{judged} figures");
}

#[test]
fn fig12_turns_off_what_its_labels_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/fig12.toml");
    let text = std::fs::read_to_string(path).unwrap();
    for arguments in ["", "--device cuda"] {
        let settings = resolve(&text, arguments).unwrap();
        let serve = |system: &SystemEntry| serde_json::to_value(&system.serve).unwrap();
        let all = serve(&settings.systems[0]);
        let changed = settings.systems[1..].iter().map(|system| {
            let own = serve(system);
            let keys = ["scheduler", "kv", "share_blocks", "prefix_cache", "preemption", "speculation"];
            (&*system.name, keys.into_iter().filter(|&key| own.get(key) != all.get(key)).collect())
        });
        let expected: [(&str, Vec<&str>); 8] = [
            ("static", vec!["scheduler", "preemption", "speculation"]),
            ("contiguous", vec!["kv", "prefix_cache"]),
            ("uncached", vec!["prefix_cache"]),
            ("unchunked", vec!["scheduler"]),
            ("recompute", vec!["preemption"]),
            ("no_proposals", vec!["speculation"]),
            ("no_classes", vec!["scheduler"]),
            ("unshared", vec!["share_blocks"]),
        ];
        assert_eq!(changed.collect::<Vec<_>>(), expected);
        let cells = settings.cells();
        let outputs = cells.iter().filter(|cell| cell.panel == "outputs").map(|cell| &*cell.system);
        assert_eq!(outputs.collect::<Vec<_>>(), ["all", "unshared"], "elsewhere there is nothing to share");
        assert_eq!(cells.len(), 2 * 8 + 2);
        let unchunked = settings.systems.iter().find(|system| system.name == "unchunked").unwrap();
        let mut policy = serve(unchunked)["scheduler"]["policy"].take();
        assert_eq!(policy.as_object_mut().unwrap().remove("chunked"), Some(false.into()));
        assert_eq!(policy, all["scheduler"]["policy"], "chunks alone");
        // A token's K and V are larger there, and so is the KV memory.
        assert_eq!(all["preemption"]["bytes"], if arguments.is_empty() { 94_371_840_u64 } else { 4 << 30 });
    }
}

#[test]
fn systems_run_in_the_panels_that_they_name() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/fig12.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let with = |panels: &str| resolve(&text.replacen("panels = [\"outputs\"]", panels, 1), "");
    assert_eq!(with("").unwrap().cells().len(), 2 * 8 + 2 + 2);
    let selected = |arguments: &str| resolve(&text, arguments);
    let chosen = selected("--only all/outputs --only unshared").unwrap();
    assert_eq!(chosen.selected_panels().map(|panel| &*panel.name).collect::<Vec<_>>(), ["outputs"]);
    let error = selected("--only unshared/light").unwrap_err().to_string();
    assert!(error.contains("--only: `unshared` does not run in panel `light`"), "{error}");
    let all =
        text.replacen("label = \"Everything on\"", "label = \"Everything on\"\npanels = [\"light\"]", 1);
    let error = resolve(&all, "").unwrap_err().to_string();
    assert!(error.contains("it does not run in panel `heavy`"), "{error}");
    for (panels, message) in [
        ("panels = [\"output\"]", "no panel `output`"),
        ("panels = [\"outputs\", \"outputs\"]", "`outputs` is there twice"),
        ("panels = [\"light\"]", "`unshared` does not run in panel `outputs`"),
        ("panels = [\"outputs\"]\nfrom_rate = { light = 1 }", "`panels` leaves `light` out"),
    ] {
        let error = with(panels).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn fig3_has_what_the_figure_needs() {
    let default = resolve(&shipped(), "").unwrap();
    assert!(default.run.requests >= Some(60) && default.run.repeats == 1);
    assert_eq!(default.systems.len(), 6);
    let full = resolve(&shipped(), "--full").unwrap();
    assert!(full.run.requests >= Some(300) && full.run.repeats >= 5);
    assert_eq!(resolve(&shipped(), "--repeats 3").unwrap().run.repeats, 3);
    assert_eq!(full.profile, Profile::Full);
    assert_ne!(full.sha256(), default.sha256());
}

#[test]
fn fig3_has_transformers_in_the_place_of_the_naive_server_on_a_gpu() {
    let gpu = resolve(&shipped(), "--device cuda").unwrap();
    let names: Vec<&str> = gpu.systems.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["static", "max", "pow2", "oracle", "paged", "hf_static", "hf_continuous"]);
    let cells = gpu.cells();
    let rates = |system: &str| -> Vec<f64> {
        cells.iter().filter(|c| c.panel == "decode" && c.system == system).map(|c| c.rate).collect()
    };
    assert_eq!(rates("paged"), [4.0, 8.0, 14.0, 20.0, 26.0]);
    assert_eq!(rates("hf_static"), [0.25, 1.0, 4.0, 8.0, 14.0, 20.0, 26.0]);
    assert!(!gpu.has_equal_tokens() && resolve(&shipped(), "").unwrap().has_equal_tokens());
    assert_eq!(gpu.run.requests_at(0.25), 10);
}

#[test]
fn transformers_computes_where_and_how_it_is_told() {
    let with = |lines: &str| {
        let text = shipped();
        let at = text.find("batching = { kind = \"continuous\"").unwrap();
        resolve(&format!("{}{lines}\n{}", &text[..at], &text[at..]), "--device cuda")
    };
    let settings = with("python = \"/some/folder/python\"\ndevice = \"cuda\"\ndtype = \"bfloat16\"").unwrap();
    let serve = serde_json::to_value(&settings.systems.last().unwrap().serve).unwrap();
    assert_eq!((&serve["device"], &serve["dtype"]), (&"cuda".into(), &"bfloat16".into()));
    assert_eq!(serve["batching"]["block_size"], 16);
    let error = with("dtype = \"bf16\"").unwrap_err().to_string();
    assert!(error.contains("`bfloat16`") && error.contains("dtype = \"bf16\""), "{error}");
    assert!(with("batch_size = 8").unwrap_err().to_string().contains("unknown field"));
}

/// The entry that a reader is told to take the signs of comments from.
#[test]
fn the_server_that_table1_describes_is_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/table1.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let (before, rest) = text.split_once("# [[system]]\n").unwrap();
    let (entry, after) = rest.split_once("\n\n").unwrap();
    let entry: String =
        entry.lines().map(|line| line.strip_prefix("# ").unwrap().to_owned() + "\n").collect();
    let with = |from: &str, to: &str| {
        assert!(entry.contains(from), "{from}");
        resolve(&format!("{before}[[system]]\n{}\n{after}", entry.replacen(from, to, 1)), "")
    };
    let settings = with("", "").unwrap();
    let serve = serde_json::to_value(&settings.systems[3].serve).unwrap();
    assert_eq!((&serve["kind"], &serve["counting"]), (&"openai".into(), &"token_ids".into()));
    assert_eq!(serve["api_key_env"], "OPENAI_API_KEY", "the variable's name, and never what it holds");
    let refused = |from: &str, to: &str, part: &str| {
        let error = with(from, to).unwrap_err().to_string();
        assert!(error.contains(part), "{part} is missing in: {error}");
    };
    refused("http://", "https://", "TLS is not spoken here");
    refused("8000/v1", "8000", "no path");
    refused("max_connections = 256", "max_connections = 0", "`max_connections` must be 1 to");
    refused("max_connections = 256", "silence_timeout_s = -1.0", "`silence_timeout_s`");
    refused("max_connections = 256", "connect_timeout_s = 0.0", "`connect_timeout_s`");
    refused("token_ids", "token_idz", "did you mean `token_ids`?");
    let talks =
        "arrivals = { kind = \"poisson\" }\nconversations = { turns = { kind = \"fixed\", turns = 2 } }";
    let of = |counting: &str| {
        let panel = before.replacen("arrivals = { kind = \"poisson\" }", talks, 1);
        assert!(panel != before);
        let entry = entry.replacen("token_ids", counting, 1);
        resolve(&format!("{panel}[[system]]\n{entry}\n{after}"), "")
    };
    of("token_ids").unwrap();
    assert!(of("usage").unwrap_err().to_string().contains("go on with the tokens of the answers"));
    refused("ignore_eos = true", "api_key = \"secret\" #", "unknown field");
    refused("ignore_eos = true ", "# ", "missing field `ignore_eos`");
}

#[test]
fn a_selection_keeps_what_it_names() {
    let settings = resolve(&shipped(), "--only paged/decode --only naive").unwrap();
    assert_eq!(settings.selected_systems().map(|s| &*s.name).collect::<Vec<_>>(), ["naive", "paged"]);
    assert!(settings.selects("naive", "conversation") && !settings.selects("paged", "conversation"));
    let error = resolve(&shipped(), "--only pagde").unwrap_err().to_string();
    assert!(error.contains("`paged`"), "it lists what there is: {error}");
}

#[test]
fn a_trace_takes_the_place_of_its_statistics() {
    let settings = resolve(&shipped(), "--trace some/conv.csv").unwrap();
    let text = serde_json::to_string(&settings.panels[0]).unwrap();
    assert!(text.contains("conv.csv"), "{text}");
    assert!(!serde_json::to_string(&settings.panels[1]).unwrap().contains("conv.csv"));
    assert_eq!(resolve(&shipped(), "--trace conversation=some/conv.csv").unwrap(), settings);
    let error = resolve(&shipped(), "--trace decode=some/conv.csv").unwrap_err().to_string();
    assert!(error.contains("no panel `decode` with `replay = true`"), "{error}");
}
