//! A system that does as it is told, on a clock that moves only when somebody waits: for tests of a harness that are
//! the same every time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;
use crate::system::{
    EventKind, FinishReason, GenerationRequest, ServingSystem, StepRecord, SystemError, TokenEvent,
};

/// A clock that is moved by hand; copies share its time.
#[derive(Debug, Clone, Default)]
pub struct VirtualClock(Arc<AtomicU64>);

impl VirtualClock {
    /// A clock at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Moves on to a time; does nothing when that has passed.
    pub fn advance_to(&self, time: Duration) {
        self.0.fetch_max(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    /// Moves on by some time.
    pub fn advance(&self, by: Duration) {
        self.advance_to(self.now() + by);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }
}

/// What happens to one request, in times since its service began. Built up in order:
/// ```
/// use std::time::Duration;
/// use quire_workloads::mock::Script;
/// let ms = Duration::from_millis;
/// Script::default().tokens(ms(30), &[7]).tokens(ms(10), &[8, 9]).stop(ms(0));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Script {
    events: Vec<(Duration, Option<u64>, EventKind)>,
    at: Duration,
}

impl Script {
    /// Any event, `after` the one before.
    #[must_use]
    pub fn event(mut self, after: Duration, kind: EventKind) -> Self {
        self.at += after;
        self.events.push((self.at, None, kind));
        self
    }

    /// An event that names another request than the one submitted.
    #[must_use]
    pub fn event_of(mut self, request: u64, after: Duration, kind: EventKind) -> Self {
        self.at += after;
        self.events.push((self.at, Some(request), kind));
        self
    }

    /// Tokens emitted together, `after` the event before.
    #[must_use]
    pub fn tokens(self, after: Duration, tokens: &[u32]) -> Self {
        self.event(after, EventKind::Tokens(tokens.to_vec()))
    }

    /// The end with all tokens delivered.
    #[must_use]
    pub fn finished(self, after: Duration, reason: FinishReason) -> Self {
        self.event(after, EventKind::Finished { reason, preemptions: 0, cached_tokens: 0 })
    }

    /// The end at the end of the sequence.
    #[must_use]
    pub fn stop(self, after: Duration) -> Self {
        self.finished(after, FinishReason::Stop)
    }

    /// A refusal.
    #[must_use]
    pub fn rejected(self, after: Duration, reason: &str) -> Self {
        self.event(after, EventKind::Rejected { reason: reason.into() })
    }

    /// A failure.
    #[must_use]
    pub fn failed(self, after: Duration, reason: &str) -> Self {
        self.event(after, EventKind::Failed { reason: reason.into() })
    }

    /// A healthy service: the first token after `first`, one more each `gap`, all that the request calls for, the end
    /// with the last token. The tokens are a function of the request's id.
    pub fn healthy(request: &GenerationRequest, first: Duration, gap: Duration) -> Self {
        let (count, reason) = match request.true_output_len {
            Some(len) if len <= request.max_tokens => (len, FinishReason::Stop),
            _ => (request.max_tokens, FinishReason::Length),
        };
        let mut script = Self::default();
        for i in 0..count {
            let token = (request.id as u32).wrapping_mul(31).wrapping_add(i);
            script = script.tokens(if i == 0 { first } else { gap }, &[token]);
        }
        script.finished(Duration::ZERO, reason)
    }
}

type Writer = Box<dyn FnMut(&GenerationRequest) -> Script + Send>;

/// A [`ServingSystem`] whose behaviour is scripted request by request, on a [`VirtualClock`].
///
/// A script that never ends its request is a stall; one that ends it twice, or names another request, breaks the
/// protocol on purpose.
pub struct ScriptedSystem {
    name: String,
    clock: VirtualClock,
    writer: Writer,
    /// Events to come: time, number (to keep the order of equal times), request that caused it.
    agenda: BinaryHeap<Reverse<(Duration, u64, u64)>>,
    events: BTreeMap<u64, TokenEvent>,
    number: u64,
    at_once: usize,
    serving: BTreeSet<u64>,
    queue: VecDeque<GenerationRequest>,
    submit_cost: Duration,
    deaf: bool,
    stops_at: Option<Duration>,
    steps: Vec<StepRecord>,
}

impl ScriptedSystem {
    /// A system that serves any number of requests at once, each by the script that `writer` gives for it.
    pub fn new(
        clock: VirtualClock,
        writer: impl FnMut(&GenerationRequest) -> Script + Send + 'static,
    ) -> Self {
        Self {
            name: "scripted".into(),
            clock,
            writer: Box::new(writer),
            agenda: BinaryHeap::new(),
            events: BTreeMap::new(),
            number: 0,
            at_once: usize::MAX,
            serving: BTreeSet::new(),
            queue: VecDeque::new(),
            submit_cost: Duration::ZERO,
            deaf: false,
            stops_at: None,
            steps: Vec::new(),
        }
    }

    /// Serves every request by [`Script::healthy`].
    pub fn healthy(clock: VirtualClock, first: Duration, gap: Duration) -> Self {
        Self::new(clock, move |request| Script::healthy(request, first, gap))
    }

    /// Gives it another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Serves at most so many at once, first come first served; the others wait until one ends.
    #[must_use]
    pub fn at_once(mut self, requests: usize) -> Self {
        self.at_once = requests.max(1);
        self
    }

    /// Makes every submission take time, so that the client falls behind.
    #[must_use]
    pub fn submit_cost(mut self, cost: Duration) -> Self {
        self.submit_cost = cost;
        self
    }

    /// Ignores cancellations.
    #[must_use]
    pub fn deaf(mut self) -> Self {
        self.deaf = true;
        self
    }

    /// Stops with an error at a time.
    #[must_use]
    pub fn stops_at(mut self, time: Duration) -> Self {
        self.stops_at = Some(time);
        self
    }

    /// Gives these steps at the next call of `take_steps`.
    #[must_use]
    pub fn steps(mut self, steps: Vec<StepRecord>) -> Self {
        self.steps = steps;
        self
    }

    fn alive(&self) -> Result<(), SystemError> {
        match self.stops_at {
            Some(time) if self.clock.now() >= time => {
                Err(SystemError::Stopped { system: self.name.clone(), reason: "it was told to".into() })
            }
            _ => Ok(()),
        }
    }

    fn start(&mut self, request: &GenerationRequest) {
        let now = self.clock.now();
        self.serving.insert(request.id);
        let script = (self.writer)(request);
        for (after, other, kind) in script.events {
            let event = TokenEvent { request: other.unwrap_or(request.id), at: now + after, kind };
            self.put(request.id, event);
        }
    }

    fn put(&mut self, cause: u64, event: TokenEvent) {
        self.agenda.push(Reverse((event.at, self.number, cause)));
        self.events.insert(self.number, event);
        self.number += 1;
    }

    /// A request has ended: the next one takes its place.
    fn left(&mut self, request: u64) {
        if self.serving.remove(&request)
            && let Some(next) = self.queue.pop_front()
        {
            self.start(&next);
        }
    }
}

impl ServingSystem for ScriptedSystem {
    fn name(&self) -> &str {
        &self.name
    }

    fn submit(&mut self, request: GenerationRequest) -> Result<(), SystemError> {
        self.alive()?;
        self.clock.advance(self.submit_cost);
        if self.serving.len() < self.at_once {
            self.start(&request);
        } else {
            self.queue.push_back(request);
        }
        Ok(())
    }

    fn cancel(&mut self, request: u64) -> Result<(), SystemError> {
        self.alive()?;
        if self.deaf {
            return Ok(());
        }
        let at = self.clock.now();
        let queued = self.queue.iter().position(|waiting| waiting.id == request);
        if let Some(place) = queued {
            self.queue.remove(place);
        } else if !self.serving.contains(&request) {
            return Ok(());
        }
        self.agenda.retain(|Reverse((_, _, cause))| *cause != request);
        self.put(request, TokenEvent { request, at, kind: EventKind::Cancelled });
        Ok(())
    }

    fn next_event(&mut self, until: Duration) -> Result<Option<TokenEvent>, SystemError> {
        self.alive()?;
        let next = self.agenda.peek().map_or(Duration::MAX, |Reverse((at, ..))| *at);
        if let Some(stop) = self.stops_at.filter(|stop| *stop <= next.min(until)) {
            self.clock.advance_to(stop);
            self.alive()?;
        }
        if next > until {
            self.clock.advance_to(until);
            return Ok(None);
        }
        let Some(Reverse((at, number, cause))) = self.agenda.pop() else { return Ok(None) };
        self.clock.advance_to(at);
        let event = self.events.remove(&number);
        if event
            .as_ref()
            .is_some_and(|event| event.request == cause && !matches!(event.kind, EventKind::Tokens(_)))
        {
            self.left(cause);
        }
        Ok(event)
    }

    fn take_steps(&mut self) -> Vec<StepRecord> {
        std::mem::take(&mut self.steps)
    }
}
