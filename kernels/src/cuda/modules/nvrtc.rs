//! NVRTC, NVIDIA's compiler as a library. It needs no GPU.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::{result, sys};

use super::HEADERS;
use crate::KernelError;
use crate::cuda::ActivationDtype;

/// Whether the library is found. Nothing else here may be called where it is not.
pub(super) fn is_there() -> bool {
    // SAFETY: tries to open a shared library by its known names.
    unsafe { sys::is_culib_present() }
}

/// The compiler's major and minor version.
pub(super) fn version() -> Result<[i32; 2], KernelError> {
    let [mut major, mut minor] = [0; 2];
    // SAFETY: writes two numbers.
    let asked = unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    asked.result().map_err(|e| KernelError::Device(format!("NVRTC cannot be used: {e:?}")))?;
    Ok([major, minor])
}

/// What a source is compiled for, by compute capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code of a card.
    Card((i32, i32)),
    /// PTX, for any card from that one on.
    Ptx((i32, i32)),
}

/// What to compile for a card of this compute capability: its machine code, or of what it runs too where this NVRTC is older than
/// such cards.
pub(super) fn target(capability: (i32, i32)) -> Result<Target, KernelError> {
    let failed = |e: sys::nvrtcResult| KernelError::Device(format!("NVRTC cannot be used: {e:?}"));
    let mut count = 0;
    // SAFETY: writes one number.
    let asked = unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) };
    asked.result().map_err(|e| failed(e.0))?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: writes as many numbers as it said there are.
    let asked = unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) };
    asked.result().map_err(|e| failed(e.0))?;
    Ok(target_among(&known, capability))
}

fn target_among(known: &[i32], capability: (i32, i32)) -> Target {
    match capability {
        (major, minor) if known.contains(&(10 * major + minor)) => Target::Card(capability),
        (8, _) => Target::Card((8, 0)),
        _ => Target::Ptx((9, 0)),
    }
}

/// What a source is compiled with.
pub(super) fn options(target: Target, activations: ActivationDtype) -> Vec<String> {
    let architecture = match target {
        // The matrix instructions of Hopper are its own.
        Target::Card((9, 0)) => "sm_90a".into(),
        Target::Card((major, minor)) => format!("sm_{major}{minor}"),
        Target::Ptx((major, minor)) => format!("compute_{major}{minor}"),
    };
    let mut options = vec!["-std=c++17".to_string(), format!("--gpu-architecture={architecture}")];
    options.extend(activations.compiler_option().map(String::from));
    options
}

/// Compiles a source for what `options` say, to a cubin or to PTX.
///
/// # Errors
/// [`KernelError::Device`], with the compiler's log where it has one.
pub(super) fn compile(name: &str, source: &str, options: &[String]) -> Result<Vec<u8>, KernelError> {
    let failed = |what: String| KernelError::Device(format!("NVRTC cannot compile {name}: {what}"));
    let text = |text: &str| CString::new(text).expect("sources have no zero bytes");
    let headers: Vec<(CString, CString)> =
        HEADERS.iter().map(|(name, body)| (text(name), text(body))).collect();
    let names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
    let bodies: Vec<*const c_char> = headers.iter().map(|(_, body)| body.as_ptr()).collect();
    let (source, file) = (text(source), text(name));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings live until the call returns; the counts are those of the arrays.
    unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            source.as_ptr(),
            file.as_ptr(),
            headers.len() as i32,
            bodies.as_ptr(),
            names.as_ptr(),
        )
    }
    .result()
    .map_err(|e| failed(format!("{e:?}")))?;
    // SAFETY: the program was created above and is destroyed here, once.
    unsafe {
        let image = match result::compile_program(program, options) {
            Ok(()) => code(program).map_err(|e| failed(format!("{e:?}"))),
            Err(error) => Err(failed(log(program).unwrap_or_else(|| format!("{error:?}")))),
        };
        let _ = result::destroy_program(program);
        image
    }
}

/// # Safety
/// `program` is a compiled program.
unsafe fn code(program: sys::nvrtcProgram) -> Result<Vec<u8>, result::NvrtcError> {
    let mut size = 0;
    // SAFETY: by this function's contract.
    unsafe { sys::nvrtcGetCUBINSize(program, &raw mut size) }.result()?;
    // There is none of a virtual architecture: its PTX, with a zero at its end.
    let is_ptx = size == 0;
    if is_ptx {
        // SAFETY: as above.
        unsafe { sys::nvrtcGetPTXSize(program, &raw mut size) }.result()?;
    }
    let mut image = vec![0u8; size];
    let into = image.as_mut_ptr().cast();
    // SAFETY: as above; the buffer has the size just asked for.
    unsafe {
        match is_ptx {
            true => sys::nvrtcGetPTX(program, into),
            false => sys::nvrtcGetCUBIN(program, into),
        }
    }
    .result()?;
    Ok(image)
}

/// # Safety
/// `program` is a program.
unsafe fn log(program: sys::nvrtcProgram) -> Option<String> {
    // SAFETY: by this function's contract.
    let log = unsafe { result::get_program_log(program) }.ok()?;
    let bytes: Vec<u8> = log.into_iter().map(|c| c as u8).collect();
    let text = CStr::from_bytes_until_nul(&bytes).ok()?;
    Some(text.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::Instant;

    use super::super::SOURCES;
    use super::{Target, compile, is_there, options, target, target_among, version};
    use crate::cuda::ActivationDtype;

    /// Ampere, and Hopper with instructions of its own: each kind of card and of activations once. All four pairs would take
    /// twice as long, and find little more.
    const TARGETS: [(Target, ActivationDtype); 2] =
        [(Target::Card((9, 0)), ActivationDtype::Bf16), (Target::Card((8, 0)), ActivationDtype::F16)];

    /// What a card without kernels of the build's compiler needs at its first start.
    #[test]
    #[ignore = "needs NVRTC on the library path: LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib"]
    fn nvrtc_compiles_every_kernel() {
        assert!(is_there(), "NVRTC (libnvrtc) is not found: set LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib");
        let started = Instant::now();
        let jobs = TARGETS.into_iter().flat_map(|target| SOURCES.map(|source| (source, target)));
        let jobs = Mutex::new(jobs);
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    loop {
                        let job = jobs.lock().unwrap().next();
                        let Some(((name, source), (target, activations))) = job else { break };
                        let options = options(target, activations);
                        let began = Instant::now();
                        let image = compile(name, source, &options);
                        let image = image.unwrap_or_else(|error| panic!("{options:?}: {error}"));
                        assert!(image.starts_with(b"\x7fELF"), "{name} {options:?}: no cubin");
                        println!("{name} {options:?}: {:.1} s", began.elapsed().as_secs_f64());
                    }
                });
            }
        });
        println!("NVRTC {:?}: {:.0} s", version().unwrap(), started.elapsed().as_secs_f64());
    }

    #[test]
    fn a_card_newer_than_nvrtc_gets_what_it_runs_too() {
        let known = [80, 86, 89, 90, 100, 120];
        for (capability, expected) in [
            ((9, 0), Target::Card((9, 0))),
            ((8, 6), Target::Card((8, 6))),
            ((8, 7), Target::Card((8, 0))),
            ((12, 1), Target::Ptx((9, 0))),
        ] {
            assert_eq!(target_among(&known, capability), expected);
        }
    }

    /// What a card in the guise of another runs.
    #[test]
    #[ignore = "needs NVRTC on the library path: LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib"]
    fn ptx_is_for_the_card_that_is_asked_for() {
        assert!(is_there(), "NVRTC (libnvrtc) is not found: set LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib");
        assert_eq!(target((9, 0)).unwrap(), Target::Card((9, 0)));
        assert_eq!(target((99, 0)).unwrap(), Target::Ptx((9, 0)));
        let (name, source) = SOURCES.into_iter().find(|(name, _)| *name == "ops.cu").unwrap();
        for (capability, target) in [((8, 0), ".target sm_80"), ((9, 0), ".target sm_90")] {
            let image =
                compile(name, source, &options(Target::Ptx(capability), ActivationDtype::Bf16)).unwrap();
            let text = String::from_utf8(image).unwrap();
            assert!(text.contains(target) && text.ends_with('\0'), "{capability:?}");
        }
    }

    #[test]
    #[ignore = "needs NVRTC on the library path: LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib"]
    fn a_source_that_does_not_compile_is_named_with_the_log() {
        assert!(is_there(), "NVRTC (libnvrtc) is not found: set LD_LIBRARY_PATH=$(scripts/get-nvcc)/lib");
        let options = options(Target::Card((8, 0)), ActivationDtype::Bf16);
        let error = compile("broken.cu", "int nonsense(", &options).unwrap_err().to_string();
        assert!(error.contains("NVRTC cannot compile broken.cu") && error.contains("expected"), "{error}");
    }
}
