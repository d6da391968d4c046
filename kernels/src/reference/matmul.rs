//! The matrix product.

/// `x * w^T + bias` in float64: `x` is `[rows, cols]`, `w` is `[outputs, cols]`, the result `[rows, outputs]`.
pub fn matmul(x: &[f32], w: &[f32], cols: usize, bias: Option<&[f32]>) -> Vec<f64> {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum() };
    x.chunks_exact(cols)
        .flat_map(|row| {
            w.chunks_exact(cols)
                .enumerate()
                .map(move |(output, w)| dot(row, w) + bias.map_or(0.0, |b| f64::from(b[output])))
        })
        .collect()
}
