//! Sampling on the GPU: packs the rules of a batch of rows and launches `kernels/cuda/sampling.cu`.
//!
//! The distribution is the CPU sampler's, and a choice is again a function of the row's own logits, rule, history and
//! uniform number. Draws are in the order of ids throughout, so where top-k or top-p cut, one uniform number may give
//! another token than on the CPU, which then draws in the order of probability.

mod rules;
mod top;

use cudarc::driver::CudaEvent;

use super::backend::CudaBackend;
use super::device::{Arg, Device, DeviceVec, Grid, Kernel, Pinned};
use super::memory::CudaBuffer;
use crate::KernelError;
use crate::sampling::Choice;

pub use rules::SampleRequest;
use rules::{RULE_WORDS, draws, newest_fed, pack, packed_words, penalizes};
use top::{Top, TopSlot};

/// Logits in a chunk, the unit of work of a warp.
const CHUNK: usize = 1024;
/// Chunks of a block of the greedy kernel, and its threads.
const GREEDY_CHUNKS: usize = 8;
const GREEDY_THREADS: u32 = 256;
/// Words that are kept of a chunk.
const CHUNK_WORDS: usize = 4;
const THREADS: u32 = 512;
/// What sampling's memory is called when it cannot be had.
const WHAT: &str = "sampling: lower the number of sequences";

/// Tokens of a vocabulary are fewer: the kernel sums 64-bit weights of up to 2^44 each.
const MOST_TOKENS: usize = 1 << 20;

/// Tokens of histories for which there is room from the start: a step's rows with penalties have as many as the KV memory
/// holds, or more where prompts are shared. 4 MiB, three times.
const HISTORY_ROOM: usize = 1 << 20;
/// The most probable tokens of each row for which there is room from the start: what a request may ask for, and a beam search of
/// 16 with stop tokens.
const TOP_ROOM: usize = 64;

/// Batches that may be under way.
const SLOTS: usize = 2;

/// What was found for one row.
#[derive(Debug, Clone, PartialEq)]
pub struct RowChoice {
    /// The token; its log-probability may be NaN where no request of the batch asked for it.
    pub choice: Choice,
    /// The most probable tokens, as many as the request asked for or the vocabulary has, the most probable first; of equal
    /// ones the lower id. Log-probabilities are of the logits before the rule.
    pub top: Vec<Choice>,
}

/// Samples batches of rows of logits where they lie. Up to two batches may be under way, in the order they were begun.
#[derive(Debug)]
pub struct DeviceSampler {
    greedy: Kernel,
    general: Kernel,
    shape: Shape,
    max_rows: usize,
    /// Tokens of the last batch, then the bits of their log-probabilities.
    choices: DeviceVec<u32>,
    /// A copy of the last batch's tokens where it has penalties, for histories of the next one: by the time that is sampled, a
    /// graph has put greedy choices over the originals.
    previous: DeviceVec<u32>,
    /// How many tokens that are: none where the last batch has no penalties.
    kept: usize,
    chunks: DeviceVec<u32>,
    /// Blocks of each row that are done; zero between launches.
    arrived: DeviceVec<u32>,
    /// The batch's rules and histories where the kernel reads them.
    batch: DeviceVec<u32>,
    /// The rows' copies where shared memory is too small for them; else empty.
    work: DeviceVec<f32>,
    top: Top,
    slots: [Slot; SLOTS],
    /// The slot of the oldest batch under way, and how many are.
    oldest: usize,
    under_way: usize,
}

/// The host's side of a batch under way.
#[derive(Debug)]
struct Slot {
    /// The choices, once `done`.
    read: Pinned<u32>,
    /// Rules and histories, packed.
    staging: Pinned<u32>,
    done: CudaEvent,
    rows: usize,
    /// First word of the log-probabilities in `read`.
    logprobs: Option<usize>,
    top: TopSlot,
}

impl Slot {
    fn new(device: &Device, max_rows: usize) -> Result<Self, KernelError> {
        Ok(Self {
            read: device.pinned(2 * max_rows, WHAT)?,
            staging: device.pinned(words_from_the_start(max_rows), WHAT)?,
            done: device.signal()?,
            rows: 0,
            logprobs: None,
            top: TopSlot::new(device, max_rows)?,
        })
    }

    /// Queues the copy of the choices for `rows` rows to the host.
    fn queue_read(
        &mut self,
        device: &Device,
        choices: &DeviceVec<u32>,
        rows: usize,
        logprobs: Option<usize>,
    ) {
        (self.rows, self.logprobs) = (rows, logprobs);
        device.download_pinned(choices.ptr(), &mut self.read, 0..logprobs.map_or(rows, |at| at + rows));
        device.record(&self.done);
    }
}

impl DeviceSampler {
    /// A sampler of up to `max_rows` rows of `vocab` logits.
    ///
    /// # Errors
    /// When memory cannot be had, or there are no logits.
    pub fn new(device: &Device, max_rows: usize, vocab: usize) -> Result<Self, KernelError> {
        let shape = Shape::new(vocab, device.info().capability)?;
        let general = device.kernel("sample")?;
        // Without room for the row in shared memory, the kernel works on a copy in device memory.
        let shared = general.allow_shared(shape.shared_bytes(true)).is_ok();
        let shape = Shape { shared, ..shape };
        if !shared {
            general.allow_shared(shape.shared_bytes(false))?;
        }
        let work = if shared { 0 } else { max_rows * shape.row_floats() };
        Ok(Self {
            greedy: device.overlapping_kernel("sample_greedy")?,
            general,
            shape,
            max_rows,
            choices: device.zeroed(2 * max_rows, WHAT)?,
            previous: device.zeroed(max_rows, WHAT)?,
            kept: 0,
            chunks: device.alloc(max_rows * shape.chunks() * CHUNK_WORDS, WHAT)?,
            arrived: device.zeroed(max_rows, WHAT)?,
            batch: device.alloc(words_from_the_start(max_rows), WHAT)?,
            work: device.alloc(work, WHAT)?,
            top: Top::new(device, max_rows, vocab)?,
            slots: [Slot::new(device, max_rows)?, Slot::new(device, max_rows)?],
            oldest: 0,
            under_way: 0,
        })
    }

    /// The most rows of a batch.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Where the last batch's tokens are in device memory, one word a row.
    pub(super) fn tokens_ptr(&self) -> u64 {
        self.choices.ptr()
    }

    /// Whether the greedy choice is all that these requests want, as [`Self::queue_greedy`] makes it.
    pub fn are_greedy(requests: &[SampleRequest<'_>]) -> bool {
        requests.iter().all(|request| !draws(&request.rule) && !penalizes(&request.rule))
    }

    /// Chooses a token for each of the first rows of `logits`, one a request, and waits for them.
    ///
    /// # Errors
    /// When there are more requests than rows, another batch is under way, or the device failed.
    pub fn sample(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        requests: &[SampleRequest<'_>],
    ) -> Result<Vec<RowChoice>, KernelError> {
        if self.under_way > 0 {
            return Err(KernelError::Shape("a batch to wait for while another is under way".into()));
        }
        self.begin(device, logits, requests)?;
        self.collect(device)
    }

    /// Begins to choose a token for each of the first rows of `logits`, one a request.
    ///
    /// # Errors
    /// When there are more requests than rows, two batches are under way, a history names a row that no batch has, or the
    /// device failed.
    pub fn begin(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        requests: &[SampleRequest<'_>],
    ) -> Result<(), KernelError> {
        let rows = requests.len();
        let slot = self.vacant(rows)?;
        device.bind()?;
        let plain = Self::are_greedy(requests);
        let logprobs = (!plain || requests.iter().any(|r| r.logprob)).then_some(rows);
        if plain {
            self.kept = 0;
            self.queue_greedy(device, logits, rows, logprobs.is_some())?;
        } else {
            self.queue(device, logits, requests, slot)?;
        }
        self.queue_reads(device, logits, requests, slot, logprobs)
    }

    /// As [`Self::begin`] where all requests are greedy and a graph has queued the choices for `bucket` rows,
    /// log-probabilities included, of which those of the requests are wanted.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_queued(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        bucket: usize,
        requests: &[SampleRequest<'_>],
    ) -> Result<(), KernelError> {
        let slot = self.vacant(bucket)?;
        self.kept = 0;
        self.queue_reads(device, logits, requests, slot, Some(bucket))
    }

    /// Queues what brings the results of a batch to the host.
    fn queue_reads(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        requests: &[SampleRequest<'_>],
        slot: usize,
        logprobs: Option<usize>,
    ) -> Result<(), KernelError> {
        let slot = &mut self.slots[slot];
        self.top.queue(device, CudaBackend::logits_ptr(logits), requests, &mut slot.top)?;
        slot.queue_read(device, &self.choices, requests.len(), logprobs);
        self.under_way += 1;
        device.check()
    }

    /// Waits for the oldest batch under way.
    ///
    /// # Errors
    /// When there is none, or the device failed.
    pub fn collect(&mut self, device: &Device) -> Result<Vec<RowChoice>, KernelError> {
        if self.under_way == 0 {
            return Err(KernelError::Shape("no batch is being sampled".into()));
        }
        let Slot { read, done, rows, logprobs, top, .. } = &self.slots[self.oldest];
        device.wait(done)?;
        let words = read.values();
        let mut tops = top.found();
        let choices = (0..*rows).map(|row| RowChoice {
            choice: Choice {
                token: words[row],
                logprob: logprobs.map_or(f32::NAN, |at| f32::from_bits(words[at + row])),
            },
            top: tops.next().unwrap_or_default(),
        });
        let choices = choices.collect();
        self.oldest = (self.oldest + 1) % SLOTS;
        self.under_way -= 1;
        Ok(choices)
    }

    /// Waits for all batches under way and forgets them.
    ///
    /// # Errors
    /// When the device failed.
    pub fn forget(&mut self, device: &Device) -> Result<(), KernelError> {
        while self.under_way > 0 {
            self.collect(device)?;
        }
        self.kept = 0;
        Ok(())
    }

    /// Queues the greedy choice for `rows` rows: one launch that can be captured.
    ///
    /// # Errors
    /// When there are more rows than the sampler was made for.
    pub fn queue_greedy(
        &self,
        device: &Device,
        logits: &CudaBuffer,
        rows: usize,
        logprobs: bool,
    ) -> Result<(), KernelError> {
        self.check_rows(rows)?;
        device.launch(
            &self.greedy,
            Grid::of(self.shape.chunks().div_ceil(GREEDY_CHUNKS) as u32, rows as u32, GREEDY_THREADS),
            &[
                Arg::Ptr(CudaBackend::logits_ptr(logits)),
                Arg::Ptr(self.choices.ptr()),
                Arg::Ptr(if logprobs { self.choices.at(rows) } else { 0 }),
                Arg::Ptr(self.chunks.ptr()),
                Arg::Ptr(self.arrived.ptr()),
                Arg::U32(self.shape.vocab as u32),
            ],
        );
        Ok(())
    }

    /// Queues the general kernel, with rules packed in the slot.
    fn queue(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        requests: &[SampleRequest<'_>],
        slot: usize,
    ) -> Result<(), KernelError> {
        let words = packed_words(requests)?;
        let kept = std::mem::take(&mut self.kept);
        if let Some(row) = newest_fed(requests)
            && row as usize >= kept
        {
            return Err(KernelError::Shape(format!(
                "a history with the token of row {row}, of {kept} that the batch before kept"
            )));
        }
        grow_pinned(device, &mut self.slots[slot].staging, words)?;
        grow(device, &mut self.batch, words)?;
        let staging = &mut self.slots[slot].staging;
        pack(requests, &mut staging.values_mut()[..words]);
        device.upload_pinned(staging, words, self.batch.ptr());
        let rows = requests.len();
        device.launch(
            &self.general,
            Grid {
                blocks: [rows as u32 * self.shape.cluster, 1, 1],
                threads: THREADS,
                shared_bytes: self.shape.shared_bytes(self.shape.shared),
            },
            &[
                Arg::Ptr(CudaBackend::logits_ptr(logits)),
                Arg::Ptr(self.batch.ptr()),
                Arg::Ptr(self.previous.ptr()),
                Arg::Ptr(self.choices.ptr()),
                Arg::Ptr(self.choices.at(rows)),
                Arg::Ptr(self.work.ptr()),
                Arg::U32(self.shape.vocab as u32),
                Arg::U32(self.shape.per_block() as u32),
            ],
        );
        if requests.iter().any(|request| penalizes(&request.rule)) {
            device.copy(self.choices.ptr(), self.previous.ptr(), rows * size_of::<u32>());
            self.kept = rows;
        }
        Ok(())
    }

    /// A slot for one more batch, of `rows` rows. What it held was collected, so nothing under way touches it.
    fn vacant(&self, rows: usize) -> Result<usize, KernelError> {
        self.check_rows(rows)?;
        if self.under_way == SLOTS {
            return Err(KernelError::Shape(format!(
                "{SLOTS} batches are being sampled and none was collected"
            )));
        }
        Ok((self.oldest + self.under_way) % SLOTS)
    }

    fn check_rows(&self, rows: usize) -> Result<(), KernelError> {
        if rows > self.max_rows {
            let most = self.max_rows;
            return Err(KernelError::Shape(format!("{rows} rows for a sampler of at most {most}")));
        }
        Ok(())
    }
}

/// Words of rules and histories for which there is room from the start.
fn words_from_the_start(max_rows: usize) -> usize {
    max_rows * RULE_WORDS + HISTORY_ROOM
}

/// Makes room for `words` words, of which the old ones are lost: for batches beyond what there is room for from the start.
fn grow(device: &Device, memory: &mut DeviceVec<u32>, words: usize) -> Result<(), KernelError> {
    if memory.len() < words {
        // The batch under way may still use the old memory.
        device.synchronize()?;
        *memory = device.alloc(words.next_power_of_two(), WHAT)?;
    }
    Ok(())
}

/// The same for memory of a vacant slot, which nothing under way uses.
fn grow_pinned(device: &Device, memory: &mut Pinned<u32>, words: usize) -> Result<(), KernelError> {
    if memory.len() < words {
        *memory = device.pinned(words.next_power_of_two(), WHAT)?;
    }
    Ok(())
}

/// How a row is laid over blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    vocab: usize,
    /// Blocks that work on one row together and read each other's shared memory: from compute capability 9.0 on.
    cluster: u32,
    /// Whether the row lies in their shared memory.
    shared: bool,
}

impl Shape {
    fn new(vocab: usize, capability: (i32, i32)) -> Result<Self, KernelError> {
        if !(1..MOST_TOKENS).contains(&vocab) {
            return Err(KernelError::Shape(format!(
                "a choice among {vocab} tokens: on a GPU there may be 1 to {}",
                MOST_TOKENS - 1
            )));
        }
        Ok(Self { vocab, cluster: if capability.0 >= 9 { 8 } else { 1 }, shared: true })
    }

    fn chunks(self) -> usize {
        self.vocab.div_ceil(CHUNK)
    }

    /// Chunks of a block.
    fn per_block(self) -> usize {
        self.chunks().div_ceil(self.cluster as usize)
    }

    /// Floats of a row with the chunks that fill it up.
    fn row_floats(self) -> usize {
        self.per_block() * self.cluster as usize * CHUNK
    }

    /// Shared memory of a block: a histogram and its sums, what is known of each chunk, and with `row` the logits.
    fn shared_bytes(self, row: bool) -> u32 {
        let chunk = 48 + if row { 4 * CHUNK } else { 0 };
        (16_896 + self.per_block() * chunk) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_laid_over_blocks() {
        let shape = Shape::new(128_256, (9, 0)).unwrap();
        assert_eq!((shape.chunks(), shape.per_block(), shape.row_floats()), (126, 16, 131_072));
        // Two blocks find room on one multiprocessor.
        assert_eq!(shape.shared_bytes(true), 83_200);
        let shape = Shape::new(262_144, (9, 0)).unwrap();
        assert!(shape.shared_bytes(true) <= 232_448 - 64);
        let shape = Shape::new(128_256, (8, 0)).unwrap();
        assert_eq!((shape.per_block(), shape.row_floats()), (126, 129_024));
        assert!(shape.shared_bytes(false) <= 48 << 10);
        assert_eq!(Shape::new(1, (9, 0)).unwrap().per_block(), 1);
        assert!(Shape::new(MOST_TOKENS - 1, (9, 0)).is_ok());
        for vocab in [0, MOST_TOKENS, usize::MAX] {
            assert!(Shape::new(vocab, (9, 0)).is_err(), "{vocab}");
        }
    }
}
