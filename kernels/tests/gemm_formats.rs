//! Block formats against hand-worked blocks and against decoders written from the formats' descriptions.

use half::f16;
use quire_kernels::WeightFormat;
use quire_kernels::quant::{dequantize, quantize_q4_0, quantize_q4_1, quantize_q8_0};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn decoded(format: WeightFormat, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / format.block_bytes() * format.block_elements()];
    dequantize(format, bytes, &mut out).expect("whole blocks");
    out
}

fn bytes_of(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

#[test]
fn q8_0_by_hand() {
    let mut values = [0.0; 32];
    // The largest is 127 halves, so that the scale is a half.
    values[..5].copy_from_slice(&[63.5, -63.5, 0.5, -1.0, 0.3]);
    let bytes = quantize_q8_0(&values);
    assert_eq!(bytes[..2], bytes_of(0.5));
    assert_eq!(bytes[2..8], [127, 129, 1, 254, 1, 0]);
    let back = decoded(WeightFormat::Q8_0, &bytes);
    assert_eq!(back[..6], [63.5, -63.5, 0.5, -1.0, 0.5, 0.0]);
}

#[test]
fn q4_0_by_hand() {
    let mut values = [0.0; 32];
    // The largest in magnitude, -4, becomes -8: the scale is a half.
    (values[0], values[1], values[16], values[31]) = (-4.0, 3.5, 1.0, -0.5);
    let bytes = quantize_q4_0(&values);
    assert_eq!(bytes[..2], bytes_of(0.5));
    // Element 0 is -8 + 8, element 16 is 2 + 8; 1 is 7 + 8, 17 is 8; 15 is 8, 31 is -1 + 8.
    assert_eq!(bytes[2], 10 << 4);
    assert_eq!(bytes[3], 15 | 8 << 4);
    assert_eq!(bytes[17], 8 | 7 << 4);
    assert_eq!(decoded(WeightFormat::Q4_0, &bytes), values);
}

#[test]
fn q4_1_by_hand() {
    let mut values = [1.0; 32];
    // From -2 to 5.5 in fifteen steps of a half.
    (values[0], values[5], values[16], values[21]) = (-2.0, 5.5, -1.5, 2.0);
    let bytes = quantize_q4_1(&values);
    assert_eq!(bytes[..2], bytes_of(0.5));
    assert_eq!(bytes[2..4], bytes_of(-2.0));
    assert_eq!(bytes[4], 1 << 4);
    assert_eq!(bytes[9], 15 | 8 << 4);
    assert_eq!(bytes[5], 6 | 6 << 4);
    assert_eq!(decoded(WeightFormat::Q4_1, &bytes), values);
}

#[test]
fn constant_blocks_survive() {
    for value in [0.0, 2.0, -2.0] {
        let values = [value; 32];
        assert_eq!(
            decoded(WeightFormat::Q8_0, &quantize_q8_0(&values)),
            values.map(|v| {
                // 127 steps of an f16 scale.
                f16::from_f32(v / 127.0).to_f32() * 127.0
            })
        );
        assert_eq!(decoded(WeightFormat::Q4_0, &quantize_q4_0(&values)), values);
        assert_eq!(decoded(WeightFormat::Q4_1, &quantize_q4_1(&values)), values);
    }
}

#[test]
fn quantizing_errs_by_half_a_step_at_most() {
    let mut rng = StdRng::seed_from_u64(1);
    let values: Vec<f32> = (0..3200).map(|_| rng.next_u32() as f32 / 2f32.powi(32) - 0.3).collect();
    // Steps of values in [-0.3, 0.7]. The scale's rounding to f16 adds a little at the far end of the range; the
    // offset of Q4_0 cuts one step off the smaller side.
    for (format, bytes, allowed) in [
        (WeightFormat::Q8_0, quantize_q8_0(&values), 0.7 / 127.0 * 0.55),
        (WeightFormat::Q4_0, quantize_q4_0(&values), 0.7 / 8.0 * 0.52),
        (WeightFormat::Q4_1, quantize_q4_1(&values), 1.0 / 15.0 * 0.52),
    ] {
        for (value, back) in values.iter().zip(decoded(format, &bytes)) {
            assert!((value - back).abs() <= allowed, "{format:?}: {back} for {value}");
        }
    }
}

/// Q4_K, from its description: group `j`'s scale and minimum are 6 bits each, the first four whole and the others in
/// two pieces; groups `2 i` and `2 i + 1` are the low and high nibbles of the i-th 32 bytes.
fn plain_q4_k(block: &[u8]) -> Vec<f32> {
    let (d, dmin) = (f16::from_le_bytes([block[0], block[1]]), f16::from_le_bytes([block[2], block[3]]));
    let s = &block[4..16];
    let scales = [s[0] & 63, s[1] & 63, s[2] & 63, s[3] & 63]
        .into_iter()
        .chain((0..4).map(|i| s[8 + i] % 16 + s[i] / 64 * 16));
    let mins = [s[4] & 63, s[5] & 63, s[6] & 63, s[7] & 63]
        .into_iter()
        .chain((0..4).map(|i| s[8 + i] / 16 + s[4 + i] / 64 * 16));
    let mut out = Vec::new();
    for (j, (scale, min)) in scales.zip(mins).enumerate() {
        for i in 0..32 {
            let byte = block[16 + j / 2 * 32 + i];
            let nibble = if j % 2 == 0 { byte % 16 } else { byte / 16 };
            out.push(d.to_f32() * f32::from(scale) * f32::from(nibble) - dmin.to_f32() * f32::from(min));
        }
    }
    out
}

/// Q6_K, from its description: element by element.
fn plain_q6_k(block: &[u8]) -> Vec<f32> {
    let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
    let element = |i: usize| {
        let (half, quarter, j) = (i / 128, i % 128 / 32, i % 32);
        let low = block[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter / 2)) & 15;
        let high = block[128 + 32 * half + j] >> (2 * quarter) & 3;
        let scale = block[192 + i / 16] as i8;
        d * f32::from(scale) * (f32::from(low + 16 * high) - 32.0)
    };
    (0..256).map(element).collect()
}

#[test]
fn super_blocks_decode_as_described() {
    let mut rng = StdRng::seed_from_u64(2);
    for (format, plain, scales) in [
        (WeightFormat::Q4K, plain_q4_k as fn(&[u8]) -> Vec<f32>, &[0, 2][..]),
        (WeightFormat::Q6K, plain_q6_k, &[208]),
    ] {
        for _ in 0..50 {
            let mut block = vec![0; format.block_bytes()];
            rng.fill_bytes(&mut block);
            for &at in scales {
                let scale = bytes_of(0.001 + (rng.next_u32() % 100) as f32 * 1e-4);
                block[at..at + 2].copy_from_slice(&scale);
            }
            let out = decoded(format, &block);
            for (i, (o, e)) in out.iter().zip(plain(&block)).enumerate() {
                assert!((o - e).abs() <= 1e-6 * (1.0 + e.abs()), "{format:?}[{i}]: {o} for {e}");
            }
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    for (format, bytes, elements) in [
        (WeightFormat::Q8_0, 34, 31),
        (WeightFormat::Q8_0, 33, 32),
        (WeightFormat::F32, 4, 2),
        (WeightFormat::Q4K, 144, 128),
    ] {
        let error = dequantize(format, &vec![0; bytes], &mut vec![0.0; elements]).expect_err("does not fit");
        assert!(error.to_string().contains(&format!("{elements} elements")), "{error}");
    }
}
