//! The format in which weights are held, and getting them there.

use std::borrow::Cow;

use quire_kernels::{KernelError, WeightFormat, quant};

use crate::EngineError;
use crate::model::{HostMatrix, WeightRole};

/// The format in which the weight matrices are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDtype {
    /// As the file has them; generated ones are bfloat16.
    #[default]
    Keep,
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision; values beyond 65,504 are held as that.
    F16,
    /// 8 bits and a scale for each 32.
    Q8_0,
    /// 4 bits and a scale for each 32; embedding and output projection in Q8_0, as files of this kind have them.
    Q4_0,
    /// 4 bits, a scale and a minimum for each 32; embedding and output projection in Q8_0.
    Q4_1,
}

impl WeightDtype {
    /// The format for the matrix of this role; `None` leaves it as it is.
    pub fn format(self, role: WeightRole) -> Option<WeightFormat> {
        let outer = matches!(role, WeightRole::Embedding | WeightRole::OutputHead);
        match self {
            WeightDtype::Keep => None,
            WeightDtype::F32 => Some(WeightFormat::F32),
            WeightDtype::Bf16 => Some(WeightFormat::Bf16),
            WeightDtype::F16 => Some(WeightFormat::F16),
            WeightDtype::Q8_0 => Some(WeightFormat::Q8_0),
            WeightDtype::Q4_0 | WeightDtype::Q4_1 if outer => Some(WeightFormat::Q8_0),
            WeightDtype::Q4_0 => Some(WeightFormat::Q4_0),
            WeightDtype::Q4_1 => Some(WeightFormat::Q4_1),
        }
    }
}

impl std::str::FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "keep" => WeightDtype::Keep,
            "f32" => WeightDtype::F32,
            "bf16" => WeightDtype::Bf16,
            "f16" => WeightDtype::F16,
            "q8_0" => WeightDtype::Q8_0,
            "q4_0" => WeightDtype::Q4_0,
            "q4_1" => WeightDtype::Q4_1,
            _ => return Err(format!("'{text}' is none of keep, f32, bf16, f16, q8_0, q4_0, q4_1")),
        })
    }
}

impl std::fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WeightDtype::Keep => "keep",
            WeightDtype::F32 => "f32",
            WeightDtype::Bf16 => "bf16",
            WeightDtype::F16 => "f16",
            WeightDtype::Q8_0 => "q8_0",
            WeightDtype::Q4_0 => "q4_0",
            WeightDtype::Q4_1 => "q4_1",
        })
    }
}

/// `matrix` in `format`, its rows shared out over `threads`.
pub(crate) fn convert(
    matrix: HostMatrix<'_>,
    format: WeightFormat,
    threads: usize,
) -> Result<HostMatrix<'_>, EngineError> {
    if matrix.format == format {
        return Ok(matrix);
    }
    let (rows, cols, from) = (matrix.rows, matrix.cols, matrix.format);
    let stride = from.row_bytes(cols).expect("a matrix is whole rows of its format");
    let stored = &matrix.bytes;
    let bytes = encode_rows(format, rows, cols, threads, |row, out| {
        quant::dequantize(from, &stored[row * stride..(row + 1) * stride], out)
            .expect("a row of the matrix has the row's bytes");
    })?;
    Ok(HostMatrix { format, rows, cols, bytes: Cow::Owned(bytes) })
}

/// `rows` rows of `cols` elements in `format`, each written as floats by `produce`. The result does not depend on
/// `threads`.
pub(crate) fn encode_rows(
    format: WeightFormat,
    rows: usize,
    cols: usize,
    threads: usize,
    produce: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Vec<u8>, EngineError> {
    let encode: fn(&[f32]) -> Vec<u8> = match format {
        WeightFormat::F32 => quant::f32_to_f32_bytes,
        WeightFormat::F16 => quant::f32_to_f16_bytes,
        WeightFormat::Bf16 => quant::f32_to_bf16_bytes,
        WeightFormat::Q8_0 => quant::quantize_q8_0,
        WeightFormat::Q4_0 => quant::quantize_q4_0,
        WeightFormat::Q4_1 => quant::quantize_q4_1,
        WeightFormat::Q4K | WeightFormat::Q6K => {
            return Err(EngineError::Config(format!("weights cannot be converted to {format:?}")));
        }
    };
    let stride = format.row_bytes(cols).ok_or_else(|| {
        EngineError::Config(format!(
            "rows of {cols} elements cannot be held as {format:?}, which needs multiples of {}: choose another weight \
             type",
            format.block_elements()
        ))
    })?;
    let mut bytes = allocate(rows, stride)?;
    let share = rows.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for (index, chunk) in bytes.chunks_mut(share * stride).enumerate() {
            let produce = &produce;
            scope.spawn(move || {
                let mut floats = vec![0.0; cols];
                for (row, out) in chunk.chunks_exact_mut(stride).enumerate() {
                    produce(index * share + row, &mut floats);
                    out.copy_from_slice(&encode(&floats));
                }
            });
        }
    });
    Ok(bytes)
}

fn allocate(rows: usize, stride: usize) -> Result<Vec<u8>, EngineError> {
    let too_large = KernelError::OutOfMemory { what: "a weight matrix", bytes: rows.saturating_mul(stride) };
    let Some(len) = rows.checked_mul(stride) else { return Err(too_large.into()) };
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| too_large)?;
    bytes.resize(len, 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_do_not_change_the_bytes() {
        let produce = |row: usize, out: &mut [f32]| {
            for (i, o) in out.iter_mut().enumerate() {
                *o = (row * 31 + i) as f32 * 0.01 - 1.0;
            }
        };
        let one = encode_rows(WeightFormat::Q8_0, 7, 64, 1, produce).unwrap();
        assert_eq!(one, encode_rows(WeightFormat::Q8_0, 7, 64, 3, produce).unwrap());
        assert_eq!(one.len(), 7 * 68);
    }

    #[test]
    fn conversion_keeps_values() {
        let floats = [0.5f32, -1.25, 3.0, 0.0];
        let bytes = quant::f32_to_f32_bytes(&floats);
        let matrix = HostMatrix { format: WeightFormat::F32, rows: 2, cols: 2, bytes: bytes.into() };
        let converted = convert(matrix, WeightFormat::Bf16, 2).unwrap();
        let mut back = [0.0; 4];
        quant::dequantize(WeightFormat::Bf16, &converted.bytes, &mut back).unwrap();
        assert_eq!(back, floats);
    }

    #[test]
    fn halves_end_at_their_greatest_number() {
        let bytes = quant::f32_to_f32_bytes(&[1e5, -1e5, 1.5, 6e-8]);
        let matrix = HostMatrix { format: WeightFormat::F32, rows: 1, cols: 4, bytes: bytes.into() };
        let converted = convert(matrix, WeightFormat::F16, 1).unwrap();
        let mut back = [0.0; 4];
        quant::dequantize(WeightFormat::F16, &converted.bytes, &mut back).unwrap();
        assert_eq!(back, [65504.0, -65504.0, 1.5, 2f32.powi(-24)]);
    }

    #[test]
    fn names_round_trip() {
        use WeightDtype::{Bf16, F16, F32, Keep, Q4_0, Q4_1, Q8_0};
        for dtype in [Keep, F32, Bf16, F16, Q8_0, Q4_0, Q4_1] {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.to_string());
        }
        assert!("fp16".parse::<WeightDtype>().unwrap_err().contains("f16"));
    }

    #[test]
    fn uneven_rows_are_refused() {
        let error = encode_rows(WeightFormat::Q8_0, 1, 33, 1, |_, _| {}).unwrap_err().to_string();
        assert!(error.contains("multiples of 32"), "{error}");
    }
}
