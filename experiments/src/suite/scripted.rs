//! An executor without a model, for counting: each token is a function of the two before it, as they are read back from
//! a KV memory by slots. Over a small vocabulary such text soon repeats, so look-ups find something to propose.

use quire_engine::{
    EngineError, Executor, KvCopy, KvCopyKind, KvLayout, KvPlacement, SampleRow, Sampled, SampledQueue,
    ScheduledBatch, TokenLogprob,
};
use quire_kernels::generated::mix;

/// Tokens of the vocabulary.
pub(super) const VOCAB: u32 = 32;
/// Tokens of host memory at most.
const MOST_SWAPPED: usize = 1 << 22;

/// What stands in for a device; its tokens are the same wherever and however they are computed.
#[derive(Debug)]
pub(super) struct ScriptedExecutor {
    /// The token stored in each slot.
    kv: Vec<u32>,
    host: Vec<u32>,
    max_model_len: usize,
    rows: usize,
    next: Vec<u32>,
    queue: SampledQueue,
    /// Tokens copied within the KV memory.
    pub(super) copied: u64,
}

impl ScriptedExecutor {
    pub(super) fn new(slots: u32, max_model_len: u32, rows: u32) -> Self {
        Self {
            kv: vec![0; slots as usize],
            host: Vec::new(),
            max_model_len: max_model_len as usize,
            rows: rows as usize,
            next: Vec::new(),
            queue: SampledQueue::default(),
            copied: 0,
        }
    }
}

/// The slot of a position of a sequence of the batch.
fn slot(kv: &KvPlacement, sequence: usize, position: u32) -> usize {
    let slot = match kv {
        KvPlacement::Paged { block_size, tables, table_start } => {
            let entry = table_start[sequence] + position / block_size;
            tables[entry as usize] * block_size + position % block_size
        }
        KvPlacement::Contiguous { start } => start[sequence] + position,
    };
    slot as usize
}

/// What may stand in the place of `first`, which is the most probable; powers of two sum without rounding.
fn candidates(first: u32, count: u32) -> Box<[TokenLogprob]> {
    let candidate = |rank: u32| TokenLogprob {
        token: (first + 7 * rank) % VOCAB,
        logprob: -((rank + 1) as f32) * 0.25 - (first % 4) as f32 * 0.125,
    };
    (0..count.min(VOCAB)).map(candidate).collect()
}

impl Executor for ScriptedExecutor {
    fn kv_slots(&self) -> usize {
        self.kv.len()
    }
    fn max_model_len(&self) -> usize {
        self.max_model_len
    }
    fn vocab_size(&self) -> usize {
        VOCAB as usize
    }
    fn max_batch_rows(&self) -> usize {
        self.rows
    }

    fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
        self.queue.clear();
        Ok(())
    }

    /// A byte holds a token.
    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        let tokens = usize::try_from(bytes).ok().filter(|&tokens| tokens <= MOST_SWAPPED);
        let tokens = tokens.ok_or_else(|| {
            EngineError::Config(format!(
                "preemption.bytes is {bytes}: a replay has a token a byte, at most {MOST_SWAPPED}"
            ))
        })?;
        self.host = vec![0; tokens];
        Ok(tokens)
    }

    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        for KvCopy { kind, slots } in copies {
            for &[slot, other] in slots {
                let (slot, other) = (slot as usize, other as usize);
                match kind {
                    KvCopyKind::Within => {
                        self.kv[other] = self.kv[slot];
                        self.copied += 1;
                    }
                    KvCopyKind::Out => self.host[other] = self.kv[slot],
                    KvCopyKind::In => self.kv[slot] = self.host[other],
                }
            }
        }
        Ok(())
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        let tokens = self.queue.resolve(&batch.tokens)?;
        let real = batch.query_start[batch.sequences()] as usize;
        for (&slot, &token) in batch.slots[..real].iter().zip(tokens.iter()) {
            self.kv[slot as usize] = token;
        }
        self.next.clear();
        for &row in &batch.logit_rows {
            let sequence = batch.query_start.partition_point(|&start| start <= row) - 1;
            let position = batch.positions[row as usize];
            let stored = |position| u64::from(self.kv[slot(&batch.kv, sequence, position)]);
            let before = position.checked_sub(1).map_or(0, stored);
            self.next.push((mix(before << 32 | stored(position)) % u64::from(VOCAB)) as u32);
        }
        Ok(())
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        let sampled = rows.iter().zip(&self.next).map(|(row, &token)| Sampled {
            token,
            logprob: None,
            top: (row.params.top_logprobs > 0).then(|| candidates(token, row.params.top_logprobs)),
        });
        self.queue.push(sampled.collect())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.queue.pop()
    }
}
