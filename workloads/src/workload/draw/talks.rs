//! Turns of conversations: lengths and times.

use super::{Drawn, Lengths, Shape, drop_one, held, prompt_len};
use crate::conversations::ConversationSpec;
use crate::error::WorkloadError;
use crate::lengths::scaled;
use crate::random::{Stream, Use};
use crate::spec::{ModelLimits, OverLimit, WorkloadSpec};
use crate::trace::Turn;
use crate::workload::DrawnConversations;

/// A conversation as drawn: its turns, and the think time before each.
struct Talk {
    turns: Vec<(Shape<'static>, f64)>,
    /// Whether it ends before its last turn because of the model's limit.
    ended_early: bool,
}

/// Draws whole conversations until they have as many turns as requests are asked for. The turns of one lie together.
pub(super) fn draw(
    spec: &WorkloadSpec,
    conversations: &ConversationSpec,
    seed: u64,
    limits: &ModelLimits,
    lengths: Lengths<'_>,
) -> Result<Drawn<'static>, WorkloadError> {
    let (mut shapes, mut arrivals, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    let (mut dropped, mut ended_early, mut tokens) = (0, 0, 0);
    for attempt in 0.. {
        if shapes.len() >= spec.requests {
            break;
        }
        // A stream each, so that a conversation is the same however many there are.
        let mut stream = Stream::new(seed, Use::Conversation, attempt);
        let talk = draw_one(spec, conversations, starts.len() as u64, &mut stream, limits, &lengths);
        if talk.turns.is_empty() {
            drop_one(&mut dropped, spec, limits)?;
            continue;
        }
        ended_early += u64::from(talk.ended_early);
        starts.push(shapes.len());
        for (shape, think_s) in talk.turns {
            tokens += shape.held();
            held(tokens)?;
            shapes.push(shape);
            arrivals.push(think_s);
        }
    }
    let begun = spec.arrivals.draw(starts.len(), seed).expect("validated: no trace has these times");
    // The rate is of requests: conversations begin as much more seldom as they have turns.
    let mean_turns = shapes.len() as f64 / starts.len() as f64;
    for (&start, &at) in starts.iter().zip(&begun) {
        arrivals[start] = at * mean_turns;
    }
    let last_start = starts.last().map_or(0.0, |&start| arrivals[start]);
    let last_turn_s = spec.arrivals.rate().map(|rate| last_start.max(spec.requests as f64 / rate));
    let conversations = Some(DrawnConversations { count: starts.len() as u64, ended_early, last_turn_s });
    Ok(Drawn { shapes, arrivals, dropped, trace: None, conversations })
}

fn draw_one(
    spec: &WorkloadSpec,
    conversations: &ConversationSpec,
    conversation: u64,
    stream: &mut Stream,
    limits: &ModelLimits,
    lengths: &Lengths<'_>,
) -> Talk {
    let count = conversations.turns.draw(stream);
    let mut turns = Vec::new();
    let mut history = 0_u32;
    for turn in 0..count {
        let (input, output) = match &conversations.later {
            Some(later) if turn > 0 => (later.input.draw(stream), later.output.draw(stream)),
            _ => lengths(stream),
        };
        let think_s = conversations.think.filter(|_| turn > 0).map_or(0.0, |think| think.draw(stream));
        let input = if turn == 0 { prompt_len(spec, input) } else { scaled(input, spec.length_scale) };
        let output = scaled(output, spec.length_scale);
        let end = history.saturating_add(input).saturating_add(output);
        let fits = end <= limits.max_model_len;
        if !fits && spec.over_limit == OverLimit::Drop {
            return Talk { turns, ended_early: true };
        }
        let place = Some(Turn { conversation, turn });
        turns.push((Shape { history, turn: place, ..Shape::single(input, output) }, think_s));
        if !fits {
            // Its answer ends at the limit, or it is rejected: nothing can follow.
            return Talk { turns, ended_early: turn + 1 < count };
        }
        history = end;
    }
    Talk { turns, ended_early: false }
}
