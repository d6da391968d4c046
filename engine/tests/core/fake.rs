//! An executor whose tokens tell on the scheduler: each is a hash of the sequence's whole history as read back from a
//! KV memory by slots, so that a wrong slot, a stale one or one shared by mistake comes out as a wrong token.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quire_engine::{
    Engine, EngineConfig, EngineError, Event, Executor, FinishReason, Hypothesis, KvCopy, KvCopyKind,
    KvLayout, KvPlacement, Progress, Request, SampleRow, Sampled, SampledQueue, SamplingParams,
    ScheduledBatch, StepStats, TokenLogprob,
};

pub(crate) const VOCAB: u32 = 1000;

/// The token after `history`: of (token, position) pairs, so that a stored token at a wrong place counts as wrong.
fn hash(history: impl Iterator<Item = (u32, u32)>) -> u32 {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for (token, position) in history {
        state = (state ^ u64::from(token) ^ (u64::from(position) << 32)).wrapping_mul(0x0000_0100_0000_01b3);
        state ^= state >> 29;
    }
    (state % u64::from(VOCAB)) as u32
}

/// The token after `history`, computed without an engine.
pub(crate) fn next_token(history: &[u32]) -> u32 {
    hash(history.iter().copied().zip(0..))
}

/// The token after a history of this length, or another one where one in `wrong` is to be.
pub(crate) fn spoil(token: u32, history: usize, wrong: u32) -> u32 {
    let is_wrong = wrong > 0 && (token + history as u32).is_multiple_of(wrong);
    if is_wrong { (token + 1) % VOCAB } else { token }
}

/// What might come after `history`, the most probable first: the first is [`next_token`].
pub(crate) fn candidates(history: &[u32], count: u32) -> Box<[TokenLogprob]> {
    candidates_after(hash(history.iter().copied().zip(0..)), count)
}

fn candidates_after(first: u32, count: u32) -> Box<[TokenLogprob]> {
    let mut logprob = 0.0;
    let candidate = |rank: u32| {
        let token = (first + rank * 37) % VOCAB;
        logprob -= 0.05 + (first * 7 + rank * 13) as f32 % 11.0 / 10.0;
        TokenLogprob { token, logprob }
    };
    (0..count.min(VOCAB)).map(candidate).collect()
}

#[derive(Debug, Clone)]
pub(crate) struct Fake {
    /// Token and position stored in each slot.
    pub(crate) kv: Vec<(u32, u32)>,
    /// The same of host memory, a byte a token.
    pub(crate) host: Vec<(u32, u32)>,
    pub(crate) max_model_len: usize,
    pub(crate) rows: usize,
    /// Rows of logits that it takes.
    pub(crate) logit_rows: usize,
    /// Histories behind the last batch's rows of logits.
    pub(crate) logits: Vec<Vec<(u32, u32)>>,
    /// Samplings to be collected.
    pub(crate) queue: SampledQueue,
    /// Of the tokens it samples one in so many is wrong; none when 0.
    pub(crate) wrong: u32,
    /// Forward passes until it fails or panics, if it is to.
    pub(crate) fail_after: Option<u32>,
    pub(crate) panic_after: Option<u32>,
    pub(crate) step_time: Duration,
}

impl Fake {
    pub(crate) fn new(slots: usize, max_model_len: usize, rows: usize) -> Self {
        Self {
            kv: vec![(u32::MAX, u32::MAX); slots],
            host: Vec::new(),
            max_model_len,
            rows,
            logit_rows: rows,
            logits: Vec::new(),
            queue: SampledQueue::default(),
            wrong: 0,
            fail_after: None,
            panic_after: None,
            step_time: Duration::ZERO,
        }
    }
}

fn slot(kv: &KvPlacement, sequence: usize, position: u32) -> u32 {
    match kv {
        KvPlacement::Paged { block_size, tables, table_start } => {
            let entry = table_start[sequence] + position / block_size;
            if let Some(&end) = table_start.get(sequence + 1) {
                assert!(entry < end, "a context reaches into the next sequence's table");
            }
            tables[entry as usize] * block_size + position % block_size
        }
        KvPlacement::Contiguous { start } => start[sequence] + position,
    }
}

fn count_down(counter: &mut Option<u32>) -> bool {
    let due = *counter == Some(0);
    *counter = counter.map(|n| n.saturating_sub(1));
    due
}

impl Executor for Fake {
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
    fn max_logit_rows(&self) -> usize {
        self.logit_rows
    }

    fn prepare(&mut self, _: KvLayout, _: &mut dyn FnMut(usize, usize)) -> Result<(), EngineError> {
        self.queue.clear();
        Ok(())
    }

    fn reserve_host(&mut self, bytes: u64) -> Result<usize, EngineError> {
        self.host = vec![(u32::MAX, u32::MAX); bytes as usize];
        Ok(self.host.len())
    }

    fn copy_kv(&mut self, copies: &[KvCopy]) -> Result<(), EngineError> {
        for KvCopy { kind, slots } in copies {
            for &[slot, host] in slots {
                let (slot, host) = (slot as usize, host as usize);
                let gone = (u32::MAX, u32::MAX);
                match kind {
                    KvCopyKind::Within => self.kv[host] = self.kv[slot],
                    KvCopyKind::Out => self.host[host] = self.kv[slot],
                    KvCopyKind::In => self.kv[slot] = std::mem::replace(&mut self.host[host], gone),
                }
            }
        }
        Ok(())
    }

    fn forward(&mut self, batch: &ScheduledBatch) -> Result<(), EngineError> {
        if count_down(&mut self.fail_after) {
            return Err(EngineError::Config("the device is on fire".into()));
        }
        assert!(!count_down(&mut self.panic_after), "the device melted");
        std::thread::sleep(self.step_time);
        let rows = batch.rows();
        assert!(rows <= self.rows && batch.positions.len() == rows && batch.slots.len() == rows);
        assert_eq!(batch.query_start.len(), batch.sequences() + 1);
        assert_eq!(batch.logit_rows.len(), batch.sampling.len());
        assert!(batch.logit_rows.len() <= self.logit_rows, "{} rows of logits", batch.logit_rows.len());
        let real = batch.query_start[batch.sequences()] as usize;
        assert_eq!(rows - real, batch.padding as usize);
        assert!(batch.slots[real..].iter().all(|&slot| slot == quire_kernels::NO_SLOT));
        let stored: HashSet<u32> = batch.slots[..real].iter().copied().collect();
        assert_eq!(stored.len(), real, "two rows store to one slot");

        let tokens = self.queue.resolve(&batch.tokens)?;
        // Everything is stored before anything is read, as on a device.
        for sequence in 0..batch.sequences() {
            let rows = batch.query_start[sequence]..batch.query_start[sequence + 1];
            assert!(!rows.is_empty(), "a sequence without rows");
            for (row, back) in rows.clone().zip((0..rows.len() as u32).rev()) {
                let row = row as usize;
                assert_eq!(batch.positions[row] + back + 1, batch.context_len[sequence]);
                assert_eq!(batch.slots[row], slot(&batch.kv, sequence, batch.positions[row]));
                self.kv[batch.slots[row] as usize] = (tokens[row], batch.positions[row]);
            }
        }
        self.logits.clear();
        for sequence in 0..batch.sequences() {
            let rows = batch.query_start[sequence]..batch.query_start[sequence + 1];
            for row in rows.filter(|row| batch.logit_rows.contains(row)) {
                let context = 0..=batch.positions[row as usize];
                self.logits.push(context.map(|p| self.kv[slot(&batch.kv, sequence, p) as usize]).collect());
            }
        }
        assert_eq!(self.logits.len(), batch.logit_rows.len());
        Ok(())
    }

    fn sample(&mut self, rows: &[SampleRow]) -> Result<(), EngineError> {
        assert_eq!(rows.len(), self.logits.len());
        let sampled = rows.iter().zip(&self.logits).map(|(row, context)| {
            let prompt_len = context.len() - row.output_index as usize;
            if row.params.needs_history() {
                // Presence and frequency count outputs alone.
                let first = if row.params.repetition_penalty == 1.0 { prompt_len } else { 0 };
                let history = self.queue.resolve(&row.history).expect("what was sampled before");
                assert!(history.iter().eq(context[first..].iter().map(|(token, _)| token)));
                assert_eq!(row.prompt_len as usize, prompt_len - first);
            } else {
                assert!(row.history.is_empty(), "a history is cloned for nobody");
            }
            let token = spoil(hash(context.iter().copied()), context.len(), self.wrong);
            Sampled { token, logprob: None, top: Some(candidates_after(token, row.params.top_logprobs)) }
        });
        self.queue.push(sampled.collect())
    }

    fn collect(&mut self) -> Result<Vec<Sampled>, EngineError> {
        self.queue.pop()
    }
}

/// A request for `output` tokens after a prompt of `prompt` tokens of its own.
pub(crate) fn request(id: u64, prompt: u32, output: u32) -> Request {
    Request {
        id,
        prompt: (0..prompt).map(|i| (id as u32 * 131 + i * 7) % VOCAB).collect(),
        max_tokens: output,
        true_output_len: None,
        stop_tokens: Arc::from([]),
        sampling: Arc::new(SamplingParams::default()),
        fork_of: None,
        beam: None,
        priority: 0,
        cache_salt: 0,
    }
}

/// The output of a request computed alone, without an engine; `largest` is the most KV slots it could have.
pub(crate) fn reference(request: &Request, max_model_len: u32, largest: u32) -> (Vec<u32>, FinishReason) {
    let mut history = request.prompt.clone();
    loop {
        let token = next_token(&history);
        history.push(token);
        let output = &history[request.prompt.len()..];
        let stopped = request.stop_tokens.contains(&token)
            || request.true_output_len.is_some_and(|len| output.len() >= len as usize);
        let reason = if stopped {
            FinishReason::Stop
        } else if output.len() >= request.max_tokens as usize || history.len() >= max_model_len as usize {
            FinishReason::Length
        } else if history.len() > largest as usize {
            FinishReason::KvExhausted
        } else {
            continue;
        };
        return (output.to_vec(), reason);
    }
}

/// What became of one request.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) tokens: Vec<u32>,
    /// What a beam search found.
    pub(crate) hypotheses: Vec<Hypothesis>,
    /// The last event.
    pub(crate) end: Option<Event>,
}

/// Steps an engine until nothing is alive, checking everything after each; returns the steps. Ends are kept in
/// `outcomes` by id.
pub(crate) fn drain(
    engine: &mut Engine<Fake>,
    now: &mut Instant,
    outcomes: &mut std::collections::BTreeMap<u64, Outcome>,
) -> Vec<StepStats> {
    let mut steps = Vec::new();
    while engine.has_work() {
        match turn(engine, *now, outcomes) {
            Progress::Ran(stats) => steps.push(stats),
            Progress::Began => {}
            Progress::Idle { until: Some(until) } => *now = until.max(*now),
            Progress::Idle { until: None } => assert!(!engine.has_work(), "stuck with {engine:?}"),
        }
        *now += Duration::from_millis(1);
        assert!(steps.len() < 200_000, "no end");
    }
    steps
}

/// Submits requests together and serves them to their end.
pub(crate) fn serve(
    mut engine: Engine<Fake>,
    requests: &[Request],
) -> (std::collections::BTreeMap<u64, Outcome>, Vec<StepStats>) {
    let (mut now, mut outcomes) = (Instant::now(), std::collections::BTreeMap::new());
    requests.iter().for_each(|request| engine.submit(request.clone(), now));
    let steps = drain(&mut engine, &mut now, &mut outcomes);
    (outcomes, steps)
}

/// A count of all steps.
pub(crate) fn sum(steps: &[StepStats], of: fn(&StepStats) -> u32) -> u32 {
    steps.iter().map(of).sum()
}

/// One step, checked.
pub(crate) fn turn(
    engine: &mut Engine<Fake>,
    now: Instant,
    outcomes: &mut std::collections::BTreeMap<u64, Outcome>,
) -> Progress {
    let output = engine.step(now).expect("the fake executor does not fail");
    engine.check_integrity();
    for event in output.events {
        let id = event.id();
        let outcome = outcomes.entry(id).or_default();
        assert!(outcome.end.is_none(), "request {id} goes on after its end: {event:?}");
        match event {
            Event::Token { sampled, .. } => outcome.tokens.push(sampled.token),
            Event::Hypotheses { hypotheses, .. } => outcome.hypotheses = hypotheses,
            end => outcome.end = Some(end),
        }
    }
    if let Progress::Ran(stats) = &output.progress {
        let batch = &stats.batch;
        assert!(batch.prefill_tokens + batch.decode_tokens > 0);
        assert!(batch.kv.total() as usize <= engine.executor().kv_slots());
    }
    output.progress
}

/// An engine over `slots` KV slots.
pub(crate) fn engine(config: &EngineConfig, slots: usize, max_model_len: usize) -> Engine<Fake> {
    let rows = config.scheduler.token_budget as usize;
    Engine::new(Fake::new(slots, max_model_len, rows), config).expect("the settings are valid")
}
