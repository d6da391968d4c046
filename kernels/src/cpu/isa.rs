//! Instruction sets, chosen at run time.

use crate::KernelError;

/// An instruction set that the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust, any processor.
    Portable,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, DQ, VNNI and BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later). A
    /// processor that lacks one of them runs [`Isa::Avx2`]: the ones with AVX-512 but no VNNI clock down under it,
    /// and gain little.
    Avx512,
    /// 64-bit Arm with NEON. Compiled for that architecture only; tested under emulation, not timed on hardware.
    Neon,
}

impl Isa {
    /// The best one that this machine supports.
    pub fn detect() -> Self {
        [Isa::Avx512, Isa::Avx2, Isa::Neon]
            .into_iter()
            .find(|isa| isa.is_available())
            .unwrap_or(Isa::Portable)
    }

    /// All that this machine supports, slowest first.
    pub fn available() -> Vec<Self> {
        [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512]
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this machine supports it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => has_avx2(),
            Isa::Avx512 => has_avx2() && has_avx512(),
            Isa::Neon => cfg!(target_arch = "aarch64"),
        }
    }

    /// Itself, if this machine supports it.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] if not.
    pub fn require(self) -> Result<Self, KernelError> {
        if self.is_available() { Ok(self) } else { Err(KernelError::Unsupported(self.name())) }
    }

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "AVX2",
            Isa::Avx512 => "AVX-512 (VNNI, BF16)",
            Isa::Neon => "NEON",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("fma") && has!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f")
        && has!("avx512bw")
        && has!("avx512vl")
        && has!("avx512dq")
        && has!("avx512vnni")
        && has!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx512() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_one_is_the_last_available() {
        assert_eq!(Isa::available().last(), Some(&Isa::detect()));
        assert_eq!(Isa::available()[0], Isa::Portable);
    }

    #[test]
    fn one_of_another_architecture_is_refused() {
        let foreign = if cfg!(target_arch = "aarch64") { Isa::Avx2 } else { Isa::Neon };
        let error = foreign.require().expect_err("not of this architecture");
        assert!(error.to_string().contains(foreign.name()));
    }
}
