//! Random weights: normal, each a function of its tensor's key, its row and its column alone, so that a device can make
//! them where it needs them.

use std::sync::OnceLock;

/// Standard deviation of the weights.
pub const DEVIATION: f32 = 0.02;

/// Fills row `row` of the tensor with key `key`, from its first column on: four elements from each 64 random bits, each
/// picking one of 65,536 quantiles of the normal distribution.
pub fn fill_normal(key: u64, row: usize, out: &mut [f32]) {
    let quantiles = quantiles();
    let row_key = mix(key.wrapping_add((row as u64).wrapping_mul(0xD6E8_FEB8_6659_FD93)));
    for (index, four) in out.chunks_mut(4).enumerate() {
        let mut bits = mix(row_key.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
        for value in four {
            *value = DEVIATION * quantiles[(bits & 0xFFFF) as usize];
            bits >>= 16;
        }
    }
}

/// SplitMix64 (Steele, Lea & Flood 2014): a bijection that spreads every input bit.
pub fn mix(x: u64) -> u64 {
    let mut x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The normal distribution's quantiles at `(i + 1/2) / 65536`.
pub fn quantiles() -> &'static [f32; 65536] {
    static TABLE: OnceLock<Box<[f32; 65536]>> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut table: Box<[f32; 65536]> =
            vec![0.0; 65536].into_boxed_slice().try_into().expect("the length is the array's");
        for (i, value) in table.iter_mut().enumerate() {
            *value = normal_quantile((i as f64 + 0.5) / 65536.0) as f32;
        }
        table
    })
}

/// The inverse of the normal distribution function, to about 4.5e-4 absolute (Abramowitz & Stegun 26.2.23).
fn normal_quantile(p: f64) -> f64 {
    let tail = p.min(1.0 - p);
    let t = (-2.0 * tail.ln()).sqrt();
    let numerator = 2.515517 + t * (0.802853 + t * 0.010328);
    let denominator = 1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308));
    let magnitude = t - numerator / denominator;
    if p < 0.5 { -magnitude } else { magnitude }
}
