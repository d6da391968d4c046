//! Sampling on the GPU: packs the rules of a batch of rows and launches `kernels/cuda/sampling.cu`.
//!
//! The distribution is the CPU sampler's, and a choice is again a function of the row's own logits, rule, history and
//! uniform number. Draws are in the order of ids throughout, so where top-k or top-p cut, one uniform number may give
//! another token than on the CPU, which then draws in the order of probability.

use cudarc::driver::CudaEvent;

use super::backend::CudaBackend;
use super::device::{Arg, Device, DeviceVec, Grid, Kernel, Pinned};
use super::memory::CudaBuffer;
use crate::KernelError;
use crate::sampling::{Choice, SamplingRule};

/// Words of a row's rule: `RowRule` in `sampling.cu`.
const RULE_WORDS: usize = 16;
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

/// What one row of logits is sampled with.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// How the token is chosen.
    pub rule: SamplingRule,
    /// Tokens so far, for penalties; without penalties it is not looked at.
    pub history: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// Decides the draw; in [0, 1).
    pub uniform: f64,
    /// Whether the log-probability is wanted.
    pub logprob: bool,
}

/// Batches that may be under way.
const SLOTS: usize = 2;

/// Samples batches of rows of logits where they lie. Up to two batches may be under way, in the order they were begun.
#[derive(Debug)]
pub struct DeviceSampler {
    greedy: Kernel,
    general: Kernel,
    shape: Shape,
    max_rows: usize,
    /// Tokens of the last batch, then the bits of their log-probabilities.
    choices: DeviceVec<u32>,
    chunks: DeviceVec<u32>,
    /// Blocks of each row that are done; zero between launches.
    arrived: DeviceVec<u32>,
    /// The batch's rules and histories where the kernel reads them.
    batch: DeviceVec<u32>,
    /// The rows' copies where shared memory is too small for them; else empty.
    work: DeviceVec<f32>,
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
}

impl Slot {
    fn new(device: &Device, max_rows: usize) -> Result<Self, KernelError> {
        Ok(Self {
            read: device.pinned(2 * max_rows, WHAT)?,
            staging: device.pinned(max_rows * RULE_WORDS, WHAT)?,
            done: device.signal()?,
            rows: 0,
            logprobs: None,
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
        device.download_pinned(choices.ptr(), &mut self.read, logprobs.map_or(rows, |at| at + rows));
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
        let work = if shared { 0 } else { max_rows * shape.row_floats() };
        Ok(Self {
            greedy: device.overlapping_kernel("sample_greedy")?,
            general,
            shape,
            max_rows,
            choices: device.zeroed(2 * max_rows, WHAT)?,
            chunks: device.alloc(max_rows * shape.chunks() * CHUNK_WORDS, WHAT)?,
            arrived: device.zeroed(max_rows, WHAT)?,
            batch: device.alloc(max_rows * RULE_WORDS, WHAT)?,
            work: device.alloc(work, WHAT)?,
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

    /// Chooses a token for each of the first rows of `logits`, one a request, and waits for them. A log-probability
    /// that no request of the batch asked for may be NaN.
    ///
    /// # Errors
    /// When there are more requests than rows, another batch is under way, or the device failed.
    pub fn sample(
        &mut self,
        device: &Device,
        logits: &CudaBuffer,
        requests: &[SampleRequest<'_>],
    ) -> Result<Vec<Choice>, KernelError> {
        if self.under_way > 0 {
            return Err(KernelError::Shape("a batch to wait for while another is under way".into()));
        }
        self.begin(device, logits, requests)?;
        self.collect(device)
    }

    /// Begins to choose a token for each of the first rows of `logits`, one a request.
    ///
    /// # Errors
    /// When there are more requests than rows, two batches are under way, or the device failed.
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
            self.queue_greedy(device, logits, rows, logprobs.is_some())?;
        } else {
            self.queue(device, logits, requests, slot)?;
        }
        self.slots[slot].queue_read(device, &self.choices, rows, logprobs);
        self.under_way += 1;
        device.check()
    }

    /// As [`Self::begin`] where a graph has queued the greedy choices for `bucket` rows, log-probabilities included, of
    /// which the first `rows` are wanted.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_queued(&mut self, device: &Device, bucket: usize, rows: usize) -> Result<(), KernelError> {
        let slot = self.vacant(bucket)?;
        self.slots[slot].queue_read(device, &self.choices, rows, Some(bucket));
        self.under_way += 1;
        device.check()
    }

    /// Waits for the oldest batch under way.
    ///
    /// # Errors
    /// When there is none, or the device failed.
    pub fn collect(&mut self, device: &Device) -> Result<Vec<Choice>, KernelError> {
        if self.under_way == 0 {
            return Err(KernelError::Shape("no batch is being sampled".into()));
        }
        let Slot { read, done, rows, logprobs, .. } = &self.slots[self.oldest];
        device.wait(done)?;
        let words = read.values();
        let choices = (0..*rows).map(|row| Choice {
            token: words[row],
            logprob: logprobs.map_or(f32::NAN, |at| f32::from_bits(words[at + row])),
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
        let room = words.next_power_of_two();
        if words > self.slots[slot].staging.len() {
            self.slots[slot].staging = device.pinned(room, WHAT)?;
        }
        if words > self.batch.len() {
            // The batch under way may still read the old memory.
            device.synchronize()?;
            self.batch = device.alloc(room, WHAT)?;
        }
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
                Arg::Ptr(self.choices.ptr()),
                Arg::Ptr(self.choices.at(rows)),
                Arg::Ptr(self.work.ptr()),
                Arg::U32(self.shape.vocab as u32),
                Arg::U32(self.shape.per_block() as u32),
            ],
        );
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
        if vocab == 0 || u32::try_from(vocab).is_err() {
            return Err(KernelError::Shape(format!("a choice among {vocab} tokens")));
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

/// Whether the rule draws; else it takes the greatest.
fn draws(rule: &SamplingRule) -> bool {
    rule.temperature > 0.0
}

/// Whether the rule changes the logits of tokens seen.
fn penalizes(rule: &SamplingRule) -> bool {
    let none =
        rule.repetition_penalty == 1.0 && rule.presence_penalty == 0.0 && rule.frequency_penalty == 0.0;
    !none
}

/// Tokens seen that the kernel must know.
fn history<'a>(request: &SampleRequest<'a>) -> &'a [u32] {
    if penalizes(&request.rule) { request.history } else { &[] }
}

/// Words that a batch takes.
fn packed_words(requests: &[SampleRequest<'_>]) -> Result<usize, KernelError> {
    let words = requests.iter().map(|request| RULE_WORDS + history(request).len()).sum();
    match u32::try_from(words) {
        Ok(_) => Ok(words),
        Err(_) => Err(KernelError::Shape(format!("{words} tokens in the histories of a batch"))),
    }
}

/// Packs a batch: a rule for each row, then the histories of those with penalties.
fn pack(requests: &[SampleRequest<'_>], words: &mut [u32]) {
    let (rules, mut rest) = words.split_at_mut(requests.len() * RULE_WORDS);
    let mut at = rules.len();
    for (request, rule) in requests.iter().zip(rules.chunks_exact_mut(RULE_WORDS)) {
        let seen = history(request);
        rule.copy_from_slice(&rule_words(request, at, seen.len()));
        let (here, behind) = rest.split_at_mut(seen.len());
        here.copy_from_slice(seen);
        (rest, at) = (behind, at + seen.len());
    }
}

/// One row's rule as the kernel reads it; its history is `history_len` words from word `history` on.
fn rule_words(request: &SampleRequest<'_>, history: usize, history_len: usize) -> [u32; RULE_WORDS] {
    let rule = &request.rule;
    let uniform = request.uniform.to_bits();
    let [scale, scale_low] = scale(rule.temperature);
    // As on the CPU: what is less probable than `min_p` of the most probable lies this far below it.
    let min_p_offset = if rule.min_p > 0.0 { rule.temperature * rule.min_p.ln() } else { f32::NEG_INFINITY };
    [
        uniform as u32,
        (uniform >> 32) as u32,
        scale.to_bits(),
        scale_low.to_bits(),
        min_p_offset.to_bits(),
        rule.top_p.to_bits(),
        rule.top_k,
        rule.repetition_penalty.to_bits(),
        rule.presence_penalty.to_bits(),
        rule.frequency_penalty.to_bits(),
        history as u32,
        history_len as u32,
        request.prompt_len.min(history_len) as u32,
        0,
        0,
        0,
    ]
}

/// What turns a difference of logits into an exponent of 2, as the sum of two floats; zero for the greedy choice.
fn scale(temperature: f32) -> [f32; 2] {
    if temperature > 0.0 {
        // Bounded, so that no difference of logits, zero or infinite, becomes NaN.
        let scale = (1.0 / f64::from(temperature)).clamp(1e-30, 1e30) * std::f64::consts::LOG2_E;
        let high = scale as f32;
        [high, (scale - f64::from(high)) as f32]
    } else {
        [0.0; 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(rule: SamplingRule, history: &[u32]) -> SampleRequest<'_> {
        SampleRequest { rule, history, prompt_len: 2, uniform: 0.625, logprob: false }
    }

    fn packed(requests: &[SampleRequest<'_>]) -> Vec<u32> {
        let mut words = vec![u32::MAX; packed_words(requests).unwrap()];
        pack(requests, &mut words);
        words
    }

    #[test]
    fn rules_come_first_and_histories_behind_them() {
        let penalty = |repetition_penalty| SamplingRule { repetition_penalty, ..SamplingRule::default() };
        let words = packed(&[
            request(penalty(1.5), &[7, 8, 9]),
            request(penalty(1.0), &[1, 2, 3, 4]),
            request(penalty(0.5), &[]),
            request(penalty(2.0), &[5]),
        ]);
        assert_eq!(words.len(), 4 * RULE_WORDS + 4);
        assert_eq!(words[4 * RULE_WORDS..], [7, 8, 9, 5]);
        let spans: Vec<&[u32]> =
            words[..4 * RULE_WORDS].chunks(RULE_WORDS).map(|rule| &rule[10..13]).collect();
        // Where a history starts, its length, and how much of it is the prompt.
        assert_eq!(spans, [[64, 3, 2], [67, 0, 0], [67, 0, 0], [67, 1, 1]]);
    }

    #[test]
    fn a_rule_is_packed_as_the_kernel_reads_it() {
        let rule = SamplingRule {
            temperature: 0.5,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.25,
            repetition_penalty: 1.25,
            presence_penalty: -0.5,
            frequency_penalty: 0.75,
        };
        let words = packed(&[request(rule, &[])]);
        assert_eq!(u64::from(words[1]) << 32 | u64::from(words[0]), 0.625f64.to_bits());
        let float = |i: usize| f32::from_bits(words[i]);
        let scale = f64::from(float(2)) + f64::from(float(3));
        assert!((scale - 2.0 * std::f64::consts::LOG2_E).abs() < 1e-14);
        assert_eq!(float(4), 0.5 * 0.25f32.ln());
        assert_eq!([float(5), float(7), float(8), float(9)], [0.9, 1.25, -0.5, 0.75]);
        assert_eq!(words[6], 40);
        assert_eq!(words[13..], [0, 0, 0]);
    }

    #[test]
    fn what_is_no_positive_temperature_is_greedy() {
        for temperature in [0.0, -0.0, -1.0, f32::NAN, f32::NEG_INFINITY] {
            assert_eq!(scale(temperature), [0.0; 2]);
        }
        for temperature in [1e-40, 1e-30, 1.0, 1e30, f32::INFINITY] {
            assert!(scale(temperature)[0] > 0.0 && scale(temperature)[0].is_finite());
        }
    }

    #[test]
    fn no_min_p_cuts_nothing() {
        for min_p in [0.0, -1.0, f32::NAN] {
            let rule = SamplingRule { temperature: 1.0, min_p, ..SamplingRule::default() };
            assert_eq!(f32::from_bits(packed(&[request(rule, &[])])[4]), f32::NEG_INFINITY);
        }
    }

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
        assert!(Shape::new(0, (9, 0)).is_err());
    }
}
