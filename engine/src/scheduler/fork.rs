//! Several outputs of one prompt: its blocks are shared, and what is not full is copied. Where blocks are not shared, samples
//! compute the prompt each, and beams copy all.

use super::Scheduler;
use crate::kv::KvHold;
use crate::policy::SeqKey;
use crate::sequence::{Sequence, Source, Status};

impl Scheduler {
    /// Queues a fork of `source` that was just submitted, or holds it until the prompt is computed. Where batches end together it
    /// is not held: it would miss the batch of its source, and come when that has ended.
    pub(super) fn fork(&mut self, source: SeqKey, key: SeqKey, order: u64) {
        let from = &mut self.sequences[source];
        let place = from.order;
        let computes = matches!(from.status, Status::Waiting | Status::Running | Status::Held);
        let is_held = computes
            && self.share_blocks
            && !self.ends_together
            && matches!(self.layout, crate::KvLayout::Paged { .. })
            && from.computed + 1 < from.prompt_len;
        if is_held {
            from.forks.push((key, order));
        }
        from.is_source = true;
        let fork = &mut self.sequences[key];
        fork.source = Some(Source { key: source, order: place, shared: fork.prompt_len - 1 });
        if is_held {
            fork.status = Status::Held;
            self.held += 1;
        } else {
            self.waiting.push_back(key);
        }
    }

    /// Queues the forks of the sequences of this step that have computed their prompts now.
    pub(super) fn let_ready_forks_go(&mut self) {
        if self.held == 0 {
            return;
        }
        for index in 0..self.plan.run.len() {
            let (key, _) = self.plan.run[index];
            let ready = |s: &crate::sequence::Sequence| !s.forks.is_empty() && s.computed + 1 >= s.prompt_len;
            if self.sequences.find(key).is_some_and(ready) {
                self.let_forks_go(key);
            }
        }
    }

    /// Queues the forks of a sequence that has computed its prompt, or will not soon.
    pub(super) fn let_forks_go(&mut self, source: SeqKey) {
        for (key, order) in std::mem::take(&mut self.sequences[source].forks) {
            let Some(fork) = self.sequences.find_mut(key).filter(|fork| fork.order == order) else {
                continue;
            };
            debug_assert_eq!(fork.status, Status::Held);
            self.held -= 1;
            self.enqueue(key);
        }
    }

    /// Lets a sample that runs and has the prompt stand in for `source`, which is about to give its KV memory back: other samples
    /// then still start with the prompt, `source` itself among them if it was preempted.
    pub(super) fn name_heir(&mut self, source: SeqKey) {
        let from = &self.sequences[source];
        if !from.is_source || !self.share_blocks {
            return;
        }
        let (order, shared) = (from.order, from.prompt_len - 1);
        let is_fork = |s: &Sequence| s.source.is_some_and(|s| (s.key, s.order) == (source, order));
        let has_prompt = |s: &Sequence| s.computed >= shared && matches!(s.kv, KvHold::Paged(_));
        let heir = self.running.iter().copied().find(|&key| {
            let s = &self.sequences[key];
            s.status == Status::Running && is_fork(s) && has_prompt(s)
        });
        let Some(heir) = heir else { return };
        let inherited = Source { key: heir, order: self.sequences[heir].order, shared };
        for sequence in self.sequences.iter_mut().filter(|s| is_fork(s)) {
            sequence.source = Some(inherited);
        }
        self.sequences[source].source = Some(inherited);
        let heir = &mut self.sequences[heir];
        (heir.source, heir.is_source) = (None, true);
    }

    /// Copies the K and V of the tokens after `blocks` shared blocks from the source of a fork that was admitted: these lie in
    /// a block that both go on to fill, or in memory that is not shared.
    pub(super) fn copy_tail(&mut self, source: SeqKey, fork: SeqKey, blocks: usize) {
        self.forked |= blocks > 0;
        let (source, fork) = (&self.sequences[source], &self.sequences[fork]);
        let first = match &fork.kv {
            KvHold::Paged(table) => blocks as u32 * table.block_size(),
            KvHold::None | KvHold::Contiguous(_) => 0,
        };
        let (mut from, mut to) = (Vec::new(), Vec::new());
        source.kv.append_slots(first, fork.computed, &mut from);
        fork.kv.append_slots(first, fork.computed, &mut to);
        self.swap_space.copy_within(from.into_iter().zip(to).map(|(from, to)| [from, to]));
    }
}
