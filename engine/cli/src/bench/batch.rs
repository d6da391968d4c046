//! Batches for measuring: prompts of fixed pseudo-random tokens, and decode steps over them.

use std::sync::Arc;

use quire_engine::{KvPlacement, SampleRow, SamplingParams, ScheduledBatch};

/// Tokens of a prompt computed in one pass, when prompts are only there to be decoded after.
pub(crate) const CHUNK: u32 = 512;

/// Sequences of equal length in paged KV memory, the blocks of each spread over it.
#[derive(Debug)]
pub(crate) struct BenchBatch {
    sequences: u32,
    blocks: u32,
    block_size: u32,
    vocab: u32,
}

impl BenchBatch {
    /// `sequences` of up to `length` tokens each.
    pub(crate) fn new(sequences: u32, length: u32, block_size: u32, vocab: usize) -> Self {
        let vocab = u32::try_from(vocab).expect("token ids are 32-bit");
        Self { sequences, blocks: length.div_ceil(block_size), block_size, vocab }
    }

    /// Whole prompts of `count` sequences in one pass, with tokens that differ by `first`; each one's last logits are
    /// wanted.
    pub(crate) fn prompts(&self, first: u32, count: u32, length: u32) -> ScheduledBatch {
        let mut batch = self.empty();
        for sequence in 0..count {
            let tokens = (0..length).map(|at| self.token(first + sequence, at));
            self.append(&mut batch, sequence, 0, tokens);
            want_logits(&mut batch, &Arc::new(SamplingParams::default()));
        }
        batch
    }

    /// The prompt of one sequence in pieces.
    pub(crate) fn prompt_chunks(&self, sequence: u32, length: u32) -> Vec<ScheduledBatch> {
        let starts = (0..length).step_by(CHUNK as usize);
        let chunks = starts.map(|start| {
            let mut batch = self.empty();
            let end = length.min(start + CHUNK);
            self.append(&mut batch, sequence, start, (start..end).map(|at| self.token(sequence, at)));
            batch
        });
        chunks.collect()
    }

    /// One step of all sequences, each with `context` tokens before it.
    pub(crate) fn decode(&self, next: &[u32], context: u32, params: &Arc<SamplingParams>) -> ScheduledBatch {
        let mut batch = self.empty();
        for (sequence, &token) in (0..self.sequences).zip(next) {
            self.append(&mut batch, sequence, context, [token]);
            want_logits(&mut batch, params);
        }
        batch
    }

    fn empty(&self) -> ScheduledBatch {
        ScheduledBatch::new(KvPlacement::Paged {
            block_size: self.block_size,
            tables: Vec::new(),
            table_start: Vec::new(),
        })
    }

    fn append(
        &self,
        batch: &mut ScheduledBatch,
        sequence: u32,
        start: u32,
        tokens: impl IntoIterator<Item = u32>,
    ) {
        let mut position = start;
        for token in tokens {
            batch.tokens.push(token);
            batch.positions.push(position);
            let block = self.block(sequence, position / self.block_size);
            batch.slots.push(block * self.block_size + position % self.block_size);
            position += 1;
        }
        batch.query_start.push(batch.tokens.len() as u32);
        batch.context_len.push(position);
        if let KvPlacement::Paged { tables, table_start, .. } = &mut batch.kv {
            table_start.push(tables.len() as u32);
            tables.extend((0..position.div_ceil(self.block_size)).map(|block| self.block(sequence, block)));
        }
    }

    /// The physical block of a sequence's logical one: sequences take turns, as they do when they grow together.
    fn block(&self, sequence: u32, logical: u32) -> u32 {
        debug_assert!(logical < self.blocks, "a sequence grew past the length it was made for");
        logical * self.sequences + sequence
    }

    fn token(&self, sequence: u32, at: u32) -> u32 {
        (sequence.wrapping_mul(7919).wrapping_add(at).wrapping_mul(2_654_435_761) >> 7) % self.vocab
    }
}

/// Asks for the logits of the last row, to be sampled.
fn want_logits(batch: &mut ScheduledBatch, params: &Arc<SamplingParams>) {
    batch.logit_rows.push(batch.tokens.len() as u32 - 1);
    let params = Arc::clone(params);
    batch.sampling.push(SampleRow { params, history: Vec::new(), prompt_len: 0, output_index: 0 });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_share_no_slot_and_keep_theirs() {
        let bench = BenchBatch::new(3, 37, 16, 1000);
        let mut seen = std::collections::HashSet::new();
        for sequence in 0..3 {
            assert!(
                bench
                    .prompt_chunks(sequence, 36)
                    .iter()
                    .flat_map(|chunk| &chunk.slots)
                    .all(|&slot| seen.insert(slot))
            );
        }
        let step = bench.decode(&[1, 2, 3], 36, &Arc::default());
        assert!(step.slots.iter().all(|&slot| seen.insert(slot)));
        assert!(seen.iter().all(|&slot| slot < 3 * 48));
        assert_eq!(step.context_len, [37; 3]);
        assert_eq!(step.logit_rows, [0, 1, 2]);
    }
}
