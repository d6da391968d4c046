//! Every target over its corpus and over seeded mutations of it: fuzzing's little brother, for every test run.

use std::fs;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// Mutations of each corpus entry.
const MUTATIONS: usize = 5000;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(target);
    let mut entries: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.expect("a readable folder").path())
        .map(|path| (path.clone(), fs::read(&path).expect("a readable file")))
        .collect();
    entries.sort();
    assert!(!entries.is_empty(), "{} is empty", folder.display());
    entries
}

/// Flips, overwrites, cuts, repeats or inserts extreme numbers, a few times over.
fn mutate(bytes: &[u8], rng: &mut impl Rng) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..5) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes.truncate(at),
            3 => {
                let end = (at + rng.random_range(1..64)).min(bytes.len());
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let extreme: u64 = [u64::MAX, 1 << 63, u64::from(u32::MAX), 1 << 40][rng.random_range(0..4)];
                for (target, byte) in bytes[at..].iter_mut().zip(extreme.to_le_bytes()) {
                    *target = byte;
                }
            }
        }
    }
    bytes
}

fn run(target: &str, seed: u64, function: fn(&[u8])) {
    let mut rng = StdRng::seed_from_u64(seed);
    for (path, bytes) in corpus(target) {
        function(&bytes);
        for index in 0..MUTATIONS {
            let mutated = mutate(&bytes, &mut rng);
            let outcome = std::panic::catch_unwind(|| function(&mutated));
            assert!(outcome.is_ok(), "{}: mutation {index} of seed {seed} panics", path.display());
        }
    }
}

#[test]
fn gguf() {
    run("gguf", 1, quire_fuzz_targets::gguf);
}

#[test]
fn safetensors() {
    run("safetensors", 2, quire_fuzz_targets::safetensors);
}

#[test]
fn config() {
    run("config", 3, quire_fuzz_targets::config);
}

#[test]
fn trace() {
    run("trace", 4, quire_fuzz_targets::trace);
}

/// Mutations reach deep only when they start from something that is accepted.
#[test]
fn the_well_formed_entries_are_accepted() {
    use quire_engine::load::{
        GgufHeader, SafetensorsHeader, config_from_gguf, config_from_json, tokenizer_from_gguf,
    };
    use quire_experiments::config::{Config, Source};
    use quire_workloads::trace::{ReadOptions, Trace};

    let entry = |target: &str, name: &str| {
        let mut entries = corpus(target).into_iter();
        entries.find(|(path, _)| path.ends_with(name)).unwrap_or_else(|| panic!("no {target}/{name}")).1
    };
    let gguf = entry("gguf", "tiny");
    let header = GgufHeader::parse(&gguf, "tiny".as_ref()).expect("a GGUF header");
    config_from_gguf(&header, &gguf).expect("a model configuration");
    tokenizer_from_gguf(&header, &gguf).expect("a tokenizer");
    SafetensorsHeader::parse(&entry("safetensors", "two"), "two".as_ref()).expect("a safetensors header");
    config_from_json(&entry("safetensors", "config.json")).expect("a config.json");
    let text = String::from_utf8(entry("config", "fig3")).expect("UTF-8");
    Source::new("fig3", text).parse::<Config>().expect("a configuration");
    for name in ["azure-2023", "azure-2024", "burstgpt", "mooncake", "sharegpt"] {
        let trace = Trace::parse(&entry("trace", name), name, &ReadOptions::default());
        assert!(!trace.expect(name).requests.is_empty(), "{name}");
    }
}
