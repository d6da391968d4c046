//! SwiGLU.

/// `silu(gate) * up`, for rows of `n` gates, then `n` ups.
pub fn silu_mul(gate_up: &[f32], n: usize) -> Vec<f64> {
    gate_up
        .chunks_exact(2 * n)
        .flat_map(|row| {
            let (gate, up) = row.split_at(n);
            gate.iter().zip(up).map(|(&gate, &up)| {
                let gate = f64::from(gate);
                gate / (1.0 + (-gate).exp()) * f64::from(up)
            })
        })
        .collect()
}
