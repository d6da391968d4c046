//! Rotary position embedding.

/// Rotates a head (element `i` with `i + head.len() / 2`) at `position`, for `inv_freq.len() == head.len() / 2`.
/// The angle is rounded to f32, as the models' own code has it.
pub fn rope(head: &[f64], inv_freq: &[f32], scale: f32, position: u32) -> Vec<f64> {
    let half = inv_freq.len();
    let mut out = vec![0.0; head.len()];
    for (i, freq) in inv_freq.iter().enumerate() {
        let angle = f64::from(position as f32 * freq);
        let (cos, sin) = (angle.cos() * f64::from(scale), angle.sin() * f64::from(scale));
        out[i] = head[i] * cos - head[i + half] * sin;
        out[i + half] = head[i + half] * cos + head[i] * sin;
    }
    out
}
