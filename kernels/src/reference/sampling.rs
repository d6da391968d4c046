//! The distribution that sampling draws from.

use crate::sampling::SamplingRule;

/// Probability of each token under `rule`: penalties, temperature, min-p, top-k, top-p, in this order. Of equal
/// logits at an edge, those of the lowest ids stay.
pub fn distribution(logits: &[f32], rule: &SamplingRule, history: &[u32], prompt_len: usize) -> Vec<f64> {
    let mut logits: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for (token, logit) in logits.iter_mut().enumerate() {
        let is = |t: &&u32| **t as usize == token;
        if history.iter().any(|t| is(&t)) {
            let penalty = f64::from(rule.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let count = history[prompt_len..].iter().filter(is).count();
        *logit -= f64::from(rule.frequency_penalty) * count as f64;
        *logit -= if count > 0 { f64::from(rule.presence_penalty) } else { 0.0 };
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let mut out = vec![0.0; logits.len()];
    if rule.temperature == 0.0 {
        out[order[0]] = 1.0;
        return out;
    }
    let greatest = logits[order[0]];
    let weight = |token: usize| ((logits[token] - greatest) / f64::from(rule.temperature)).exp();
    order.retain(|&token| weight(token) >= f64::from(rule.min_p));
    if rule.top_k > 0 {
        order.truncate(rule.top_k as usize);
    }
    let total: f64 = order.iter().map(|&token| weight(token)).sum();
    let mut before = 0.0;
    order.retain(|&token| {
        let keep = before == 0.0 || before < f64::from(rule.top_p) * total;
        before += weight(token);
        keep
    });
    let total: f64 = order.iter().map(|&token| weight(token)).sum();
    for token in order {
        out[token] = weight(token) / total;
    }
    out
}
