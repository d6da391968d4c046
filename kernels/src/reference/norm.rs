//! RMSNorm.

/// `x / sqrt(mean(x^2) + eps) * weight`, for rows as long as `weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    x.chunks_exact(weight.len())
        .flat_map(|row| {
            let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
            let rms = (squares / row.len() as f64 + f64::from(eps)).sqrt();
            row.iter().zip(weight).map(move |(&x, &w)| f64::from(x) / rms * f64::from(w))
        })
        .collect()
}
