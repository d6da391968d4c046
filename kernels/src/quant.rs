//! GGUF block formats: to float, and the simple ones from float.

mod blocks;
mod float;
mod superblocks;

pub use blocks::{quantize_q4_0, quantize_q4_1, quantize_q8_0};
pub use float::{f32_to_bf16_bytes, f32_to_f16_bytes, f32_to_f32_bytes};

use crate::{KernelError, WeightFormat};

/// Decodes whole blocks of `format` into `out`, which says how many elements there are.
///
/// # Errors
/// [`KernelError::Shape`] when `bytes` is not exactly as long as `out` needs.
pub fn dequantize(format: WeightFormat, bytes: &[u8], out: &mut [f32]) -> Result<(), KernelError> {
    if format.row_bytes(out.len()) != Some(bytes.len()) {
        return Err(KernelError::Shape(format!(
            "{} bytes do not hold {} elements of {format:?}",
            bytes.len(),
            out.len()
        )));
    }
    match format {
        WeightFormat::F32 => float::read_f32(bytes, out),
        WeightFormat::F16 => float::read_f16(bytes, out),
        WeightFormat::Bf16 => float::read_bf16(bytes, out),
        WeightFormat::Q8_0 => each_block(format, bytes, out, blocks::decode_q8_0),
        WeightFormat::Q4_0 => each_block(format, bytes, out, blocks::decode_q4_0),
        WeightFormat::Q4_1 => each_block(format, bytes, out, blocks::decode_q4_1),
        WeightFormat::Q4K => each_block(format, bytes, out, superblocks::decode_q4_k),
        WeightFormat::Q6K => each_block(format, bytes, out, superblocks::decode_q6_k),
    }
    Ok(())
}

fn each_block(format: WeightFormat, bytes: &[u8], out: &mut [f32], decode: fn(&[u8], &mut [f32])) {
    let blocks = bytes.chunks_exact(format.block_bytes());
    for (block, out) in blocks.zip(out.chunks_exact_mut(format.block_elements())) {
        decode(block, out);
    }
}

/// The quantized values of a run of elements: `w = scale * u + min`, one scale and minimum a group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    /// Multiplies the unsigned value.
    pub(crate) scale: f32,
    /// Added.
    pub(crate) min: f32,
}

/// Decodes one block of an integer format into unsigned values and its groups, without rounding anything: `values`
/// has the block's elements, `groups` one entry for each of the format's groups.
pub(crate) fn unpack_block(format: WeightFormat, block: &[u8], values: &mut [u8], groups: &mut [Group]) {
    match format {
        WeightFormat::Q8_0 => groups[0] = blocks::unpack_q8_0(block, values),
        WeightFormat::Q4_0 => groups[0] = blocks::unpack_q4_0(block, values),
        WeightFormat::Q4_1 => groups[0] = blocks::unpack_q4_1(block, values),
        WeightFormat::Q4K => superblocks::unpack_q4_k(block, values, groups),
        WeightFormat::Q6K => superblocks::unpack_q6_k(block, values, groups),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => {
            unreachable!("{format:?} has no blocks")
        }
    }
}

pub(crate) fn f16_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
