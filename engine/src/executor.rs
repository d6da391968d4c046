//! What the scheduler hands to a device, and what comes back.

use std::borrow::Cow;
use std::collections::VecDeque;

pub use quire_kernels::FED;
use quire_kernels::{AttentionBatch, KvIndex, NO_SLOT, StepInput};

use crate::speculation::DraftSpan;
use crate::{EngineError, KvLayout, SamplingParams};

/// Where each sequence's context lies; the owned form of `quire_kernels::KvIndex`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvPlacement {
    /// Blocks of `block_size` slots.
    Paged {
        /// Slots in a block.
        block_size: u32,
        /// Physical blocks of all sequences, concatenated.
        tables: Vec<u32>,
        /// Offset of each sequence's first entry in `tables`.
        table_start: Vec<u32>,
    },
    /// One region a sequence.
    Contiguous {
        /// First slot of each sequence's region.
        start: Vec<u32>,
    },
}

/// One step's work: a ragged batch of prefill chunks and decodes alike. Plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledBatch {
    /// Token ids, sequences concatenated; then `padding` padding rows. A token that is still to be sampled is [`FED`]
    /// plus its row among those that the last forward pass's sampling chooses for.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// KV slot of each row, `quire_kernels::NO_SLOT` for padding.
    pub slots: Vec<u32>,
    /// First row of each sequence and one past the last: `[sequences + 1]`.
    pub query_start: Vec<u32>,
    /// Tokens in each sequence's context, this step's included: `[sequences]`.
    pub context_len: Vec<u32>,
    /// Where contexts lie.
    pub kv: KvPlacement,
    /// Rows whose logits are wanted: the last row of each sequence whose known tokens are all computed, and its proposals'.
    pub logit_rows: Vec<u32>,
    /// How to sample each of them.
    pub sampling: Vec<SampleRow>,
    /// Rows that hold proposals of tokens (speculative decoding).
    pub drafts: Vec<DraftSpan>,
    /// Padding rows at the end (static batching).
    pub padding: u32,
}

impl ScheduledBatch {
    /// An empty batch over contexts placed as in `kv`, which is emptied.
    pub fn new(kv: KvPlacement) -> Self {
        let mut batch = Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            query_start: Vec::new(),
            context_len: Vec::new(),
            kv,
            logit_rows: Vec::new(),
            sampling: Vec::new(),
            drafts: Vec::new(),
            padding: 0,
        };
        batch.clear();
        batch
    }

    /// Rows, padding included.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.context_len.len()
    }

    /// The batch as kernels take it, with these token ids in place of its own.
    pub(crate) fn input_of<'a>(&'a self, tokens: &'a [u32], window: Option<u32>) -> StepInput<'a> {
        StepInput { tokens, ..self.input(window) }
    }

    /// The batch as kernels take it, for a model whose rows attend to `window` tokens
    /// ([`ModelConfig::window`](crate::model::ModelConfig::window)).
    pub fn input(&self, window: Option<u32>) -> StepInput<'_> {
        let kv = match &self.kv {
            KvPlacement::Paged { block_size, tables, table_start } => {
                KvIndex::Paged { block_size: *block_size, tables, table_start }
            }
            KvPlacement::Contiguous { start } => KvIndex::Contiguous { start },
        };
        let batch = AttentionBatch {
            positions: &self.positions,
            slots: &self.slots,
            query_start: &self.query_start,
            context_len: &self.context_len,
            kv,
            window,
        };
        StepInput { tokens: &self.tokens, batch, logit_rows: &self.logit_rows }
    }

    /// Empties the batch and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        self.query_start.clear();
        self.query_start.push(0);
        self.context_len.clear();
        match &mut self.kv {
            KvPlacement::Paged { tables, table_start, .. } => {
                tables.clear();
                table_start.clear();
            }
            KvPlacement::Contiguous { start } => start.clear(),
        }
        self.logit_rows.clear();
        self.sampling.clear();
        self.drafts.clear();
        self.padding = 0;
    }

    /// Adds rows of a sequence of `other`, which runs over the same KV memory: `tokens` from `position` on, with a token to
    /// be sampled after the last as `sampling` says.
    pub(crate) fn add_rows_of(
        &mut self,
        other: &ScheduledBatch,
        sequence: u32,
        position: u32,
        tokens: &[u32],
        sampling: Option<SampleRow>,
    ) {
        let context = position + tokens.len() as u32;
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(position..context);
        match (&other.kv, &mut self.kv) {
            (
                KvPlacement::Paged { block_size, tables, table_start },
                KvPlacement::Paged { tables: own, table_start: own_start, .. },
            ) => {
                let table = &tables[table_start[sequence as usize] as usize..];
                let slot = |at: u32| table[(at / block_size) as usize] * block_size + at % block_size;
                self.slots.extend((position..context).map(slot));
                own_start.push(own.len() as u32);
                own.extend_from_slice(&table[..context.div_ceil(*block_size) as usize]);
            }
            (KvPlacement::Contiguous { start }, KvPlacement::Contiguous { start: own }) => {
                let first = start[sequence as usize];
                self.slots.extend(first + position..first + context);
                own.push(first);
            }
            _ => unreachable!("both are of one layout"),
        }
        self.query_start.push(self.tokens.len() as u32);
        self.context_len.push(context);
        if let Some(sampling) = sampling {
            self.logit_rows.push(self.tokens.len() as u32 - 1);
            self.sampling.push(sampling);
        }
    }

    /// Puts a token in the place of the proposal at `index` of a span.
    pub(crate) fn set_draft(&mut self, span: usize, index: u32, token: u32) {
        let span = self.drafts[span];
        self.tokens[(span.row + index + 1) as usize] = token;
        let rows = &mut self.sampling[span.sample as usize..=(span.sample + span.drafted) as usize];
        let known = rows[0].history.len();
        for row in &mut rows[index as usize + 1..] {
            if let Some(place) = row.history.get_mut(known + index as usize) {
                *place = token;
            }
        }
    }

    /// Adds padding rows after the last sequence.
    pub(crate) fn pad(&mut self, rows: u32) {
        let total = self.rows() + rows as usize;
        self.tokens.resize(total, 0);
        self.positions.resize(total, 0);
        self.slots.resize(total, NO_SLOT);
        self.padding += rows;
    }
}

/// Tokens whose K and V are copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvCopy {
    /// Whence and where.
    pub kind: KvCopyKind,
    /// Pairs of a KV slot and a slot of host memory; within the KV memory, of a slot and the one that it is copied to.
    pub slots: Vec<[u32; 2]>,
}

/// Whence and where K and V are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCopyKind {
    /// From slots of the KV memory to others.
    Within,
    /// To host memory.
    Out,
    /// From host memory.
    In,
}

/// How to sample one row of logits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleRow {
    /// Parameters of the request.
    pub params: std::sync::Arc<SamplingParams>,
    /// Tokens so far for penalties: prompt and output, or the output alone where no penalty is on the prompt; empty when the
    /// parameters need none. The last one may still be to be sampled, as in [`ScheduledBatch::tokens`]: then it is
    /// `FED + row`.
    pub history: Vec<u32>,
    /// Length of the prompt within `history`.
    pub prompt_len: u32,
    /// Index of the output token to be sampled: with the request's seed it fixes the random numbers, so that
    /// sampling too does not depend on batching.
    pub output_index: u32,
}

/// A token that might come next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the unmodified distribution.
    pub logprob: f32,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability under the unmodified distribution, when asked for.
    pub logprob: Option<f32>,
    /// The most probable tokens here, when asked for: as many as that, the most probable first; of equal ones the lower id.
    pub top: Option<Box<[TokenLogprob]>>,
}

/// Samplings that may be begun and not collected.
pub const IN_FLIGHT: usize = 2;

/// Runs batches on a device; owns the weights and the KV memory.
///
/// A step is a [`forward`](Executor::forward) and a [`sample`](Executor::sample), which begin it, and a
/// [`collect`](Executor::collect), which waits for its tokens. Steps take effect in the order they were begun.
pub trait Executor: Send {
    /// Whether a step that was begun runs while the host does something else, so that scheduling the next one meanwhile
    /// saves time.
    fn runs_beside_host(&self) -> bool {
        false
    }
    /// KV slots it has: the pool's size in tokens.
    fn kv_slots(&self) -> usize;
    /// The longest sequence (prompt and output) the model and the tables allow.
    fn max_model_len(&self) -> usize;
    /// Size of the vocabulary: token ids are below it.
    fn vocab_size(&self) -> usize;
    /// Rows a batch may have.
    fn max_batch_rows(&self) -> usize;
    /// Sequences a batch may have; as many as rows where the executor sets no limit of its own.
    fn max_sequences(&self) -> usize {
        self.max_batch_rows()
    }
    /// Rows of logits that a step may want.
    fn max_logit_rows(&self) -> usize {
        self.max_sequences()
    }
    /// Layers of its model; none where there is none that [`Self::forward_layers`] could leave early.
    fn layers(&self) -> Option<usize> {
        None
    }
    /// Takes `bytes` of host memory for K and V that are swapped out, in place of what it had; returns for how many tokens
    /// that is.
    ///
    /// # Errors
    /// When the executor cannot swap, or there is no such memory.
    fn reserve_host(&mut self, _bytes: u64) -> Result<usize, EngineError> {
        Err(EngineError::Config("this executor cannot swap: choose preemption by recomputation".into()))
    }
    /// Begins to copy K and V, in this order: after the steps begun before, and before those begun after.
    ///
    /// # Errors
    /// When no host memory was reserved for what needs it, or the device fails.
    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError>;
    /// Makes ready for batches of this layout, and forgets samplings that were not collected: called by an engine before
    /// its first step. The first time it may take seconds; `progress` hears the parts done and their number.
    ///
    /// # Errors
    /// When the executor does not support the layout, or the device fails.
    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError>;
    /// Begins to compute the batch, storing K and V and leaving the logits of `logit_rows` on the device.
    ///
    /// # Errors
    /// When the device fails; the engine then ends.
    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError>;
    /// As [`Self::forward`] with the first `layers` layers alone, whose output is taken for the last one's.
    ///
    /// # Errors
    /// When the executor cannot ([`Self::layers`]), or the device fails.
    fn forward_layers(&mut self, _batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        Err(EngineError::Config(format!("this executor cannot leave its model after {layers} layers")))
    }
    /// Begins to sample each row of the last forward pass's logits. Tokens of a row's history that are not collected yet are
    /// named as [`SampleRow::history`] says.
    ///
    /// # Errors
    /// When the device fails, the rows are not those of the last forward pass, or [`IN_FLIGHT`] samplings were not
    /// collected.
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError>;
    /// Waits for the oldest sampling that was not collected: a token for each of its rows.
    ///
    /// # Errors
    /// When the device fails, or there is none.
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError>;
}

impl<E: Executor + ?Sized> Executor for Box<E> {
    fn runs_beside_host(&self) -> bool {
        (**self).runs_beside_host()
    }
    fn kv_slots(&self) -> usize {
        (**self).kv_slots()
    }
    fn max_model_len(&self) -> usize {
        (**self).max_model_len()
    }
    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }
    fn max_batch_rows(&self) -> usize {
        (**self).max_batch_rows()
    }
    fn max_sequences(&self) -> usize {
        (**self).max_sequences()
    }
    fn max_logit_rows(&self) -> usize {
        (**self).max_logit_rows()
    }
    fn layers(&self) -> Option<usize> {
        (**self).layers()
    }
    fn forward_layers(&mut self, batch: &ScheduledBatch, layers: usize) -> Result<(), EngineError> {
        (**self).forward_layers(batch, layers)
    }
    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        (**self).reserve_host(bytes)
    }
    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        (**self).copy_kv(copies)
    }
    fn prepare(
        &mut self,
        layout: KvLayout,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<(), EngineError> {
        (**self).prepare(layout, progress)
    }
    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        (**self).forward(batch)
    }
    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        (**self).sample(rows)
    }
    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        (**self).collect()
    }
}

/// The samplings of an executor that computes each at once, until they are collected.
#[derive(Debug, Clone, Default)]
pub struct SampledQueue {
    waiting: VecDeque<Vec<Sampled>>,
    /// Tokens of the last sampling, which the next batch may name.
    last: Vec<u32>,
}

impl SampledQueue {
    /// Takes a sampling in.
    ///
    /// # Errors
    /// [`EngineError::Config`] when [`IN_FLIGHT`] wait already.
    pub fn push(&mut self, sampled: Vec<Sampled>) -> Result<(), EngineError> {
        if self.waiting.len() == IN_FLIGHT {
            return Err(EngineError::Config(format!("{IN_FLIGHT} samplings were begun and none collected")));
        }
        self.last.clear();
        self.last.extend(sampled.iter().map(|sampled| sampled.token));
        self.waiting.push_back(sampled);
        Ok(())
    }

    /// The oldest sampling.
    ///
    /// # Errors
    /// [`EngineError::Config`] when there is none.
    pub fn pop(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.waiting.pop_front().ok_or_else(|| EngineError::Config("no sampling was begun".into()))
    }

    /// Forgets all samplings.
    pub fn clear(&mut self) {
        self.waiting.clear();
        self.last.clear();
    }

    /// Tokens of a batch or of a history, those that the last sampling chose filled in.
    ///
    /// # Errors
    /// [`EngineError::Config`] when a token names a row that was not sampled.
    pub fn resolve<'a>(&self, tokens: &'a [u32]) -> Result<Cow<'a, [u32]>, EngineError> {
        if tokens.iter().all(|&token| token < FED) {
            return Ok(Cow::Borrowed(tokens));
        }
        let resolve = |&token: &u32| match token.checked_sub(FED) {
            None => Ok(token),
            Some(row) => self.last.get(row as usize).copied().ok_or_else(|| {
                EngineError::Config(format!("a token from row {row} of {} sampled", self.last.len()))
            }),
        };
        tokens.iter().map(resolve).collect()
    }
}
