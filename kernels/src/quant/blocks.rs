//! Q8_0, Q4_0 and Q4_1: blocks of 32 elements with one f16 scale (and for Q4_1 a minimum).
//!
//! The 4-bit formats hold element `i` in the low nibble of byte `i` and element `i + 16` in its high nibble.

use super::{Group, f16_at};
use half::f16;

const BLOCK: usize = 32;
const HALF: usize = BLOCK / 2;

pub(super) fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = scale * f32::from(q as i8);
    }
}

pub(super) fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let scale = f16_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = scale * (f32::from(q & 15) - 8.0);
        out[i + HALF] = scale * (f32::from(q >> 4) - 8.0);
    }
}

pub(super) fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (f16_at(block, 0), f16_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = scale * f32::from(q & 15) + min;
        out[i + HALF] = scale * f32::from(q >> 4) + min;
    }
}

pub(super) fn unpack_q8_0(block: &[u8], values: &mut [u8]) -> Group {
    let scale = f16_at(block, 0);
    for (v, &q) in values.iter_mut().zip(&block[2..]) {
        *v = q ^ 0x80;
    }
    Group { scale, min: -128.0 * scale }
}

pub(super) fn unpack_q4_0(block: &[u8], values: &mut [u8]) -> Group {
    let scale = f16_at(block, 0);
    unpack_nibbles(&block[2..], values);
    Group { scale, min: -8.0 * scale }
}

pub(super) fn unpack_q4_1(block: &[u8], values: &mut [u8]) -> Group {
    unpack_nibbles(&block[4..], values);
    Group { scale: f16_at(block, 0), min: f16_at(block, 2) }
}

fn unpack_nibbles(bytes: &[u8], values: &mut [u8]) {
    let (low, high) = values.split_at_mut(HALF);
    for ((&q, low), high) in bytes.iter().zip(low).zip(high) {
        *low = q & 15;
        *high = q >> 4;
    }
}

/// Q8_0 blocks of `values`, whose length is a multiple of 32: scale `max|v| / 127`, values rounded to nearest.
///
/// # Panics
/// When the length is no multiple of 32.
pub fn quantize_q8_0(values: &[f32]) -> Vec<u8> {
    quantize(values, 34, |block, bytes| {
        let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let inverse = write_scale(bytes, largest / 127.0);
        bytes.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
    })
}

/// Q4_0 blocks of `values`, whose length is a multiple of 32: the scale makes the element largest in magnitude -8.
///
/// # Panics
/// When the length is no multiple of 32.
pub fn quantize_q4_0(values: &[f32]) -> Vec<u8> {
    quantize(values, 18, |block, bytes| {
        let largest = block.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        let inverse = write_scale(bytes, largest / -8.0);
        write_nibbles(bytes, block, |v| v * inverse + 8.0);
    })
}

/// Q4_1 blocks of `values`, whose length is a multiple of 32: minimum to maximum in fifteen steps.
///
/// # Panics
/// When the length is no multiple of 32.
pub fn quantize_q4_1(values: &[f32]) -> Vec<u8> {
    quantize(values, 20, |block, bytes| {
        let min = block.iter().copied().fold(f32::INFINITY, f32::min);
        let max = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let inverse = write_scale(bytes, (max - min) / 15.0);
        bytes.extend(f16::from_f32(min).to_le_bytes());
        write_nibbles(bytes, block, |v| (v - min) * inverse);
    })
}

fn quantize(values: &[f32], block_bytes: usize, encode: impl Fn(&[f32], &mut Vec<u8>)) -> Vec<u8> {
    assert!(values.len().is_multiple_of(BLOCK), "{} elements are no whole blocks of {BLOCK}", values.len());
    let mut bytes = Vec::with_capacity(values.len() / BLOCK * block_bytes);
    values.chunks_exact(BLOCK).for_each(|block| encode(block, &mut bytes));
    bytes
}

/// Appends `scale` as f16, and gives the reciprocal of the scale as it was before rounding, or 0 for 0.
fn write_scale(bytes: &mut Vec<u8>, scale: f32) -> f32 {
    bytes.extend(f16::from_f32(scale).to_le_bytes());
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn write_nibbles(bytes: &mut Vec<u8>, block: &[f32], to_unsigned: impl Fn(f32) -> f32) {
    let nibble = |v: f32| (to_unsigned(v) + 0.5).clamp(0.0, 15.0) as u8;
    bytes.extend((0..HALF).map(|i| nibble(block[i]) | nibble(block[i + HALF]) << 4));
}
