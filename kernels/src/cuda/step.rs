//! A step's input in device memory: all of it in one buffer, brought there by one copy.

use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::attention::{AttentionPlan, PlanBounds, Tuning};
use super::device::{Device, DeviceVec, Pinned};
use super::gemm::Gemm;
use crate::{FED, HeadShape, KernelError, KvIndex, NO_SLOT, StepInput};

/// Rows up to which a step's kernels start while the ones before them end. In larger steps blocks that wait take the
/// place of blocks that work: 256 rows of Llama-3.2-1B's shape took 3.60 ms a step so and 3.39 ms without, 32 rows 1.60
/// and 1.65 (an H100).
const OVERLAP_ROWS: usize = 64;

/// One step where the kernels read it. Addresses stay good until the next step begins.
#[derive(Debug, Clone, Copy)]
pub struct CudaStep {
    /// Rows computed: those of sequences, then padding.
    pub(super) rows: usize,
    /// Rows whose logits are computed.
    pub(super) logit_rows: usize,
    /// Whether any row is padding, or may be when the step's graph runs again.
    pub(super) padded: bool,
    /// Tokens that each row attends to; 0 for its whole context.
    pub(super) window: u32,
    /// Slots in a block; none in a contiguous layout.
    pub(super) block_size: Option<u32>,
    /// Whether there may be decode items: of a captured step there always may.
    pub(super) decodes: bool,
    /// Prefill items.
    pub(super) prefills: u32,
    pub(super) tokens: u64,
    /// The tokens of the last sampling.
    pub(super) sampled: u64,
    pub(super) positions: u64,
    pub(super) slots: u64,
    pub(super) logit_row_list: u64,
    /// First entry of each sequence in the tables, or its first slot.
    pub(super) start: u64,
    pub(super) tables: u64,
    pub(super) decode_items: u64,
    /// First decode item of each team of blocks.
    pub(super) decode_teams: u64,
    /// Rows of a prefill tile.
    pub(super) prefill_rows: u32,
    pub(super) prefill_items: u64,
    /// One word: the first padding row.
    pub(super) live_rows: u64,
}

/// A buffer that steps are packed into.
struct Staging {
    words: Pinned<u32>,
    /// When the last copy out of it is done.
    copied: CudaEvent,
}

/// The buffers that steps are packed into, by turns, and their image on the device.
///
/// With one buffer the host would wait, between two steps that overlap, until the card takes the first one's copy. With
/// two, the buffer at hand is that of the step before the one in flight, whose tokens have been collected.
pub(super) struct StepArena {
    device: Arc<Device>,
    staging: [Staging; 2],
    /// Whose turn it is.
    turn: usize,
    memory: DeviceVec<u32>,
    /// Where tokens are sampled to, and how many at most.
    sampled: (u64, usize),
    plan: AttentionPlan,
    tuning: Tuning,
    bounds: PlanBounds,
}

impl StepArena {
    /// Room for steps of up to `rows` rows, `sequences` sequences and `table_entries` block numbers.
    pub(super) fn new(
        device: Arc<Device>,
        rows: usize,
        sequences: usize,
        table_entries: usize,
        tuning: Tuning,
        bounds: PlanBounds,
    ) -> Result<Self, KernelError> {
        let items = bounds.decode_item_words(sequences) + bounds.prefill_item_words(rows, sequences);
        let words = 4 * rows + sequences + table_entries + items + 256;
        let what = "a step's input: lower the token budget, the number of sequences or max_model_len";
        let staging =
            || Ok::<_, KernelError>(Staging { words: device.pinned(words, what)?, copied: device.event()? });
        Ok(Self {
            staging: [staging()?, staging()?],
            turn: 0,
            memory: device.alloc(words, what)?,
            tuning,
            device,
            sampled: (0, 0),
            plan: AttentionPlan::default(),
            bounds,
        })
    }

    /// Tokens from [`FED`] on name words at `sampled`, of which there are `rows`.
    pub(super) fn feed_from(&mut self, sampled: u64, rows: usize) {
        self.sampled = (sampled, rows);
    }

    /// Packs a step and queues its copy. With `bucket`, the step is a decode of up to that many sequences whose graph
    /// is captured or run: it is padded to `bucket` rows, and addresses depend on `bucket` alone.
    pub(super) fn begin(
        &mut self,
        input: &StepInput<'_>,
        heads: HeadShape,
        bucket: Option<usize>,
    ) -> Result<CudaStep, KernelError> {
        self.device.bind()?;
        self.turn ^= 1;
        let staging = &mut self.staging[self.turn];
        // Only where nothing was read back since the step before the last can its copy still be on its way.
        staging
            .copied
            .synchronize()
            .map_err(|e| KernelError::Device(format!("a copy to the device: {e}")))?;
        let (sampled, sampled_rows) = self.sampled;
        if let Some(row) = input.tokens.iter().filter_map(|token| token.checked_sub(FED)).max()
            && row as usize >= sampled_rows
        {
            return Err(KernelError::Shape(format!(
                "a token from row {row} of {sampled_rows} that are sampled"
            )));
        }
        let batch = &input.batch;
        check_index(batch.kv, batch.context_len)?;
        let live = *batch.query_start.last().unwrap_or(&0) as usize;
        let rows = bucket.unwrap_or(input.tokens.len().max(batch.positions.len()));
        let sequences = bucket.unwrap_or(batch.context_len.len());
        let logit_rows = bucket.unwrap_or(input.logit_rows.len());
        let window = batch.window.unwrap_or(0);
        let tuning = Tuning { window, ..self.tuning };
        self.plan.update(batch.query_start, batch.context_len, heads, &tuning);
        let decode_room = bucket.map_or(self.plan.decode_items.as_flattened().len(), |sequences| {
            self.bounds.decode_item_words(sequences)
        });
        self.device.set_overlap(rows <= OVERLAP_ROWS);
        let mut packer = Packer { words: staging.words.values_mut(), used: 0, base: self.memory.ptr() };
        let (start, tables, block_size) = match batch.kv {
            KvIndex::Paged { block_size, tables, table_start } => (table_start, tables, Some(block_size)),
            KvIndex::Contiguous { start } => (start, &[][..], None),
        };
        let step = CudaStep {
            rows,
            logit_rows,
            // A batch runs in its own bucket, which is padded only where the next smaller batch has the same.
            padded: bucket.map_or(rows > live, |bucket| Gemm::padded_rows(bucket - 1) == bucket),
            window,
            block_size,
            decodes: bucket.is_some() || !self.plan.decode_items.is_empty(),
            prefills: self.plan.prefill_items.len() as u32,
            live_rows: packer.section(&[live as u32], 1, 0)?,
            decode_teams: packer.section(&self.plan.decode_teams, self.plan.decode_teams.len(), 0)?,
            prefill_rows: self.plan.prefill_rows,
            tokens: packer.section(input.tokens, rows, 0)?,
            sampled,
            positions: packer.section(batch.positions, rows, 0)?,
            slots: packer.section(batch.slots, rows, NO_SLOT)?,
            logit_row_list: packer.section(input.logit_rows, logit_rows, 0)?,
            start: packer.section(start, sequences, 0)?,
            decode_items: packer.section(self.plan.decode_items.as_flattened(), decode_room, 0)?,
            prefill_items: packer.section(
                self.plan.prefill_items.as_flattened(),
                self.plan.prefill_items.as_flattened().len(),
                0,
            )?,
            tables: packer.section(tables, tables.len(), 0)?,
        };
        let used = packer.used;
        self.device.upload_pinned(&staging.words, used, self.memory.ptr());
        self.device.record(&staging.copied);
        self.device.check()?;
        Ok(step)
    }
}

impl std::fmt::Debug for StepArena {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepArena").field("words", &self.memory.len()).finish_non_exhaustive()
    }
}

/// Checks that the index says where all of each context lies: kernels read it without looking for its end.
fn check_index(kv: KvIndex<'_>, context_len: &[u32]) -> Result<(), KernelError> {
    for (sequence, &context) in context_len.iter().enumerate() {
        let whole = match kv {
            KvIndex::Paged { block_size, tables, table_start } => {
                table_start.get(sequence).is_some_and(|&start| {
                    start as usize + (context as usize).div_ceil(block_size as usize) <= tables.len()
                })
            }
            KvIndex::Contiguous { start } => sequence < start.len(),
        };
        if !whole {
            return Err(KernelError::Shape(format!(
                "the {context} tokens of sequence {sequence} are not all inside the index"
            )));
        }
    }
    Ok(())
}

/// Appends arrays to the buffer, each at a multiple of 16 bytes.
struct Packer<'a> {
    words: &'a mut [u32],
    used: usize,
    base: u64,
}

impl Packer<'_> {
    /// Appends `values`, filled up to `len` words, and returns where the device finds them.
    fn section(&mut self, values: &[u32], len: usize, fill: u32) -> Result<u64, KernelError> {
        let len = len.max(values.len());
        let room = self.words.len();
        let Some(section) = self.words.get_mut(self.used..self.used + len) else {
            return Err(KernelError::Shape(format!(
                "a step of more than {room} words: fewer rows, sequences or blocks were announced"
            )));
        };
        section[..values.len()].copy_from_slice(values);
        section[values.len()..].fill(fill);
        let at = self.base + 4 * self.used as u64;
        self.used = (self.used + len).next_multiple_of(4).min(room);
        Ok(at)
    }
}

#[cfg(test)]
mod tests {
    use super::{Packer, check_index};
    use crate::KvIndex;

    #[test]
    fn contexts_lie_inside_the_index() {
        let paged = |tables, table_start| KvIndex::Paged { block_size: 16, tables, table_start };
        assert!(check_index(paged(&[4, 7, 2], &[0, 2]), &[32, 16]).is_ok());
        assert!(check_index(paged(&[4, 7, 2], &[0, 2]), &[32, 17]).is_err(), "a block too few");
        assert!(check_index(paged(&[4, 7, 2], &[0]), &[32, 16]).is_err(), "no table");
        assert!(check_index(paged(&[], &[]), &[]).is_ok());
        assert!(check_index(KvIndex::Contiguous { start: &[0] }, &[5]).is_ok());
        assert!(check_index(KvIndex::Contiguous { start: &[0] }, &[5, 5]).is_err());
    }

    #[test]
    fn sections_are_aligned_filled_and_bounded() {
        let mut words = [7; 20];
        let mut packer = Packer { words: &mut words, used: 0, base: 1 << 20 };
        assert_eq!(packer.section(&[1, 2, 3], 5, 9).unwrap(), 1 << 20);
        assert_eq!(packer.section(&[4], 1, 0).unwrap(), (1 << 20) + 32);
        assert!(packer.section(&[0; 9], 9, 0).is_err());
        assert_eq!(words[..9], [1, 2, 3, 9, 9, 7, 7, 7, 4]);
    }
}
