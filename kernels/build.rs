//! With the feature `cuda`: compiles the kernels of `cuda/` where nvcc is found, for Ampere, for Hopper and as PTX for
//! what comes later, each for activations of bfloat16 and of float16. Without nvcc nothing is built in, and NVRTC
//! compiles them at run time.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

const SOURCES: [&str; 12] = [
    "ops.cu",
    "skinny.cu",
    "dummy.cu",
    "attention_decode_bf16.cu",
    "attention_decode_f16.cu",
    "attention_decode_fp8.cu",
    "attention_prefill_bf16.cu",
    "attention_prefill_f16.cu",
    "attention_prefill_fp8.cu",
    "attention_prefill_hopper_bf16.cu",
    "attention_prefill_hopper_f16.cu",
    "attention_prefill_hopper_fp8.cu",
];
/// Those that touch no activations.
const NEUTRAL_SOURCES: [&str; 1] = ["sampling.cu"];
/// Types of activations, and what defines them.
const ACTIVATIONS: [(&str, &[&str]); 2] = [("bf16", &[]), ("f16", &["-DACTIVATIONS_F16"])];
const TARGETS: [&str; 3] = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-env-changed=PATH");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut list = String::from("pub(super) static BUILT: &[(&str, &str, &[u8])] = &[\n");
    if let Some(nvcc) = nvcc() {
        let typed = ACTIVATIONS
            .iter()
            .flat_map(|&(activations, options)| SOURCES.map(|source| (source, activations, options)));
        let neutral = NEUTRAL_SOURCES.map(|source| (source, "any", &[] as &[&str]));
        let jobs: Vec<_> = typed.chain(neutral).collect();
        let binary = |source: &str, activations: &str| {
            out.join(source).with_extension(format!("{activations}.fatbin"))
        };
        // As many at a time as cargo was told to build.
        let workers = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some((source, activations, options)) =
                        jobs.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        compile(&nvcc, source, options, &binary(source, activations));
                    }
                });
            }
        });
        for (source, activations, _) in &jobs {
            let file = binary(source, activations).display().to_string();
            let _ = writeln!(list, "    ({source:?}, {activations:?}, include_bytes!({file:?})),");
        }
    }
    list.push_str("];\n");
    std::fs::write(out.join("built_kernels.rs"), list).expect("OUT_DIR can be written");
}

/// nvcc of `CUDA_HOME`, of the path, or where the toolkit is usually installed.
fn nvcc() -> Option<PathBuf> {
    let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("nvcc")).collect::<Vec<_>>();
    let usual = PathBuf::from("/usr/local/cuda/bin/nvcc");
    home.into_iter().chain(on_path).chain([usual]).find(|file| file.is_file())
}

/// Compiles one source for all targets. ptxas counts registers; a spill it reports is an error, since no kernel here
/// is meant to spill.
fn compile(nvcc: &Path, source: &str, options: &[&str], binary: &Path) {
    let output = Command::new(nvcc)
        .args(["-O3", "-std=c++17", "-fatbin", "-Xptxas", "-v"])
        .args(TARGETS)
        .args(options)
        .arg("-o")
        .arg(binary)
        .arg(Path::new("cuda").join(source))
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => panic!("{} cannot be run: {error}", nvcc.display()),
    };
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "nvcc cannot compile {source} {options:?}:\n{log}");
    for line in log.lines().filter(|line| line.contains("spill stores")) {
        assert!(
            line.contains(" 0 bytes spill stores, 0 bytes spill loads"),
            "{source} {options:?} spills registers:\n{log}"
        );
    }
}
