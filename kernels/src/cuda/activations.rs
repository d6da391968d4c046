//! What activations and weights are on a GPU.

use cudarc::cublaslt::sys::cudaDataType_t;
use half::{bf16, f16};

use crate::{KvDtype, WeightFormat};

/// Element type of activations and weights on a GPU. Kernels are compiled for each, and a [`Device`](super::Device) has
/// those of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum ActivationDtype {
    /// bfloat16: the usual choice.
    #[default]
    Bf16,
    /// IEEE half precision: three bits more of mantissa than bfloat16; values beyond 65,504 are held as that.
    F16,
}

impl ActivationDtype {
    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            ActivationDtype::Bf16 => "bf16",
            ActivationDtype::F16 => "f16",
        }
    }

    /// The format of weights that are taken as they lie.
    pub fn weight_format(self) -> WeightFormat {
        match self {
            ActivationDtype::Bf16 => WeightFormat::Bf16,
            ActivationDtype::F16 => WeightFormat::F16,
        }
    }

    /// The KV cache that holds keys and values as they are: some kernels serve it alone.
    pub fn kv(self) -> KvDtype {
        match self {
            ActivationDtype::Bf16 => KvDtype::Bf16,
            ActivationDtype::F16 => KvDtype::F16,
        }
    }

    /// What cuBLASLt calls it.
    pub(super) fn cuda_type(self) -> cudaDataType_t {
        match self {
            ActivationDtype::Bf16 => cudaDataType_t::CUDA_R_16BF,
            ActivationDtype::F16 => cudaDataType_t::CUDA_R_16F,
        }
    }

    /// What defines it where kernels are compiled.
    pub(super) fn compiler_option(self) -> Option<&'static str> {
        match self {
            ActivationDtype::Bf16 => None,
            ActivationDtype::F16 => Some("-DACTIVATIONS_F16"),
        }
    }

    /// The bits of the nearest numbers.
    pub(super) fn rounded(self, values: &[f32]) -> Vec<u16> {
        match self {
            ActivationDtype::Bf16 => values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect(),
            ActivationDtype::F16 => {
                let most = f16::MAX.to_f32();
                values.iter().map(|&x| f16::from_f32(x.clamp(-most, most)).to_bits()).collect()
            }
        }
    }

    /// The numbers of these bits.
    pub(super) fn widened(self, bits: &[u16]) -> Vec<f32> {
        match self {
            ActivationDtype::Bf16 => bits.iter().map(|&x| bf16::from_bits(x).to_f32()).collect(),
            ActivationDtype::F16 => bits.iter().map(|&x| f16::from_bits(x).to_f32()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ActivationDtype::{Bf16, F16};

    #[test]
    fn rounding_is_to_the_nearest_finite_number() {
        // Of halves one is there between 1 and the next bfloat16.
        let between = 1.0 + 2f32.powi(-9);
        let values = [1.0, between, -0.5, 7e4, f32::NEG_INFINITY, f32::NAN];
        let half = F16.widened(&F16.rounded(&values));
        assert_eq!(half[..5], [1.0, between, -0.5, 65504.0, -65504.0]);
        let bfloat = Bf16.widened(&Bf16.rounded(&values));
        assert_eq!(bfloat[..5], [1.0, 1.0, -0.5, 70144.0, f32::NEG_INFINITY]);
        assert!(half[5].is_nan() && bfloat[5].is_nan());
    }
}
