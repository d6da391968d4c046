//! Activations as the kernels read them: rows in tiles, interleaved, and 8-bit for integer weights.
//!
//! The rows of a product are cut into tiles of nearly equal size. In a tile, the four bytes (or eight) that a kernel
//! broadcasts at once lie next to those of the tile's other rows, so that a tile is read front to back.

use super::packed::Scheme;
use super::tile::Shape;
use crate::cpu::Isa;

/// What one element of `k` becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// f32, one at a time.
    F32,
    /// f32 in pairs along `k`.
    F32Pairs,
    /// bf16 in pairs along `k`.
    Bf16Pairs,
    /// 8-bit in fours along `k`, one scale for each group: `max |x| / 127`.
    Int8 {
        /// Elements with one scale.
        group: usize,
        /// The sum kept for each group: of the 8-bit values times minus this, as an i32; or, without one, times the
        /// scale, as an f32.
        offset: Option<i32>,
    },
}

impl Kind {
    pub(super) fn of(scheme: Scheme, shape: Shape) -> Self {
        match scheme {
            Scheme::F32 | Scheme::F16 => Kind::F32,
            Scheme::Bf16 if shape.bf16_pairs => Kind::Bf16Pairs,
            Scheme::Bf16 => Kind::F32Pairs,
            Scheme::Int8 | Scheme::Int4 | Scheme::Int4Min | Scheme::Int6 => {
                Kind::Int8 { group: scheme.group(), offset: scheme.offset() }
            }
        }
    }

    /// Words of a row's elements.
    pub(super) fn row_words(self, cols: usize) -> usize {
        match self {
            Kind::F32 => cols,
            Kind::F32Pairs => cols.div_ceil(2) * 2,
            Kind::Bf16Pairs => cols.div_ceil(2),
            Kind::Int8 { .. } => cols / 4,
        }
    }

    /// Groups of a row.
    pub(super) fn groups(self, cols: usize) -> usize {
        match self {
            Kind::Int8 { group, .. } => cols / group,
            Kind::F32 | Kind::F32Pairs | Kind::Bf16Pairs => 0,
        }
    }
}

/// Rows cut into as few tiles of at most `most` as will do, of sizes that differ by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    rows: usize,
    tiles: usize,
}

impl Tiling {
    pub(super) fn new(rows: usize, most: usize) -> Self {
        Self { rows, tiles: rows.div_ceil(most) }
    }

    pub(super) fn tiles(self) -> usize {
        self.tiles
    }

    /// First row and number of rows of tile `tile`: the first tiles are the larger ones.
    pub(super) fn tile(self, tile: usize) -> (usize, usize) {
        let (size, larger) = (self.rows / self.tiles, self.rows % self.tiles);
        (tile * size + tile.min(larger), size + usize::from(tile < larger))
    }
}

/// One row to be copied into its tile.
pub(super) struct RowCopy<'a> {
    pub(super) kind: Kind,
    /// The row.
    pub(super) row: &'a [f32],
    /// Rows in the tile.
    pub(super) stride: usize,
    /// This row's first word in the tile; its others follow at `stride` (pairs of words at twice that).
    pub(super) words: *mut u32,
    /// This row's first scale in the tile; the others follow at `stride`.
    pub(super) scales: *mut f32,
    /// This row's first sum in the tile; the others follow at `stride`.
    pub(super) sums: *mut u32,
}

impl RowCopy<'_> {
    /// Copies on `isa`.
    ///
    /// # Safety
    /// The machine has `isa`, and the pointers are valid for the row's words and groups, for this call alone.
    pub(super) unsafe fn run_on(&self, isa: Isa) {
        match isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as the caller promises.
            Isa::Avx512 => unsafe { super::avx512::copy_row(self) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as the caller promises.
            Isa::Avx2 => unsafe { super::avx2::copy_row(self) },
            // SAFETY: as the caller promises.
            _ => unsafe { self.run() },
        }
    }

    /// The copy, to be inlined where an instruction set is enabled.
    ///
    /// # Safety
    /// The pointers are valid for the row's words and groups, for this call alone.
    #[inline(always)]
    pub(super) unsafe fn run(&self) {
        // SAFETY: as the caller promises.
        unsafe {
            match self.kind {
                Kind::F32 => {
                    for (k, value) in self.row.iter().enumerate() {
                        *self.words.add(k * self.stride) = value.to_bits();
                    }
                }
                Kind::F32Pairs => {
                    for (k, pair) in self.row.chunks(2).enumerate() {
                        let word = self.words.add(2 * k * self.stride);
                        *word = pair[0].to_bits();
                        *word.add(1) = pair.get(1).map_or(0, |v| v.to_bits());
                    }
                }
                Kind::Bf16Pairs => {
                    for (k, pair) in self.row.chunks(2).enumerate() {
                        let second = pair.get(1).map_or(0, |&v| bf16_bits(v));
                        *self.words.add(k * self.stride) = bf16_bits(pair[0]) | second << 16;
                    }
                }
                Kind::Int8 { group: 32, offset } => self.quantize::<32>(offset),
                Kind::Int8 { offset, .. } => self.quantize::<16>(offset),
            }
        }
    }

    /// # Safety
    /// As for [`run`](Self::run).
    #[inline(always)]
    unsafe fn quantize<const GROUP: usize>(&self, offset: Option<i32>) {
        let (groups, rest) = self.row.as_chunks::<GROUP>();
        debug_assert!(rest.is_empty());
        for (g, values) in groups.iter().enumerate() {
            let (scale, bytes) = quantize_group(values);
            let sum: i32 = bytes.iter().map(|&q| i32::from(q)).sum();
            let sum = match offset {
                Some(offset) => (-offset * sum) as u32,
                None => (scale * sum as f32).to_bits(),
            };
            // SAFETY: as the caller promises.
            unsafe {
                *self.scales.add(g * self.stride) = scale;
                *self.sums.add(g * self.stride) = sum;
                for (i, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                    let word = u32::from_ne_bytes(four.map(|q| q as u8));
                    *self.words.add((g * (GROUP / 4) + i) * self.stride) = word;
                }
            }
        }
    }
}

/// 8-bit values and their scale. A group with an infinity or a NaN gets that as its scale, so that it shows in the
/// result.
#[inline(always)]
fn quantize_group<const GROUP: usize>(values: &[f32; GROUP]) -> (f32, [i8; GROUP]) {
    /// Added to a float below 2^22 in magnitude, it leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // Compared as integers, NaN is the largest.
    let largest = values.iter().fold(0, |max, v| (v.to_bits() & 0x7fff_ffff).max(max));
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let scale = largest / 127.0;
    (scale, std::array::from_fn(|i| (values[i] * inverse + ROUND).to_bits() as i8))
}

/// Rounded to the nearest bf16, ties to even, without branches but for NaN.
#[inline(always)]
fn bf16_bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bits >> 16 | 0x40 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_rows_and_differ_by_one() {
        for most in [1, 2, 3, 6, 12] {
            for rows in 1..200 {
                let tiling = Tiling::new(rows, most);
                let mut next = 0;
                for tile in 0..tiling.tiles() {
                    let (start, size) = tiling.tile(tile);
                    assert_eq!(start, next);
                    assert!(size <= most && size + 1 >= rows.div_ceil(tiling.tiles()));
                    next += size;
                }
                assert_eq!(next, rows);
            }
        }
    }

    #[test]
    fn groups_are_quantized_to_the_nearest() {
        let mut values = [0.0; 16];
        values[..6].copy_from_slice(&[127.0, -127.0, 1.4, -1.6, 0.5, 1.5]);
        let (scale, bytes) = quantize_group(&values);
        assert_eq!(scale, 1.0);
        assert_eq!(bytes[..6], [127, -127, 1, -2, 0, 2]);
        assert_eq!(quantize_group(&[0.0; 16]), (0.0, [0; 16]));
        values[3] = f32::NAN;
        assert!(quantize_group(&values).0.is_nan());
        values[3] = f32::NEG_INFINITY;
        assert_eq!(quantize_group(&values).0, f32::INFINITY);
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        let values =
            [0.0, -0.0, 1.0, 1.003_906_3, 1.011_718_8, 3.4e38, f32::INFINITY, f32::MIN_POSITIVE, 1e-42];
        for value in values {
            assert_eq!(bf16_bits(value), u32::from(half::bf16::from_f32(value).to_bits()), "{value}");
        }
        assert!(half::bf16::from_bits(bf16_bits(f32::NAN) as u16).is_nan());
    }
}
