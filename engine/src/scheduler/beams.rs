//! The beams of a search: sequences of one request that go on together, fork and fall away.
//!
//! A beam that has computed its tokens pauses until all have, and the best continuations are chosen among all of theirs. The
//! first continuation of a beam goes on in its place; others are new sequences that wait, and start with its blocks. A beam
//! that pauses may be preempted: what it contributes is known. So a search needs no more memory at once than one sequence.

use super::Scheduler;
use crate::beam_search::{BeamSearch, Continuation, Hypotheses, best_continuations};
use crate::policy::SeqKey;
use crate::sequence::{Source, Status};
use crate::{Event, FinishReason, Sampled, TokenLogprob};

/// Places in the order of arrival for the sequences of one request.
pub(super) const PLACES: u64 = 1 << 24;

/// The beams of one request.
#[derive(Debug)]
pub(super) struct BeamGroup {
    /// Those under way, the best first; all have as many tokens.
    members: Vec<SeqKey>,
    hypotheses: Hypotheses,
    /// Members ever, for places in the order of arrival.
    ever: u64,
    /// Preemptions of members that are gone.
    preemptions: u32,
}

impl Scheduler {
    /// Begins a search with a sequence that was just submitted.
    pub(super) fn begin_search(&mut self, id: u64, search: BeamSearch, key: SeqKey) {
        let hypotheses = Hypotheses::new(search);
        let group = BeamGroup { members: vec![key], hypotheses, ever: 1, preemptions: 0 };
        self.searches.insert(id, group);
    }

    /// Takes the candidates for a beam's next token, and goes on when all beams of its request have theirs.
    pub(super) fn pause_beam(&mut self, key: SeqKey, sampled: Sampled) {
        let sequence = &mut self.sequences[key];
        sequence.status = Status::Paused;
        let id = sequence.id;
        let beam = sequence.beam.as_mut().expect("a beam pauses");
        beam.candidates = sampled.top.map_or_else(Vec::new, <[TokenLogprob]>::into_vec);
        assert!(!beam.candidates.is_empty(), "the executor gave no candidates for a beam");
        let members = &self.searches[&id].members;
        let is_ready =
            |&key: &SeqKey| self.sequences[key].beam.as_ref().is_some_and(|b| !b.candidates.is_empty());
        if members.iter().all(is_ready) {
            self.search_on(id);
        }
    }

    /// Chooses how the beams of a request go on.
    fn search_on(&mut self, id: u64) {
        let mut group = self.searches.remove(&id).expect("a beam has a group");
        let beam = |key: &SeqKey| self.sequences[*key].beam.as_ref().expect("a member is a beam");
        let beams = group.members.iter().map(beam).map(|beam| (beam.logprob, &beam.candidates[..]));
        let stops = self.sequences[group.members[0]].stop_tokens.len();
        let search = group.hypotheses.search;
        let best = best_continuations(search.candidates(stops), beams);

        let (width, largest_hold) = (search.width as usize, self.kv.largest_hold());
        let mut live = Vec::with_capacity(width);
        for (rank, &next) in best.iter().enumerate() {
            let parent = &self.sequences[group.members[next.parent]];
            match parent.end_with(next.token, largest_hold) {
                None => live.push(next),
                Some(reason) if rank < width => {
                    let output = &parent.tokens[parent.prompt_len as usize..];
                    group.hypotheses.add([output, &[next.token]].concat(), next.logprob, reason);
                }
                Some(_) => {}
            }
            if live.len() == width {
                break;
            }
        }
        let first = &self.sequences[group.members[0]];
        let (len, most) = (first.output_len() + 1, first.max_len - first.prompt_len);
        if group.hypotheses.suffice(live.first(), len, most) {
            self.end_search(id, group);
        } else {
            self.go_on(&mut group, &live);
            self.ids.insert(id, group.members[0]);
            self.searches.insert(id, group);
        }
    }

    /// Replaces the beams by their continuations.
    fn go_on(&mut self, group: &mut BeamGroup, live: &[Continuation]) {
        let parents = std::mem::take(&mut group.members);
        let heir = |parent| live.iter().position(|next| next.parent == parent);
        let heirs: Vec<Option<usize>> = (0..parents.len()).map(heir).collect();
        for (&key, _) in parents.iter().zip(&heirs).filter(|(_, heir)| heir.is_none()) {
            group.preemptions += self.leave(key).preemptions;
        }
        // Forks copy their parents' tokens, before those get one more.
        for (rank, next) in live.iter().enumerate() {
            let parent = parents[next.parent];
            let key = if heirs[next.parent] == Some(rank) {
                parent
            } else {
                group.ever += 1;
                self.fork_beam(parent, next, group.ever - 1)
            };
            group.members.push(key);
        }
        for (next, &key) in
            live.iter().zip(&group.members).filter(|&(next, &key)| parents[next.parent] == key)
        {
            self.continue_beam(key, next);
        }
    }

    /// Another continuation of a beam: it waits, to start with what that one has computed.
    fn fork_beam(&mut self, parent: SeqKey, next: &Continuation, place: u64) -> SeqKey {
        let from = &self.sequences[parent];
        let source = Source { key: parent, order: from.order, shared: from.len() };
        let first = from.order - from.order % PLACES;
        let fork = from.fork(source, first + place, next.token, next.logprob);
        let key = self.sequences.insert(fork);
        self.enqueue(key);
        key
    }

    /// Gives a beam that paused its next token.
    fn continue_beam(&mut self, key: SeqKey, next: &Continuation) {
        let sequence = &mut self.sequences[key];
        let was = sequence.status;
        sequence.extend_beam(next.token, next.logprob);
        match was {
            Status::Paused => sequence.status = Status::Running,
            // Preempted since.
            _ => {
                self.held -= 1;
                self.enqueue(key);
            }
        }
    }

    fn end_search(&mut self, id: u64, mut group: BeamGroup) {
        let cached = self.sequences[group.members[0]].cached;
        for key in std::mem::take(&mut group.members) {
            group.preemptions += self.leave(key).preemptions;
        }
        self.ids.remove(&id);
        let hypotheses = group.hypotheses.into_best();
        let reason = hypotheses.first().map_or(FinishReason::Length, |best| best.reason);
        self.events.push(Event::Hypotheses { id, hypotheses });
        let preemptions = group.preemptions;
        self.events.push(Event::Finished { id, reason, preemptions, cached_tokens: cached });
    }

    /// Ends a search without a result, if the request is one.
    pub(super) fn drop_search(&mut self, id: u64) -> bool {
        let Some(group) = self.searches.remove(&id) else { return false };
        group.members.into_iter().for_each(|key| _ = self.leave(key));
        self.ids.remove(&id);
        true
    }

    /// Preempts the last beam that pauses, for want of anything else to do: others of its request may lack its memory or its
    /// place. Whether there is one.
    pub(super) fn make_room_for_beams(&mut self) -> bool {
        let paused = self.running.iter().rev().find(|&&key| self.sequences[key].status == Status::Paused);
        let found = paused.copied();
        found.into_iter().for_each(|key| self.preempt(key));
        found.is_some()
    }
}
