//! Attention, one query and one head at a time.

use crate::{AttentionBatch, HeadShape, KvIndex};

/// Slot of position `position` of sequence `sequence`.
fn slot(kv: &KvIndex<'_>, sequence: usize, position: usize) -> usize {
    match *kv {
        KvIndex::Paged { block_size, tables, table_start } => {
            let block_size = block_size as usize;
            let block = tables[table_start[sequence] as usize + position / block_size];
            block as usize * block_size + position % block_size
        }
        KvIndex::Contiguous { start } => start[sequence] as usize + position,
    }
}

/// Causal attention as [`Backend::attention`](crate::Backend::attention) defines it; `k` and `v` are
/// `[slot][kv_head][head_dim]`. The result is `[rows, heads * head_dim]`, padding rows zero.
pub fn attention(
    heads: HeadShape,
    scale: f32,
    qkv: &[f32],
    batch: &AttentionBatch<'_>,
    k: &[f32],
    v: &[f32],
) -> Vec<f64> {
    let HeadShape { heads, kv_heads, head_dim } = heads;
    let cols = (heads + 2 * kv_heads) * head_dim;
    let mut out = vec![0.0; qkv.len() / cols * heads * head_dim];
    for (sequence, range) in batch.query_start.windows(2).enumerate() {
        let before = batch.context_len[sequence] - (range[1] - range[0]);
        for row in range[0]..range[1] {
            let sees = (before + row - range[0] + 1) as usize;
            let from = batch.window.map_or(0, |window| sees.saturating_sub(window as usize));
            let slots: Vec<usize> =
                (from..sees).map(|position| slot(&batch.kv, sequence, position)).collect();
            for head in 0..heads {
                let at = |slot: usize| (slot * kv_heads + head / (heads / kv_heads)) * head_dim;
                let query = &qkv[row as usize * cols + head * head_dim..][..head_dim];
                let to = &mut out[(row as usize * heads + head) * head_dim..][..head_dim];
                one_query(query, scale, slots.iter().map(|&slot| (&k[at(slot)..], &v[at(slot)..])), to);
            }
        }
    }
    out
}

fn one_query<'a>(
    query: &[f32],
    scale: f32,
    context: impl Iterator<Item = (&'a [f32], &'a [f32])> + Clone,
    out: &mut [f64],
) {
    let dot =
        |key: &[f32]| -> f64 { query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum() };
    let scores: Vec<f64> = context.clone().map(|(key, _)| dot(key) * f64::from(scale)).collect();
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - greatest).exp()).collect();
    let total: f64 = weights.iter().sum();
    for ((_, value), weight) in context.zip(&weights) {
        for (out, &value) in out.iter_mut().zip(value) {
            *out += weight / total * f64::from(value);
        }
    }
}
