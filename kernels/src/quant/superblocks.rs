//! Q4_K and Q6_K: super-blocks of 256 elements whose groups have small integer scales over one or two f16 scales.

use super::{Group, f16_at};

const GROUPS_Q4: usize = 8;

/// The 6-bit scale and minimum of group `g` from the twelve bytes that hold eight of each: groups 0 to 3 in the low
/// six bits of bytes 0-3 and 4-7; groups 4 to 7 in the nibbles of bytes 8-11, their top two bits in the top bits of
/// bytes 0-3 and 4-7.
fn scale_min_q4_k(packed: &[u8], g: usize) -> (u8, u8) {
    if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        let (low, top_scale, top_min) = (packed[g + 4], packed[g - 4] >> 6, packed[g] >> 6);
        ((low & 15) | top_scale << 4, (low >> 4) | top_min << 4)
    }
}

/// Layout: f16 scale, f16 scale of minimums, 12 bytes of group scales, 128 bytes of nibbles. Each 32 bytes of
/// nibbles hold two groups of 32: the low nibbles, then the high ones.
pub(super) fn unpack_q4_k(block: &[u8], values: &mut [u8], groups: &mut [Group]) {
    let (scale, min_scale) = (f16_at(block, 0), f16_at(block, 2));
    for (g, group) in groups.iter_mut().enumerate().take(GROUPS_Q4) {
        let (s, m) = scale_min_q4_k(&block[4..16], g);
        *group = Group { scale: scale * f32::from(s), min: -min_scale * f32::from(m) };
    }
    for (bytes, values) in block[16..].chunks_exact(32).zip(values.chunks_exact_mut(64)) {
        for (i, &q) in bytes.iter().enumerate() {
            values[i] = q & 15;
            values[i + 32] = q >> 4;
        }
    }
}

/// Layout: 128 bytes of low nibbles, 64 bytes of high pairs of bits, 16 signed group scales, f16 scale. Each half of
/// 128 elements takes 64 bytes of nibbles and 32 of pairs: element `32 q + i` of the half has the low (`q < 2`) or
/// high nibble of byte `32 (q % 2) + i` and bits `2q, 2q + 1` of pair byte `i`. Values are offset by 32.
pub(super) fn unpack_q6_k(block: &[u8], values: &mut [u8], groups: &mut [Group]) {
    let scale = f16_at(block, 208);
    for (group, &s) in groups.iter_mut().zip(&block[192..208]) {
        let scale = scale * f32::from(s as i8);
        *group = Group { scale, min: -32.0 * scale };
    }
    for (half, values) in values.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * half..][..64];
        let high = &block[128 + 32 * half..][..32];
        for i in 0..32 {
            values[i] = (low[i] & 15) | (high[i] & 3) << 4;
            values[i + 32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
            values[i + 64] = (low[i] >> 4) | (high[i] >> 4 & 3) << 4;
            values[i + 96] = (low[i + 32] >> 4) | (high[i] >> 6) << 4;
        }
    }
}

pub(super) fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    let (mut values, mut groups) = ([0; 256], [Group { scale: 0.0, min: 0.0 }; GROUPS_Q4]);
    unpack_q4_k(block, &mut values, &mut groups);
    for (i, o) in out.iter_mut().enumerate() {
        let Group { scale, min } = groups[i / 32];
        *o = scale * f32::from(values[i]) + min;
    }
}

pub(super) fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (mut values, mut groups) = ([0; 256], [Group { scale: 0.0, min: 0.0 }; 16]);
    unpack_q6_k(block, &mut values, &mut groups);
    for (i, o) in out.iter_mut().enumerate() {
        *o = groups[i / 16].scale * (f32::from(values[i]) - 32.0);
    }
}
