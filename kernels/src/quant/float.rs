//! Floating-point formats to and from little-endian bytes.

use half::{bf16, f16};

pub(super) fn read_f32(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.chunks_exact(4).zip(out) {
        *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}

pub(super) fn read_f16(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.chunks_exact(2).zip(out) {
        *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
    }
}

pub(super) fn read_bf16(bytes: &[u8], out: &mut [f32]) {
    for (b, o) in bytes.chunks_exact(2).zip(out) {
        *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
    }
}

/// As they are.
pub fn f32_to_f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Rounded to the nearest f16, ties to even; values beyond 65,504 become that.
pub fn f32_to_f16_bytes(values: &[f32]) -> Vec<u8> {
    let most = f16::MAX.to_f32();
    values.iter().flat_map(|&v| f16::from_f32(v.clamp(-most, most)).to_le_bytes()).collect()
}

/// Rounded to the nearest bfloat16, ties to even.
pub fn f32_to_bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()
}
