//! Whether the driver and the libraries are there, and new enough: they are loaded when they are first called, and a missing
//! one, or a missing entry point, would panic there.

use cudarc::driver::sys as driver;

use crate::KernelError;

/// The oldest driver, as it numbers itself (1000 x major + 10 x minor): the bindings time by `cuEventElapsedTime_v2`, which
/// came with CUDA 12.8. All else that is called is older.
const OLDEST_DRIVER: i32 = 12_080;

/// Finds the driver and cuBLASLt.
pub(super) fn require() -> Result<(), KernelError> {
    // SAFETY: tries to open a shared library by its known names.
    if !unsafe { driver::is_culib_present() } {
        return Err(KernelError::Device(
            "there is no NVIDIA driver (libcuda) on this machine: use --device cpu".into(),
        ));
    }
    let version = driver_version()?;
    check_driver(version, None)?;
    // SAFETY: as above.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(KernelError::Device(
            "cuBLASLt (libcublasLt) is not found: install the CUDA libraries of the driver's version or put their folder on the library path"
                .into(),
        ));
    }
    // SAFETY: the library is there, and each of its versions has this function, which takes nothing.
    let cublaslt = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() };
    check_driver(version, Some(cublaslt))
}

/// The CUDA version that the driver is for. Needs no GPU.
pub(super) fn driver_version() -> Result<i32, KernelError> {
    let mut version = 0;
    // SAFETY: every driver has this function, which writes one number.
    let asked = unsafe { driver::cuDriverGetVersion(&raw mut version) };
    asked.result().map_err(|e| KernelError::Device(format!("the NVIDIA driver cannot be used: {e}")))?;
    Ok(version)
}

/// "13.0" of 13000.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// Refuses a driver that lacks entry points, or that is of an earlier major version than cuBLASLt, which NVIDIA does not
/// support.
fn check_driver(version: i32, cublaslt: Option<usize>) -> Result<(), KernelError> {
    let major = cublaslt.map(|version| i32::try_from(version / 10_000).unwrap_or(i32::MAX / 1000));
    let (least, release, why) = match major {
        Some(major) if version < 1000 * major => {
            (1000 * major, if major == 13 { " (580 or later)" } else { "" }, format!("cuBLASLt {major}"))
        }
        _ => (OLDEST_DRIVER, " (570 or later)", "this program".into()),
    };
    if version < least {
        return Err(KernelError::Device(format!(
            "the NVIDIA driver is for CUDA {}, and {why} needs one for CUDA {} or later: install a newer driver{release}",
            version_text(version),
            version_text(least)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{ActivationDtype, Device};
    use super::check_driver;

    #[test]
    fn an_older_driver_is_refused_by_name() {
        let refusal = |driver, cublaslt| check_driver(driver, cublaslt).unwrap_err().to_string();
        assert_eq!(
            refusal(12_040, None),
            "the NVIDIA driver is for CUDA 12.4, and this program needs one for CUDA 12.8 or later: install a newer driver \
             (570 or later)"
        );
        assert_eq!(
            refusal(12_090, Some(130_100)),
            "the NVIDIA driver is for CUDA 12.9, and cuBLASLt 13 needs one for CUDA 13.0 or later: install a newer driver \
             (580 or later)"
        );
        assert!(refusal(12_060, Some(120_803)).contains("12.8 or later"));
        for (driver, cublaslt) in [(12_080, 120_803), (13_000, 120_803), (13_000, 130_002), (13_010, 130_002)]
        {
            check_driver(driver, None).unwrap();
            check_driver(driver, Some(cublaslt)).unwrap();
        }
    }

    /// No machine has a GPU of this number; what else is missing here is said first.
    #[test]
    fn a_gpu_that_is_not_there_is_one_sentence() {
        let error = Device::open(1000, ActivationDtype::Bf16).unwrap_err().to_string();
        let missing = ["libcuda", "NVIDIA driver", "cuBLASLt", "no NVIDIA GPU", "there is no GPU 1000"];
        assert!(missing.iter().any(|what| error.contains(what)), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
