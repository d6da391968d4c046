//! One request under way: plain data.

use std::sync::Arc;
use std::time::Instant;

use crate::kv::{BlockNames, BlockTable, KvHold, KvMemory};
use crate::policy::{SeqKey, SeqView};
use crate::{FinishReason, Request, SamplingParams, TokenLogprob};

/// Where a sequence stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// In no queue and without KV memory: a fork until its source has computed the prompt, or a beam that was preempted as
    /// it paused.
    Held,
    /// In the queue, without KV memory.
    Waiting,
    /// Holds KV memory and has tokens to compute.
    Running,
    /// Holds KV memory and computes nothing until the other beams of its request are as far.
    Paused,
    /// It computes nothing more, for its length or its last token ended it; it holds its KV memory until its batch ends
    /// (static batching).
    Ended(FinishReason),
    /// It ended and gave its KV memory back, and its last token is still to come.
    Leaving,
}

/// A sequence alive whose K and V another starts with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    pub(crate) key: SeqKey,
    /// Its place in the order of arrival, which tells it from a later one of the same key.
    pub(crate) order: u64,
    /// Tokens that are the same in both.
    pub(crate) shared: u32,
}

/// One beam of a search.
#[derive(Debug, Default)]
pub(crate) struct Beam {
    /// Sum of the log-probabilities of its output.
    pub(crate) logprob: f64,
    /// What may come next, the most probable first; known when its tokens are computed.
    pub(crate) candidates: Vec<TokenLogprob>,
}

/// One request under way, or one beam of it.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: u64,
    /// Position in the order of arrival.
    pub(crate) order: u64,
    pub(crate) arrival: Instant,
    pub(crate) priority: u8,
    pub(crate) status: Status,
    /// Prompt, then output. Where `awaited`, the last one is a placeholder.
    pub(crate) tokens: Vec<u32>,
    /// Row, among the rows that the step under way samples, of the last token, which is not known yet.
    pub(crate) awaited: Option<u32>,
    pub(crate) prompt_len: u32,
    /// Tokens whose K and V are stored: a prefix of `tokens`.
    pub(crate) computed: u32,
    /// Tokens that the step under way computes, proposals included.
    pub(crate) scheduled: u32,
    /// Tokens proposed to follow: for the next step, or those that the step under way computes.
    pub(crate) draft: Vec<u32>,
    /// Tokens before this position are prefill: the prompt, and after a preemption all that was known then.
    pub(crate) prefill_len: u32,
    /// Length at which `max_tokens` or the model's limit ends it.
    pub(crate) max_len: u32,
    /// Length at which its trace ends it, if known.
    pub(crate) true_len: Option<u32>,
    /// Slots a contiguous layout reserves for it.
    pub(crate) reservation: u32,
    pub(crate) kv: KvHold,
    /// Where in host memory the K and V of its computed tokens lie, while it waits and they were swapped out.
    pub(crate) swapped: Option<BlockTable>,
    /// Whom it may share with.
    pub(crate) cache_salt: u64,
    /// The sequence that it is a fork of.
    pub(crate) source: Option<Source>,
    /// What a search knows of it, if it is a beam.
    pub(crate) beam: Option<Beam>,
    /// Forks that are held until its prompt is computed, and their places.
    pub(crate) forks: Vec<(SeqKey, u64)>,
    /// Whether other samples were to start with its prompt.
    pub(crate) is_source: bool,
    /// The plan that admitted it last.
    pub(crate) admitted: u64,
    /// The names of its full blocks, where there is a prefix cache.
    pub(crate) names: Option<BlockNames>,
    /// Blocks, from the first on, that the KV memory knows by their names.
    pub(crate) named: u32,
    /// Prompt tokens that it did not compute when it was admitted first: found in the cache, or, of a fork, its source's.
    pub(crate) cached: u32,
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) sampling: Arc<SamplingParams>,
    pub(crate) preemptions: u32,
}

impl Sequence {
    /// A waiting sequence from a request that was checked.
    pub(crate) fn new(
        request: Request,
        order: u64,
        arrival: Instant,
        max_model_len: u32,
        reservation: u32,
        names: Option<BlockNames>,
    ) -> Self {
        let prompt_len = request.prompt.len() as u32;
        Self {
            id: request.id,
            order,
            arrival,
            priority: request.priority,
            status: Status::Waiting,
            tokens: request.prompt,
            awaited: None,
            prompt_len,
            computed: 0,
            scheduled: 0,
            draft: Vec::new(),
            prefill_len: prompt_len,
            max_len: prompt_len.saturating_add(request.max_tokens).min(max_model_len),
            true_len: request.true_output_len.map(|output| prompt_len.saturating_add(output)),
            reservation,
            kv: KvHold::None,
            swapped: None,
            cache_salt: request.cache_salt,
            source: None,
            beam: request.beam.map(|_| Beam::default()),
            forks: Vec::new(),
            is_source: false,
            admitted: 0,
            names,
            named: 0,
            cached: 0,
            sampling: match request.beam {
                None => request.sampling,
                Some(search) => {
                    let top_logprobs = search.candidates(request.stop_tokens.len());
                    Arc::new(SamplingParams { top_logprobs, ..SamplingParams::default() })
                }
            },
            stop_tokens: request.stop_tokens,
            preemptions: 0,
        }
    }

    /// A waiting sequence that begins with all tokens of this beam and goes on with another one.
    pub(crate) fn fork(&self, source: Source, order: u64, token: u32, logprob: f64) -> Self {
        let mut fork = Self {
            order,
            status: Status::Waiting,
            tokens: self.tokens.clone(),
            computed: 0,
            // What it starts with is there, or else all of it is prefill.
            prefill_len: self.len(),
            kv: KvHold::None,
            swapped: None,
            source: Some(source),
            beam: None,
            forks: Vec::new(),
            is_source: false,
            draft: Vec::new(),
            names: self.names.clone(),
            stop_tokens: Arc::clone(&self.stop_tokens),
            sampling: Arc::clone(&self.sampling),
            preemptions: 0,
            named: 0,
            ..*self
        };
        fork.extend_beam(token, logprob);
        fork
    }

    /// Appends a beam's next token; `logprob` is the sum with that token's.
    pub(crate) fn extend_beam(&mut self, token: u32, logprob: f64) {
        self.tokens.push(token);
        self.beam = Some(Beam { logprob, candidates: Vec::new() });
        if let Some(names) = &mut self.names {
            names.extend(&self.tokens);
        }
    }

    /// Tokens, the awaited one included.
    #[inline]
    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The prompt.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len as usize]
    }

    /// Tokens to compute.
    #[inline]
    pub(crate) fn pending(&self) -> u32 {
        if self.is_idle() { 0 } else { self.len() - self.computed }
    }

    #[inline]
    fn status_ended(&self) -> bool {
        matches!(self.status, Status::Ended(_) | Status::Leaving)
    }

    /// Whether it has nothing to compute now.
    fn is_idle(&self) -> bool {
        self.status_ended() || self.status == Status::Paused
    }

    /// Output tokens, the awaited one included.
    #[inline]
    pub(crate) fn output_len(&self) -> u32 {
        self.len() - self.prompt_len
    }

    /// KV slots it will have filled when it ends, as far as its request tells. The last token's K and V are never
    /// computed.
    #[inline]
    pub(crate) fn final_kv(&self) -> u32 {
        if self.status_ended() {
            return self.computed;
        }
        self.true_len.map_or(self.max_len, |len| len.min(self.max_len)).saturating_sub(1)
    }

    /// Whether its last token, which is known, ends it. Where its trace ends it counts as the token that says so.
    #[inline(always)]
    pub(crate) fn end(&self, largest_hold: u32) -> Option<FinishReason> {
        let last = *self.tokens.last()?;
        self.end_at(self.len(), last, largest_hold)
    }

    /// The same with one more token.
    pub(crate) fn end_with(&self, token: u32, largest_hold: u32) -> Option<FinishReason> {
        self.end_at(self.len() + 1, token, largest_hold)
    }

    fn end_at(&self, len: u32, last: u32, largest_hold: u32) -> Option<FinishReason> {
        if self.true_len.is_some_and(|end| len >= end) || self.stop_tokens.contains(&last) {
            return Some(FinishReason::Stop);
        }
        self.length_ends(len, largest_hold)
    }

    /// Whether its length ends it, whatever its last token is. `largest_hold` is the most KV it could ever have: the
    /// next step would need a slot for every token.
    #[inline]
    pub(crate) fn end_by_length(&self, largest_hold: u32) -> Option<FinishReason> {
        self.length_ends(self.len(), largest_hold)
    }

    fn length_ends(&self, len: u32, largest_hold: u32) -> Option<FinishReason> {
        if len >= self.max_len {
            Some(FinishReason::Length)
        } else if len > largest_hold {
            Some(FinishReason::KvExhausted)
        } else {
            None
        }
    }

    /// Puts a token in the place of the last one, which was awaited, and names the block that it fills.
    #[inline]
    pub(crate) fn settle(&mut self, token: u32) {
        self.awaited = None;
        if let Some(last) = self.tokens.last_mut() {
            *last = token;
        }
        if let Some(names) = &mut self.names {
            names.extend(&self.tokens);
        }
    }

    /// Makes the names of the blocks known that are full and computed by now.
    #[inline]
    pub(crate) fn name_blocks(&mut self, kv: &mut KvMemory) {
        if self.names.is_some() {
            self.name_full_blocks(kv);
        }
    }

    fn name_full_blocks(&mut self, kv: &mut KvMemory) {
        let Some(names) = &self.names else { return };
        let full = names.as_slice().len().min((self.computed / names.block_size()) as usize);
        let first = self.named as usize;
        if full > first {
            kv.name(&self.kv, first, &names.as_slice()[first..full]);
            self.named = full as u32;
        }
    }

    /// What policies see of it while it runs.
    #[inline(always)]
    fn view(&self, key: SeqKey, kv: &KvMemory) -> SeqView {
        SeqView {
            key,
            id: self.id,
            priority: self.priority,
            arrival: self.arrival,
            prompt_len: self.prompt_len,
            len: self.len(),
            drafted: self.draft.len() as u32,
            computed: self.computed,
            max_len: self.max_len,
            kv_slots: self.kv.slots(),
            idle: self.is_idle(),
            preemptions: self.preemptions,
            reservation: self.reservation,
            shared_blocks: 0,
            own_blocks: kv.own_blocks(&self.kv),
        }
    }
}

/// What a waiting sequence would start with.
#[derive(Debug, Default)]
pub(crate) struct Start {
    /// Full blocks that it shares.
    pub(crate) blocks: Vec<u32>,
    /// Tokens that need not be computed.
    pub(crate) computed: u32,
    /// Whose K and V of the tokens after those blocks are copied.
    pub(crate) copied_from: Option<SeqKey>,
}

/// All sequences alive, by key.
#[derive(Debug)]
pub(crate) struct SequenceTable {
    entries: Vec<Option<Sequence>>,
    /// Whether forks share the blocks of their sources.
    share_blocks: bool,
    /// Number of the plan that is made or applied.
    pub(crate) plan: u64,
    vacant: Vec<u32>,
}

impl SequenceTable {
    pub(crate) fn new(share_blocks: bool) -> Self {
        Self { entries: Vec::new(), share_blocks, plan: 0, vacant: Vec::new() }
    }

    pub(crate) fn insert(&mut self, sequence: Sequence) -> SeqKey {
        if let Some(index) = self.vacant.pop() {
            self.entries[index as usize] = Some(sequence);
            return SeqKey(index);
        }
        self.entries.push(Some(sequence));
        SeqKey(self.entries.len() as u32 - 1)
    }

    pub(crate) fn remove(&mut self, key: SeqKey) -> Sequence {
        self.vacant.push(key.0);
        self.entries[key.0 as usize].take().expect("a key in the queues names a sequence alive")
    }

    /// What a waiting sequence would start with: what was swapped out, what its source computed, or blocks of the prefix cache. At
    /// least one token is left to compute.
    pub(crate) fn start(&self, sequence: &Sequence, kv: &KvMemory) -> Start {
        if sequence.swapped.is_some() {
            return Start { computed: sequence.computed, ..Start::default() };
        }
        let cached = sequence.names.as_ref().map_or_else(Start::default, |names| {
            let blocks = kv.find(names.as_slice(), (sequence.len() - 1) / names.block_size());
            Start { computed: blocks.len() as u32 * names.block_size(), blocks, copied_from: None }
        });
        let Some(Source { key, order, shared }) = sequence.source else { return cached };
        // What a preempted fork left in the cache is more than it shares, and does not go when its source does.
        if cached.computed <= shared
            && let Some(source) = self.find(key).filter(|s| s.order == order && s.computed >= shared)
            // Of one that the same plan admits, the plan did not know.
            && source.admitted < self.plan
        {
            match &source.kv {
                KvHold::None => {}
                KvHold::Paged(table) if self.share_blocks => {
                    let blocks = table.blocks()[..(shared / table.block_size()) as usize].to_vec();
                    return Start { blocks, computed: shared, copied_from: Some(key) };
                }
                // All is copied: for beams, to whom this happens in every step.
                KvHold::Paged(_) | KvHold::Contiguous(_) if sequence.beam.is_some() => {
                    return Start { blocks: Vec::new(), computed: shared, copied_from: Some(key) };
                }
                KvHold::Paged(_) | KvHold::Contiguous(_) => {}
            }
        }
        cached
    }

    /// What policies see of a running sequence.
    #[inline(always)]
    pub(crate) fn view_running(&self, key: SeqKey, kv: &KvMemory) -> SeqView {
        self[key].view(key, kv)
    }

    /// What policies see of a waiting sequence.
    pub(crate) fn view_waiting(&self, key: SeqKey, kv: &KvMemory) -> SeqView {
        let sequence = &self[key];
        let start = self.start(sequence, kv);
        // A beam that starts from the cache now copies all where others that the plan admits take the cached blocks first: it
        // counts as sharing none.
        let may_copy = !self.share_blocks && sequence.beam.is_some() && sequence.source.is_some();
        let shared_blocks = if may_copy { 0 } else { kv.in_use(&start.blocks) };
        SeqView { computed: start.computed, shared_blocks, ..sequence.view(key, kv) }
    }

    /// All sequences, to change.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.entries.iter_mut().flatten()
    }

    /// All sequences.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.entries.iter().flatten()
    }

    /// The sequence of a key, if it is alive.
    #[inline]
    pub(crate) fn find_mut(&mut self, key: SeqKey) -> Option<&mut Sequence> {
        self.entries.get_mut(key.0 as usize)?.as_mut()
    }

    /// The sequence of a key that came from outside, if it is alive.
    #[inline]
    pub(crate) fn find(&self, key: SeqKey) -> Option<&Sequence> {
        self.entries.get(key.0 as usize)?.as_ref()
    }
}

impl std::ops::Index<SeqKey> for SequenceTable {
    type Output = Sequence;

    #[inline]
    fn index(&self, key: SeqKey) -> &Sequence {
        self.entries[key.0 as usize].as_ref().expect("a key in the queues names a sequence alive")
    }
}

impl std::ops::IndexMut<SeqKey> for SequenceTable {
    #[inline]
    fn index_mut(&mut self, key: SeqKey) -> &mut Sequence {
        self.entries[key.0 as usize].as_mut().expect("a key in the queues names a sequence alive")
    }
}
