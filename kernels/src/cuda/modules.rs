//! The kernels' machine code: compiled with the crate where nvcc was found, else by NVRTC and kept on disk.

mod nvrtc;

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaModule};
use cudarc::nvrtc::Ptx;
use sha2::{Digest, Sha256};

use self::nvrtc::Target;
use super::activations::ActivationDtype;
use super::device::Captures;
use super::libraries;
use super::out_of_memory::{OTHERS, if_full};
use crate::KernelError;

/// Files that are compiled, and those that they include.
const SOURCES: [(&str, &str); 13] = [
    ("ops.cu", include_str!("../../cuda/ops.cu")),
    ("skinny.cu", include_str!("../../cuda/skinny.cu")),
    ("sampling.cu", include_str!("../../cuda/sampling.cu")),
    ("dummy.cu", include_str!("../../cuda/dummy.cu")),
    ("attention_decode_bf16.cu", include_str!("../../cuda/attention_decode_bf16.cu")),
    ("attention_decode_f16.cu", include_str!("../../cuda/attention_decode_f16.cu")),
    ("attention_decode_fp8.cu", include_str!("../../cuda/attention_decode_fp8.cu")),
    ("attention_prefill_bf16.cu", include_str!("../../cuda/attention_prefill_bf16.cu")),
    ("attention_prefill_f16.cu", include_str!("../../cuda/attention_prefill_f16.cu")),
    ("attention_prefill_fp8.cu", include_str!("../../cuda/attention_prefill_fp8.cu")),
    ("attention_prefill_hopper_bf16.cu", include_str!("../../cuda/attention_prefill_hopper_bf16.cu")),
    ("attention_prefill_hopper_f16.cu", include_str!("../../cuda/attention_prefill_hopper_f16.cu")),
    ("attention_prefill_hopper_fp8.cu", include_str!("../../cuda/attention_prefill_hopper_fp8.cu")),
];
const HEADERS: [(&str, &str); 15] = [
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("barriers.cuh", include_str!("../../cuda/barriers.cuh")),
    ("attention.cuh", include_str!("../../cuda/attention.cuh")),
    ("attention_decode.cuh", include_str!("../../cuda/attention_decode.cuh")),
    ("attention_prefill.cuh", include_str!("../../cuda/attention_prefill.cuh")),
    ("attention_prefill_hopper.cuh", include_str!("../../cuda/attention_prefill_hopper.cuh")),
    ("attention_prefill_hopper_layout.cuh", include_str!("../../cuda/attention_prefill_hopper_layout.cuh")),
    ("attention_prefill_hopper_wgmma.cuh", include_str!("../../cuda/attention_prefill_hopper_wgmma.cuh")),
    ("attention_prefill_hopper_copy.cuh", include_str!("../../cuda/attention_prefill_hopper_copy.cuh")),
    ("attention_prefill_hopper_compute.cuh", include_str!("../../cuda/attention_prefill_hopper_compute.cuh")),
    ("sampling_logits.cuh", include_str!("../../cuda/sampling_logits.cuh")),
    ("sampling_search.cuh", include_str!("../../cuda/sampling_search.cuh")),
    ("sampling_top.cuh", include_str!("../../cuda/sampling_top.cuh")),
    ("skinny_results.cuh", include_str!("../../cuda/skinny_results.cuh")),
    ("skinny_transfers.cuh", include_str!("../../cuda/skinny_transfers.cuh")),
];

// `BUILT: &[(&'static str, &'static str, &[u8])]`: file name, type of activations ("any" for a source that touches none)
// and fat binary of each source, or nothing where the build found no nvcc.
include!(concat!(env!("OUT_DIR"), "/built_kernels.rs"));

/// The loaded modules by their sources' names.
pub(super) type Modules = HashMap<&'static str, Arc<CudaModule>>;

/// The source that has a kernel of this name.
pub(super) fn source_of(kernel: &str) -> &'static str {
    let prefixes = [
        ("attention_decode_bf16", "attention_decode_bf16.cu"),
        ("attention_decode_f16", "attention_decode_f16.cu"),
        ("attention_decode_fp8", "attention_decode_fp8.cu"),
        ("attention_prefill_hopper_bf16", "attention_prefill_hopper_bf16.cu"),
        ("attention_prefill_hopper_f16", "attention_prefill_hopper_f16.cu"),
        ("attention_prefill_hopper_fp8", "attention_prefill_hopper_fp8.cu"),
        ("attention_prefill_bf16", "attention_prefill_bf16.cu"),
        ("attention_prefill_f16", "attention_prefill_f16.cu"),
        ("attention_prefill_fp8", "attention_prefill_fp8.cu"),
        ("sample", "sampling.cu"),
        ("skinny", "skinny.cu"),
        ("fill_normal", "dummy.cu"),
    ];
    prefixes.into_iter().find(|(prefix, _)| kernel.starts_with(prefix)).map_or("ops.cu", |(_, source)| source)
}

/// The kernels for activations of this type on GPU number `ordinal`, of this compute capability. With `ptx` they are PTX for
/// that one instead, which the driver translates.
///
/// They are loaded once in a process and stay, with a context of their own, whatever models come and go.
pub(super) fn on(
    ordinal: usize,
    captures: Captures,
    capability: (i32, i32),
    ptx: Option<(i32, i32)>,
    activations: ActivationDtype,
) -> Result<Arc<Modules>, KernelError> {
    type Key = (usize, ActivationDtype, Option<(i32, i32)>);
    static LOADED: Mutex<Option<HashMap<Key, Arc<Modules>>>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    if let Some(modules) = loaded.get(&(ordinal, activations, ptx)) {
        return Ok(modules.clone());
    }
    let held_off = captures.hold_off();
    let context = CudaContext::new(ordinal).map_err(|e| {
        KernelError::Device(format!("GPU {ordinal} cannot be opened: {e}{}", if_full(&e, OTHERS)))
    })?;
    drop(held_off);
    let modules = Arc::new(load(&context, captures, capability, ptx, activations)?);
    loaded.insert((ordinal, activations, ptx), modules.clone());
    Ok(modules)
}

fn load(
    context: &Arc<CudaContext>,
    captures: Captures,
    capability: (i32, i32),
    ptx: Option<(i32, i32)>,
    activations: ActivationDtype,
) -> Result<Modules, KernelError> {
    let load = |name: &'static str, image: Vec<u8>| {
        let held_off = captures.hold_off();
        let module = context.load_module(Ptx::from_binary(image));
        drop(held_off);
        let module = module.map_err(|e| {
            let driver = libraries::driver_version().map(libraries::version_text).unwrap_or_default();
            KernelError::Device(format!(
                "the kernels of {name} cannot be loaded: {e} (the driver is for CUDA {driver}){}",
                if_full(&e, OTHERS)
            ))
        });
        Ok((name, module?))
    };
    if !BUILT.is_empty() && ptx.is_none() {
        let wanted = BUILT.iter().filter(|(_, held, _)| [activations.name(), "any"].contains(held));
        return wanted.map(|(name, _, image)| load(name, image.to_vec())).collect();
    }
    if !nvrtc::is_there() {
        let why = match ptx {
            Some(_) => "a card in the guise of another has its kernels compiled when it is opened",
            None => "the kernels were not compiled with this program (no nvcc was found)",
        };
        return Err(KernelError::Device(format!(
            "{why}, and NVRTC (libnvrtc) is not found: install the CUDA libraries of the driver's version{}",
            if ptx.is_none() { ", or build with nvcc on the path" } else { "" }
        )));
    }
    let target = ptx.map(|code| Ok(Target::Ptx(code))).unwrap_or_else(|| nvrtc::target(capability))?;
    let options = nvrtc::options(target, activations);
    let version = nvrtc::version()?;
    let whole = |name: &'static str, image: Vec<u8>| {
        // PTX is text that the driver reads up to its zero.
        if matches!(target, Target::Ptx(_)) && image.last() != Some(&0) {
            return Err(KernelError::Device(format!("the kernels of {name} are not whole")));
        }
        load(name, image)
    };
    let sources = SOURCES.iter().map(|&(name, source)| {
        let file = cache_folder().map(|folder| folder.join(cubin_name(name, source, &options, version)));
        from_cache(file.as_deref(), |image| whole(name, image), || nvrtc::compile(name, source, &options))
    });
    sources.collect()
}

/// The name under which a source's machine code is kept: another for whatever it is made from or by.
fn cubin_name(name: &str, source: &str, options: &[String], [major, minor]: [i32; 2]) -> String {
    let mut hash = Sha256::new();
    for text in HEADERS.iter().map(|(_, text)| *text).chain([source]) {
        hash.update(text.as_bytes());
    }
    hash.update(options.join(" "));
    hash.update(format!(" NVRTC {major}.{minor}"));
    let key: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("{name}.{key}.cubin")
}

/// Loads the image that `file` holds; where there is none, or one that does not load, a new one, which is then kept.
fn from_cache<T>(
    file: Option<&Path>,
    load: impl Fn(Vec<u8>) -> Result<T, KernelError>,
    compile: impl FnOnce() -> Result<Vec<u8>, KernelError>,
) -> Result<T, KernelError> {
    let kept = file.and_then(|file| std::fs::read(file).ok()).filter(|image| !image.is_empty());
    let mut broken = None;
    if let (Some(file), Some(image)) = (file, kept) {
        match load(image) {
            Ok(loaded) => return Ok(loaded),
            Err(_) => {
                let _ = std::fs::remove_file(file);
                broken = Some(file);
            }
        }
    }
    let loaded = compile().and_then(|image| Ok((load(image.clone())?, image)));
    let (loaded, image) = loaded.map_err(|error| match broken {
        Some(file) => KernelError::Device(format!("{error}; nor could what was kept in {}", file.display())),
        None => error,
    })?;
    // A cache that cannot be written costs the next start some seconds, and nothing else.
    let _ = file.map(|file| keep(file, &image));
    Ok(loaded)
}

/// Writes a file that other processes may read and write too: they see all of it or nothing, after a power cut as well.
fn keep(file: &Path, image: &[u8]) -> std::io::Result<()> {
    file.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    let random = RandomState::new().build_hasher().finish();
    let partial = file.with_extension(format!("{random:016x}.partial"));
    let mut written = File::create_new(&partial)?;
    let kept = written
        .write_all(image)
        .and_then(|()| written.sync_all())
        .and_then(|()| std::fs::rename(&partial, file));
    if kept.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    kept
}

/// Where what is costly to find out is kept from one start to the next.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("quire").join("kernels"))
}

/// Text of a header that kernels include.
#[cfg(test)]
pub(super) fn included(source: &str) -> Vec<(&str, Option<&'static str>)> {
    let names = source.lines().filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    let text = |name| HEADERS.iter().find(|header| header.0 == name).map(|header| header.1);
    names.map(|name| (name, text(name))).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::{HEADERS, KernelError, SOURCES, cubin_name, from_cache, included, keep};

    /// NVRTC has no folder to look in.
    #[test]
    fn headers_that_are_included_are_compiled_in() {
        for (file, text) in SOURCES.iter().chain(&HEADERS) {
            for (name, header) in included(text) {
                assert!(header.is_some(), "{file} includes {name}, which HEADERS does not name");
            }
        }
    }

    #[test]
    fn a_cubin_is_named_after_all_that_makes_it() {
        let options = |text: &str| vec![text.to_string()];
        let names = [
            cubin_name("a.cu", "a", &options("x"), [13, 0]),
            cubin_name("a.cu", "b", &options("x"), [13, 0]),
            cubin_name("a.cu", "a", &options("y"), [13, 0]),
            cubin_name("a.cu", "a", &options("x"), [13, 1]),
            cubin_name("a.cu", "a", &options("x"), [12, 0]),
        ];
        assert!(
            names.iter().all(|name| names.iter().filter(|other| *other == name).count() == 1),
            "{names:?}"
        );
        assert_eq!(names[0], cubin_name("a.cu", "a", &options("x"), [13, 0]));
    }

    /// Images that begin with `+` load.
    fn load(image: Vec<u8>) -> Result<Vec<u8>, KernelError> {
        match image.first() {
            Some(b'+') => Ok(image),
            _ => Err(KernelError::Device("it does not load".into())),
        }
    }

    #[test]
    fn what_is_kept_is_used_until_it_does_not_load() {
        let folder = std::env::temp_dir().join(format!("quire-cubins-{}", std::process::id()));
        let file = folder.join("a.cu.0.cubin");
        let compiled = RefCell::new(0);
        let get = |image: &'static [u8]| {
            from_cache(Some(&file), load, || {
                *compiled.borrow_mut() += 1;
                Ok(image.to_vec())
            })
        };
        assert_eq!(get(b"+one").unwrap(), b"+one");
        assert_eq!(get(b"+two").unwrap(), b"+one");
        assert_eq!(*compiled.borrow(), 1);
        for broken in [&b"-"[..], b""] {
            std::fs::write(&file, broken).unwrap();
            assert_eq!(get(b"+two").unwrap(), b"+two");
            assert_eq!(std::fs::read(&file).unwrap(), b"+two");
        }
        std::fs::write(&file, b"-").unwrap();
        let error = get(b"-").unwrap_err().to_string();
        assert!(error.contains(file.to_str().unwrap()) && !file.exists(), "{error}");
        // Without a file, and where none can be written.
        assert_eq!(from_cache(None, load, || Ok(b"+".to_vec())).unwrap(), b"+");
        keep(&file, b"+").unwrap();
        assert!(keep(&file.join("below a file"), b"+").is_err());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "no partial file is left");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
