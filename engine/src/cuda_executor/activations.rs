//! In what a model is computed on a GPU, by the format that its weights are to have.

use quire_kernels::WeightFormat;
use quire_kernels::cuda::ActivationDtype;

use crate::EngineError;
use crate::model::{LayerWeight, ModelConfig, WeightDtype, WeightRole, WeightSource};

/// Activations are what the weights are held as: what was chosen or, to keep, what they are stored as if it is bf16 or
/// f16, and bf16 if not. A file is taken for what its first layer is.
pub(super) fn activations_for(
    dtype: WeightDtype,
    config: &ModelConfig,
    weights: &dyn WeightSource,
) -> Result<ActivationDtype, EngineError> {
    match dtype {
        WeightDtype::Bf16 => Ok(ActivationDtype::Bf16),
        WeightDtype::F16 => Ok(ActivationDtype::F16),
        WeightDtype::Keep => {
            // Of the matrices of a layer one that no kind of file needs to rearrange.
            let role = WeightRole::Layer(0, LayerWeight::Down);
            if weights.generated(role, config.hidden, config.ffn).is_some() {
                return Ok(ActivationDtype::Bf16);
            }
            Ok(match weights.matrix(role, config.hidden, config.ffn)?.format {
                WeightFormat::F16 => ActivationDtype::F16,
                _ => ActivationDtype::Bf16,
            })
        }
        WeightDtype::F32 | WeightDtype::Q8_0 | WeightDtype::Q4_0 | WeightDtype::Q4_1 => {
            Err(EngineError::Config(format!(
                "the GPU holds weights as bf16 or f16, not {dtype}: choose bf16, f16 or keep"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dummy::{DummyShape, DummyWeights};
    use crate::model::HostMatrix;

    /// A file whose matrices are all of this format.
    struct Stored(WeightFormat);

    impl WeightSource for Stored {
        fn matrix(&self, _: WeightRole, rows: usize, cols: usize) -> Result<HostMatrix<'_>, EngineError> {
            let bytes = vec![0; rows * self.0.row_bytes(cols).unwrap()];
            Ok(HostMatrix { format: self.0, rows, cols, bytes: bytes.into() })
        }

        fn vector(&self, _: WeightRole, len: usize) -> Result<Vec<f32>, EngineError> {
            Ok(vec![0.0; len])
        }
    }

    #[test]
    fn what_is_kept_is_what_the_file_has() {
        let config = DummyShape::Smollm2_135m.config();
        for (format, kept) in [
            (WeightFormat::F16, ActivationDtype::F16),
            (WeightFormat::Bf16, ActivationDtype::Bf16),
            (WeightFormat::F32, ActivationDtype::Bf16),
            (WeightFormat::Q4K, ActivationDtype::Bf16),
        ] {
            let of = |dtype| activations_for(dtype, &config, &Stored(format)).unwrap();
            assert_eq!(of(WeightDtype::Keep), kept, "{format:?}");
            assert_eq!(of(WeightDtype::F16), ActivationDtype::F16);
            assert_eq!(of(WeightDtype::Bf16), ActivationDtype::Bf16);
        }
        let made = DummyWeights::new(1, WeightDtype::Keep, 1);
        assert_eq!(activations_for(WeightDtype::Keep, &config, &made).unwrap(), ActivationDtype::Bf16);
        let error = activations_for(WeightDtype::Q8_0, &config, &made).unwrap_err().to_string();
        assert!(error.contains("q8_0") && error.contains("choose bf16, f16 or keep"), "{error}");
    }
}
