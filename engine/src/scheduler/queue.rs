//! Requests coming in and going out.

use std::time::Instant;

use super::Scheduler;
use super::beams::PLACES;
use crate::kv::{BlockNames, KvLayout};
use crate::policy::SeqKey;
use crate::sequence::{Sequence, Status};
use crate::{Event, FinishReason, Refusal, Request, SamplingParams};

impl Scheduler {
    /// Queues a request, or refuses it: with a reason, in an event.
    pub(crate) fn submit(&mut self, request: Request, now: Instant) {
        let id = request.id;
        if let Some((refusal, reason)) = self.refusal(&request) {
            return self.events.push(Event::Rejected { id, refusal, reason });
        }
        let ended = if request.max_tokens == 0 {
            Some(FinishReason::Length)
        } else {
            (request.true_output_len == Some(0)).then_some(FinishReason::Stop)
        };
        if let Some(reason) = ended {
            return self.events.push(Event::Finished { id, reason, preemptions: 0, cached_tokens: 0 });
        }
        let reservation = self.layout.reservation(&request, self.limits.max_model_len);
        let names = match self.layout {
            KvLayout::Paged { block_size } if self.prefix_cache => {
                let mut names = BlockNames::new(block_size, request.cache_salt);
                names.extend(&request.prompt);
                Some(names)
            }
            _ => None,
        };
        let max_model_len = self.limits.max_model_len;
        let source = request.fork_of.and_then(|source| self.ids.get(&source).copied());
        let search = request.beam;
        let order = self.arrivals * PLACES;
        let sequence = Sequence::new(request, order, now, max_model_len, reservation, names);
        self.arrivals += 1;
        let key = self.sequences.insert(sequence);
        self.ids.insert(id, key);
        if let Some(search) = search {
            self.begin_search(id, search, key);
        }
        match source {
            Some(source) => self.fork(source, key, order),
            None => self.waiting.push_back(key),
        }
    }

    /// Why a request is refused, if it is.
    fn refusal(&self, request: &Request) -> Option<(Refusal, String)> {
        if self.ids.contains_key(&request.id) {
            return Some((Refusal::DuplicateId, format!("a request with id {} is alive", request.id)));
        }
        if let Some(reason) = self.invalid(request) {
            return Some((Refusal::Invalid, reason));
        }
        if let Some(reason) = self.too_large(request) {
            return Some((Refusal::TooLarge, reason));
        }
        let waiting = self.waiting.len() + self.held as usize;
        (waiting >= self.limits.max_waiting as usize)
            .then(|| (Refusal::QueueFull, format!("{waiting} requests wait, as many as may")))
    }

    /// What is wrong with a request, if anything is.
    fn invalid(&self, request: &Request) -> Option<String> {
        if request.prompt.is_empty() {
            return Some("the prompt is empty".into());
        }
        let vocab_size = self.limits.vocab_size;
        if let Some(token) = request.prompt.iter().find(|&&token| token >= vocab_size) {
            return Some(format!("the prompt has token {token}, the vocabulary ends below {vocab_size}"));
        }
        if let Err(reason) = request.sampling.validate() {
            return Some(reason);
        }
        if let Some(search) = &request.beam {
            if let Err(reason) = search.validate() {
                return Some(reason);
            }
            let plain = SamplingParams { seed: request.sampling.seed, ..SamplingParams::default() };
            if *request.sampling != plain {
                return Some(
                    "a beam search takes the model's own probabilities: leave sampling's parameters out"
                        .into(),
                );
            }
            if request.fork_of.is_some() {
                return Some("a beam search is to be a fork of another request".into());
            }
            if self.ends_together {
                return Some(
                    "a beam search needs a policy that admits while others run: choose continuous".into(),
                );
            }
        }
        let id = request.fork_of?;
        if self.searches.contains_key(&id) {
            return Some(format!("it is to be a fork of request {id}, which is a beam search"));
        }
        let source = &self.sequences[*self.ids.get(&id)?];
        let is_other = (source.prompt(), source.cache_salt) != (&request.prompt, request.cache_salt);
        is_other.then(|| format!("it is to be a fork of request {id}, whose prompt or salt is another"))
    }

    /// What a request needs more of than one sequence can have, if it does.
    fn too_large(&self, request: &Request) -> Option<String> {
        let (prompt, max_model_len) = (request.prompt.len(), self.limits.max_model_len);
        if prompt >= max_model_len as usize {
            return Some(format!(
                "the prompt's {prompt} tokens leave no room for output in the {max_model_len} that a sequence may have"
            ));
        }
        let largest = self.kv.largest_hold();
        let needed = match self.layout {
            KvLayout::Paged { .. } => prompt as u32,
            KvLayout::Contiguous { .. } => self.layout.reservation(request, max_model_len),
        };
        (needed > largest)
            .then(|| format!("{needed} KV slots are needed and one sequence can have {largest}"))
    }

    /// Ends a request in any state. An unknown id is ignored.
    pub(crate) fn cancel(&mut self, id: u64) {
        let Some(&key) = self.ids.get(&id) else { return };
        if !self.drop_search(id) {
            self.withdraw(key);
        }
        self.events.push(Event::Cancelled { id });
        self.release_ended();
    }

    /// Takes a request's sequence out of its queue and off the books, and its KV memory back.
    pub(super) fn withdraw(&mut self, key: SeqKey) -> Sequence {
        let sequence = self.leave(key);
        self.ids.remove(&sequence.id);
        sequence
    }

    /// The same for one of a request's sequences, of which there may be others.
    pub(super) fn leave(&mut self, key: SeqKey) -> Sequence {
        let sequence = &self.sequences[key];
        let (order, status) = (sequence.order, sequence.status);
        match status {
            Status::Waiting => {
                let index = self.waiting.binary_search_by_key(&order, |&key| self.sequences[key].order);
                self.waiting.remove(index.expect("a waiting sequence is in its queue"));
            }
            Status::Running | Status::Paused | Status::Ended(_) => {
                let index = self.running.binary_search_by_key(&order, |&key| self.sequences[key].order);
                self.running.remove(index.expect("a running sequence is in its queue"));
            }
            Status::Held => self.held -= 1,
            Status::Leaving => {}
        }
        self.let_forks_go(key);
        self.name_heir(key);
        let mut sequence = self.sequences.remove(key);
        self.kv.release(&mut sequence.kv);
        self.swap_space.forget(&mut sequence);
        sequence
    }

    /// Puts a sequence among the waiting ones, at its place by arrival.
    pub(super) fn enqueue(&mut self, key: SeqKey) {
        let sequence = &mut self.sequences[key];
        sequence.status = Status::Waiting;
        let order = sequence.order;
        let place = self.waiting.partition_point(|&other| self.sequences[other].order < order);
        self.waiting.insert(place, key);
    }

    /// Moves a running sequence back to the waiting ones, and its KV memory to the free; what lay there goes to the swap
    /// space, if there is one and it has room. A beam that pauses is held until it goes on.
    pub(super) fn preempt(&mut self, key: SeqKey) {
        self.let_forks_go(key);
        self.name_heir(key);
        let swapped = self.swap_out(key);
        let sequence = &mut self.sequences[key];
        self.kv.release(&mut sequence.kv);
        if !swapped {
            sequence.computed = 0;
            sequence.prefill_len = sequence.len();
        }
        sequence.named = 0;
        sequence.draft.clear();
        sequence.preemptions += 1;
        self.preempted += 1;
        let paused = sequence.status == Status::Paused;
        self.running.retain(|&other| other != key);
        if paused {
            self.sequences[key].status = Status::Held;
            self.held += 1;
        } else {
            self.enqueue(key);
        }
    }

    /// Gives a waiting sequence KV memory and moves it to the running ones; false when there is too little.
    pub(super) fn admit(&mut self, key: SeqKey) -> bool {
        let start = self.sequences.start(&self.sequences[key], &self.kv);
        let plan = self.sequences.plan;
        let sequence = &mut self.sequences[key];
        let hold = self.kv.admit(sequence.len(), sequence.reservation, &start.blocks);
        let Some(hold) = hold else { return false };
        sequence.admitted = plan;
        sequence.computed = start.computed;
        // A fork's blocks have the names that its source gave them, or will get them from itself.
        sequence.named = if start.copied_from.is_some() { 0 } else { start.blocks.len() as u32 };
        // Of a beam that forks, what its request found when it began.
        if sequence.preemptions == 0 && sequence.output_len() == 0 {
            sequence.cached = sequence.computed;
        }
        sequence.kv = hold;
        sequence.status = Status::Running;
        let order = sequence.order;
        let index = self.waiting.binary_search_by_key(&order, |&other| self.sequences[other].order);
        self.waiting.remove(index.expect("a waiting sequence is in the queue"));
        let place = self.running.partition_point(|&other| self.sequences[other].order < order);
        self.running.insert(place, key);
        self.swap_in(key);
        if let Some(source) = start.copied_from {
            self.copy_tail(source, key, start.blocks.len());
        }
        true
    }
}
