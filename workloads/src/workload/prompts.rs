//! Prompt tokens: random ids, with equal blocks where a trace says that prompts are equal.

use crate::lengths::scaled;
use crate::random::{Stream, Use};
use crate::spec::ModelLimits;
use crate::trace::PrefixBlocks;

/// A prompt of `len` tokens. Blocks with equal ids have equal tokens under one seed; what no block covers is the
/// request's own. Where blocks end is scaled as lengths are, so that a scale that does not divide a block adds up no errors;
/// equal ids stand at equal places, hence have equal lengths. The first `shared` tokens are those of every prompt.
pub(super) fn tokens(
    seed: u64,
    request: u64,
    len: u32,
    shared: u32,
    prefix: Option<&PrefixBlocks>,
    length_scale: f64,
    limits: &ModelLimits,
) -> Vec<u32> {
    let mut prompt = Vec::with_capacity(len as usize);
    fill(&mut prompt, shared.min(len), Stream::new(seed, Use::SharedPrefix, 0), limits);
    if let Some(prefix) = prefix {
        let shared = prompt.len() as u32;
        for (i, &id) in (1_u32..).zip(&prefix.ids) {
            let end =
                scaled(prefix.block_len.saturating_mul(i), length_scale).saturating_add(shared).min(len);
            let count = end - prompt.len() as u32;
            fill(&mut prompt, count, Stream::new(seed, Use::PromptBlock, id), limits);
        }
    }
    let room = len - prompt.len() as u32;
    fill(&mut prompt, room, Stream::new(seed, Use::Prompt, request), limits);
    prompt
}

fn fill(prompt: &mut Vec<u32>, count: u32, mut stream: Stream, limits: &ModelLimits) {
    let ids = limits.vocab_size - limits.reserved_ids;
    prompt.extend((0..count).map(|_| limits.reserved_ids + stream.below(ids)));
}
