//! The mechanism: keeps the sequences and their KV memory, and applies what a policy plans.
//!
//! Policies decide and cannot break anything: [`Scheduler::schedule`] checks every line of a plan before it acts on
//! it, and the books are balanced in every step.

mod apply;
mod beams;
mod commit;
mod fork;
mod propose;
mod queue;
mod swap;

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use self::beams::BeamGroup;
use self::commit::AwaitedRows;
pub(crate) use self::commit::Verified;
use self::swap::SwapSpace;
use crate::config::Limits;
use crate::kv::KvMemory;
use crate::policy::{Plan, SchedulerPolicy, SchedulerView, SeqKey};
use crate::sequence::{SequenceTable, Status};
use crate::speculation::Acceptance;
use crate::stats::BatchStats;
use crate::{EngineConfig, EngineError, Event, KvLayout, ScheduledBatch};

/// What a policy's plan came to.
#[derive(Debug)]
pub(crate) enum Scheduled {
    /// A batch to execute.
    Batch(BatchStats),
    /// Nothing to run; plan again at that time, or when something happens.
    Idle(Option<Instant>),
}

/// The sequences alive and the KV memory they share.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    layout: KvLayout,
    /// Whether full blocks are kept for later requests that begin alike.
    prefix_cache: bool,
    /// Whether forks share the blocks of their sources.
    share_blocks: bool,
    kv: KvMemory,
    sequences: SequenceTable,
    /// Sequences with KV memory, in order of arrival.
    running: Vec<SeqKey>,
    /// Sequences without, in order of arrival.
    waiting: VecDeque<SeqKey>,
    /// Of each request alive its sequence, or one of its beams.
    ids: HashMap<u64, SeqKey>,
    /// The beams of each request that is a search.
    searches: HashMap<u64, BeamGroup>,
    plan: Plan,
    /// Sequences that the scheduled step samples for and how many rows each has, in the order of the batch's `logit_rows`.
    sampled: Vec<(SeqKey, u32)>,
    /// The same of the step that advanced last and whose tokens are not known yet.
    awaited: Vec<AwaitedRows>,
    /// What decides which proposals are accepted.
    acceptance: Acceptance,
    swap_space: SwapSpace,
    /// Forks that are in no queue yet.
    held: u32,
    /// Whether blocks were ever shared by forks.
    forked: bool,
    ends_together: bool,
    /// Whether a sequence may have ended that is still among the running ones.
    ended: bool,
    /// Whether tokens are proposed.
    speculates: bool,
    /// Preemptions since the last step.
    preempted: u32,
    arrivals: u64,
    events: Vec<Event>,
}

impl Scheduler {
    pub(crate) fn new(
        limits: Limits,
        config: &EngineConfig,
        acceptance: Acceptance,
        [slots, host_slots]: [usize; 2],
        policy: &dyn SchedulerPolicy,
    ) -> Result<Self, EngineError> {
        let &EngineConfig { kv: layout, prefix_cache, share_blocks, .. } = config;
        Ok(Self {
            limits,
            layout,
            prefix_cache,
            share_blocks,
            kv: KvMemory::new(layout, slots, limits.max_model_len)?,
            sequences: SequenceTable::new(share_blocks),
            running: Vec::new(),
            waiting: VecDeque::new(),
            ids: HashMap::new(),
            searches: HashMap::new(),
            plan: Plan::default(),
            sampled: Vec::new(),
            awaited: Vec::new(),
            acceptance,
            swap_space: SwapSpace::new(host_slots),
            held: 0,
            forked: false,
            ends_together: policy.ends_together(),
            ended: false,
            speculates: false,
            preempted: 0,
            arrivals: 0,
            events: Vec::new(),
        })
    }

    /// An empty batch of this scheduler's layout.
    pub(crate) fn empty_batch(&self) -> ScheduledBatch {
        ScheduledBatch::new(self.layout.placement())
    }

    /// Requests alive.
    pub(crate) fn alive(&self) -> usize {
        self.ids.len()
    }

    /// Whether events wait to be taken.
    pub(crate) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// The events since the last call.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Asks the policy for a plan, applies it and fills `batch`. The step before it need not be settled: its tokens
    /// then stand in the batch as rows of it.
    // Not inlined: its instructions are counted by its name (configs/suites/ci.toml).
    #[inline(never)]
    pub(crate) fn schedule(
        &mut self,
        policy: &mut dyn SchedulerPolicy,
        now: Instant,
        batch: &mut ScheduledBatch,
    ) -> Result<Scheduled, EngineError> {
        batch.clear();
        self.sampled.clear();
        let mut plan = std::mem::take(&mut self.plan);
        plan.clear();
        self.sequences.plan += 1;
        let view = SchedulerView {
            sequences: &self.sequences,
            running: &self.running,
            waiting: &self.waiting,
            kv: &self.kv,
            limits: &self.limits,
            speculates: self.speculates,
            now,
        };
        policy.plan(&view, &mut plan);
        let applied = self.apply(&plan, batch);
        // A plan that runs nothing but moves something changed what the policy sees: it is asked again at once.
        let moved = plan.preempt.len() + plan.admit.len() + plan.reject.len() > 0;
        let wait_until = if moved { Some(now) } else { plan.wait_until };
        self.plan = plan;
        let mut stats = applied?;
        if batch.sequences() == 0 {
            if !moved && self.make_room_for_beams() {
                return Ok(Scheduled::Idle(Some(now)));
            }
            return Ok(Scheduled::Idle(wait_until));
        }
        stats.preempted = std::mem::take(&mut self.preempted);
        self.measure(&mut stats);
        self.measure_swaps(&mut stats);
        Ok(Scheduled::Batch(stats))
    }

    /// Counts sequences and KV slots by state, as they are when the step's tokens are stored, and balances the books.
    fn measure(&self, stats: &mut BatchStats) {
        let mut held = 0;
        for &key in &self.running {
            let sequence = &self.sequences[key];
            let slots = sequence.kv.slots();
            let used = sequence.computed + sequence.scheduled;
            let filled = sequence.final_kv().clamp(used, slots);
            stats.running += u32::from(matches!(sequence.status, Status::Running | Status::Paused));
            stats.kv.used += u64::from(used);
            stats.kv.reserved += u64::from(filled - used);
            stats.kv.internal += u64::from(slots - filled);
            held += u64::from(slots);
        }
        // What several sequences share is full, and was counted once for each.
        let shared = u64::from(self.kv.shared_slots());
        stats.kv.used -= shared;
        stats.kv.shared = shared;
        stats.waiting = self.waiting.len() as u32 + self.held;
        stats.kv.cached = u64::from(self.kv.cached_slots());
        stats.kv.free = u64::from(self.kv.free_slots());
        self.kv.check(held - shared);
    }

    /// Counts everything anew, which takes time in the size of the KV memory.
    ///
    /// # Panics
    /// When an invariant does not hold.
    pub(crate) fn check_integrity(&self) {
        self.kv.recount();
        self.swap_space.recount();
        let swapped = self.sequences.iter().filter_map(|sequence| sequence.swapped.as_ref());
        let blocks: usize = swapped.map(|table| table.blocks().len()).sum();
        assert!(blocks == self.swap_space.held() as usize, "blocks of the swap space have no owner");
        let held: u64 = self.running.iter().map(|&key| u64::from(self.sequences[key].kv.slots())).sum();
        self.kv.check(held - u64::from(self.kv.shared_slots()));
        let (mut slots_held, mut shared) = (std::collections::HashSet::new(), 0);
        for &key in &self.running {
            let sequence = &self.sequences[key];
            assert!(
                matches!(sequence.status, Status::Running | Status::Paused | Status::Ended(_)),
                "request {} runs and does not",
                sequence.id
            );
            let mut slots = Vec::new();
            sequence.kv.append_slots(0, sequence.kv.slots(), &mut slots);
            for (position, slot) in (0..).zip(slots) {
                let first = slots_held.insert(slot);
                let may_share = (self.prefix_cache || self.forked) && position < sequence.computed;
                assert!(first || may_share, "slot {slot} of request {} is another's too", sequence.id);
                shared += u32::from(!first);
            }
        }
        assert!(shared == self.kv.shared_slots(), "{shared} slots are shared, the books say otherwise");
        for &key in &self.waiting {
            let sequence = &self.sequences[key];
            assert!(sequence.status == Status::Waiting, "request {} waits and runs", sequence.id);
            assert!(sequence.kv.slots() == 0, "request {} waits and holds KV slots", sequence.id);
        }
        let of = |status| self.sequences.iter().filter(move |sequence| sequence.status == status);
        let elsewhere = of(Status::Leaving).chain(of(Status::Held));
        let elsewhere =
            elsewhere.inspect(|sequence| assert!(sequence.kv.slots() == 0, "KV slots outside the queues"));
        assert!(
            self.sequences.iter().count() == self.running.len() + self.waiting.len() + elsewhere.count(),
            "sequences are lost"
        );
        let requests: std::collections::HashSet<u64> = self.sequences.iter().map(|s| s.id).collect();
        assert!(requests.len() == self.ids.len(), "sequences without a request");
        assert!(of(Status::Held).count() == self.held as usize, "the books hold other forks");
        let order = |key: &SeqKey| self.sequences[*key].order;
        assert!(self.running.is_sorted_by_key(order) && self.waiting.iter().is_sorted_by_key(order));
    }
}
