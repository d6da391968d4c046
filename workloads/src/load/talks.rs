//! Conversations under way: what was said in each, and which turn comes next.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::workload::{Workload, WorkloadRequest};

/// What became of a workload's conversations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConversationReport {
    /// Conversations that began.
    pub begun: u64,
    /// Of these, those whose last turn was answered.
    pub completed: u64,
    /// Those that ended with a turn that was rejected, failed, was cancelled, or was not answered in full. The others were under
    /// way when no more turns were sent, or when the run ended.
    pub broken: u64,
}

/// The conversations of a workload. What is held is at most the prompts and answers of all of them, which a workload's
/// making bounds; what has ended is dropped.
pub(super) struct Talks {
    /// Places of requests in the workload, by id.
    places: HashMap<u64, usize>,
    /// Tokens of each conversation under way, up to its last turn that was sent.
    said: HashMap<u64, Vec<u32>>,
    /// After this no turn becomes due.
    last_turn: Duration,
    report: ConversationReport,
}

/// A turn that has become due.
pub(super) struct NextTurn {
    pub(super) place: usize,
    pub(super) intended: Duration,
    /// Tokens of its whole prompt.
    pub(super) prompt_len: usize,
}

impl Talks {
    /// The conversations of `workload`, when it has any.
    pub(super) fn new(workload: &Workload, start: Duration) -> Option<Self> {
        let last_turn_s = workload.header.conversations?.last_turn_s;
        let last_turn = last_turn_s.and_then(|s| Duration::try_from_secs_f64(s).ok());
        Some(Self {
            places: workload
                .requests
                .iter()
                .enumerate()
                .map(|(place, request)| (request.id, place))
                .collect(),
            said: HashMap::new(),
            last_turn: last_turn.map_or(Duration::MAX, |s| start.saturating_add(s)),
            report: ConversationReport::default(),
        })
    }

    /// The time after which no turn becomes due.
    pub(super) fn last_turn(&self) -> Option<Duration> {
        (self.last_turn < Duration::MAX).then_some(self.last_turn)
    }

    /// The whole prompt of a turn that is sent.
    pub(super) fn prompt(&mut self, request: &WorkloadRequest) -> Vec<u32> {
        let Some(turn) = request.turn else { return request.prompt.clone() };
        self.report.begun += u64::from(turn.turn == 0);
        let said = self.said.entry(turn.conversation).or_default();
        said.extend_from_slice(&request.prompt);
        said.clone()
    }

    /// The request `id` ended at `at`, with its whole answer or without one: which turn follows.
    pub(super) fn ended(
        &mut self,
        workload: &Workload,
        id: u64,
        at: Duration,
        answer: Option<Vec<u32>>,
    ) -> Option<NextTurn> {
        let place = *self.places.get(&id)?;
        let conversation = workload.requests[place].turn?.conversation;
        let mut said = self.said.remove(&conversation)?;
        let Some(answer) = answer else {
            self.report.broken += 1;
            return None;
        };
        let next = workload.requests.get(place + 1).filter(|next| next.is_later_turn());
        let Some(next) = next else {
            self.report.completed += 1;
            return None;
        };
        let intended =
            at.saturating_add(Duration::try_from_secs_f64(next.arrival_s).unwrap_or(Duration::MAX));
        if intended > self.last_turn {
            return None;
        }
        said.extend(answer);
        let prompt_len = said.len() + next.prompt.len();
        self.said.insert(conversation, said);
        Some(NextTurn { place: place + 1, intended, prompt_len })
    }

    pub(super) fn report(&self) -> ConversationReport {
        self.report
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ArrivalProcess, ConversationSpec, Decoding, LengthSource, ModelLimits, OverLimit, TurnCount,
        WorkloadSpec,
    };

    #[test]
    fn what_has_ended_is_dropped() {
        let spec = WorkloadSpec {
            requests: 8,
            lengths: LengthSource::Pairs { pairs: vec![[2, 1]] },
            arrivals: ArrivalProcess::Uniform { rate: 8.0 },
            length_scale: 1.0,
            over_limit: OverLimit::Keep,
            shared_prefix: 0,
            conversations: Some(ConversationSpec {
                turns: TurnCount::Fixed { turns: 2 },
                think: None,
                later: None,
            }),
            classes: Vec::new(),
            decoding: Decoding::Single {},
        };
        let limits = ModelLimits { vocab_size: 9, reserved_ids: 0, max_model_len: 64 };
        let workload = Workload::generate(&spec, 1, &limits).unwrap();
        let mut talks = Talks::new(&workload, Duration::ZERO).unwrap();
        for first in [0, 2, 4] {
            assert_eq!(talks.prompt(&workload.requests[first]).len(), 2);
        }
        let at = Duration::from_millis;
        // The first goes on and is completed, the second is broken off, the third comes too late for its next turn.
        let next = talks.ended(&workload, 0, at(500), Some(vec![1])).unwrap();
        assert_eq!((next.place, next.intended, next.prompt_len), (1, at(500), 5));
        assert!(talks.ended(&workload, 2, at(500), None).is_none());
        assert!(talks.ended(&workload, 4, at(1001), Some(vec![1])).is_none());
        assert_eq!(talks.said.len(), 1);
        talks.prompt(&workload.requests[1]);
        assert!(talks.ended(&workload, 1, at(900), Some(vec![2])).is_none());
        assert!(talks.said.is_empty());
        assert_eq!(talks.report(), ConversationReport { begun: 3, completed: 1, broken: 1 });
    }
}
