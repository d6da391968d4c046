//! Looking rows up.

use super::disjoint::{Disjoint, for_row_ranges};
use super::{PackedMatrix, ThreadPool};

/// `out[i] = table[tokens[i]]`, of matrices stacked along their rows.
///
/// # Panics
/// When a token is outside the table.
pub(crate) fn embed(pool: &ThreadPool, tokens: &[u32], table: &[PackedMatrix], cols: usize, out: &mut [f32]) {
    assert_eq!(out.len(), tokens.len() * cols, "a row for every token");
    let out = Disjoint::new(out);
    for_row_ranges(pool, tokens.len(), cols, |range| {
        for i in range {
            // SAFETY: each row is in one range.
            let out = unsafe { out.part(i * cols, cols) };
            let mut row = tokens[i] as usize;
            let part = table.iter().find(|part| {
                let here = row < part.rows();
                row -= if here { 0 } else { part.rows() };
                here
            });
            match part {
                Some(part) => part.dequantize_row(row, out),
                None => panic!("token {} is outside the vocabulary", tokens[i]),
            }
        }
    });
}

/// `out[i] = x[rows[i]]`.
///
/// # Panics
/// When a row is outside `x`.
pub(crate) fn gather_rows(x: &[f32], rows: &[u32], cols: usize, out: &mut [f32]) {
    assert_eq!(out.len(), rows.len() * cols, "an output row for every row");
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(cols)) {
        out.copy_from_slice(&x[*row as usize * cols..][..cols]);
    }
}
