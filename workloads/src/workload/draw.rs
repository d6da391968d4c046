//! Lengths and times of a workload's requests, before they have tokens.

mod sample;
mod talks;

use super::DrawnConversations;
use crate::arrivals::ArrivalProcess;
use crate::error::WorkloadError;
use crate::lengths::scaled;
use crate::random::{Stream, Use};
use crate::spec::{LengthSource, ModelLimits, OverLimit, TraceSource, Window, WorkloadSpec};
use crate::stats::LengthModel;
use crate::trace::{PrefixBlocks, Trace, TraceMeta, Turn};

/// The most prompt tokens of a workload (1 GiB of ids).
const MAX_PROMPT_TOKENS: u64 = 1 << 28;

/// Draws for each request asked for after which a limit that drops nearly all of them is an error.
const MAX_TRIES: usize = 1000;

/// A request's lengths, scaled.
pub(super) struct Shape<'a> {
    /// Prompt tokens, of a conversation's turn its new ones.
    pub(super) input: u32,
    pub(super) output: u32,
    /// Tokens of the conversation before them.
    pub(super) history: u32,
    pub(super) prefix: Option<&'a PrefixBlocks>,
    pub(super) turn: Option<Turn>,
}

impl Shape<'_> {
    fn single(input: u32, output: u32) -> Self {
        Self { input, output, history: 0, prefix: None, turn: None }
    }

    /// Tokens that are held for it: a conversation is held whole, with its answers, while it lasts.
    fn held(&self) -> u64 {
        u64::from(self.input) + self.turn.map_or(0, |_| u64::from(self.output))
    }
}

pub(super) struct Drawn<'a> {
    pub(super) shapes: Vec<Shape<'a>>,
    pub(super) arrivals: Vec<f64>,
    pub(super) dropped: u64,
    pub(super) trace: Option<TraceMeta>,
    pub(super) conversations: Option<DrawnConversations>,
}

pub(super) fn draw<'a>(
    spec: &WorkloadSpec,
    trace: Option<&'a Trace>,
    seed: u64,
    limits: &ModelLimits,
) -> Result<Drawn<'a>, WorkloadError> {
    // Each has a token or more: what is far too much is refused before it takes memory.
    held(spec.requests as u64)?;
    let drawn = match (&spec.lengths, &spec.conversations) {
        (LengthSource::Trace(source), _) => {
            let missing = || WorkloadError::spec("lengths", "the trace has not been loaded");
            from_trace(spec, source, trace.ok_or_else(missing)?, seed, limits)?
        }
        (drawn, None) => synthetic(spec, seed, limits, lengths(drawn))?,
        (drawn, Some(conversations)) => talks::draw(spec, conversations, seed, limits, lengths(drawn))?,
    };
    held(drawn.shapes.iter().map(Shape::held).sum())?;
    Ok(drawn)
}

/// Checks how many prompt tokens are held so far.
fn held(tokens: u64) -> Result<(), WorkloadError> {
    if tokens > MAX_PROMPT_TOKENS {
        let problem = format!("more than {MAX_PROMPT_TOKENS} prompt tokens in all");
        return Err(WorkloadError::spec("requests", problem));
    }
    Ok(())
}

/// What draws a request's lengths, before they are scaled.
type Lengths<'a> = Box<dyn Fn(&mut Stream) -> (u32, u32) + 'a>;

fn lengths(source: &LengthSource) -> Lengths<'_> {
    match source {
        LengthSource::Stats { name } => {
            let model = name.stats().lengths;
            Box::new(move |stream| model.draw(stream))
        }
        LengthSource::Independent { input, output } => {
            let model = LengthModel::Independent { input: input.clone(), output: output.clone() };
            Box::new(move |stream| model.draw(stream))
        }
        LengthSource::Pairs { pairs } => Box::new(|stream| {
            let [input, output] = pairs[stream.below(pairs.len() as u32) as usize];
            (input, output)
        }),
        LengthSource::Trace(_) => unreachable!("a trace's lengths are not drawn"),
    }
}

/// Tokens of a prompt: the shared ones, and its own.
fn prompt_len(spec: &WorkloadSpec, own: u32) -> u32 {
    scaled(own, spec.length_scale).saturating_add(shared_len(spec))
}

/// Tokens that all prompts begin with.
pub(super) fn shared_len(spec: &WorkloadSpec) -> u32 {
    if spec.shared_prefix == 0 { 0 } else { scaled(spec.shared_prefix, spec.length_scale) }
}

fn is_dropped(spec: &WorkloadSpec, limits: &ModelLimits, input: u32, output: u32) -> bool {
    spec.over_limit == OverLimit::Drop
        && u64::from(input) + u64::from(output) > u64::from(limits.max_model_len)
}

fn synthetic(
    spec: &WorkloadSpec,
    seed: u64,
    limits: &ModelLimits,
    lengths: Lengths<'_>,
) -> Result<Drawn<'static>, WorkloadError> {
    let mut stream = Stream::new(seed, Use::Lengths, 0);
    let (mut shapes, mut dropped, mut tokens) = (Vec::new(), 0, 0);
    while shapes.len() < spec.requests {
        let (input, output) = lengths(&mut stream);
        let (input, output) = (prompt_len(spec, input), scaled(output, spec.length_scale));
        if !is_dropped(spec, limits, input, output) {
            let shape = Shape::single(input, output);
            tokens += shape.held();
            held(tokens)?;
            shapes.push(shape);
            continue;
        }
        drop_one(&mut dropped, spec, limits)?;
    }
    let arrivals =
        spec.arrivals.draw(spec.requests, seed).expect("validated: only a trace has a trace's times");
    Ok(Drawn { shapes, arrivals, dropped, trace: None, conversations: None })
}

/// Counts a drawn request that the limit does not admit.
fn drop_one(dropped: &mut u64, spec: &WorkloadSpec, limits: &ModelLimits) -> Result<(), WorkloadError> {
    *dropped += 1;
    if *dropped as usize >= spec.requests.saturating_mul(MAX_TRIES) {
        let problem =
            format!("of {dropped} drawn requests hardly any fits in {} tokens", limits.max_model_len);
        return Err(WorkloadError::spec("over_limit", problem));
    }
    Ok(())
}

fn from_trace<'a>(
    spec: &WorkloadSpec,
    source: &TraceSource,
    trace: &'a Trace,
    seed: u64,
    limits: &ModelLimits,
) -> Result<Drawn<'a>, WorkloadError> {
    let sample = sample::Sample::new(trace, source.one_in, seed);
    let fits = |i: &usize| {
        let row = &trace.requests[*i];
        let (input, output) = (prompt_len(spec, row.input_len), scaled(row.output_len, spec.length_scale));
        sample.has(*i) && !is_dropped(spec, limits, input, output)
    };
    let short = |what: String| WorkloadError::Trace { file: trace.meta.file.clone(), problem: what };
    let start = match source.window {
        Window::Skip { requests } => requests,
        Window::Random {} => {
            // The last place from which enough requests follow.
            let last = (0..trace.requests.len()).rev().filter(fits).nth(spec.requests - 1);
            let places = last.map_or(1, |last| last + 1);
            Stream::new(seed, Use::Window, 0).below(places.try_into().unwrap_or(u32::MAX)) as usize
        }
    };
    let rows: Vec<usize> = (start..trace.requests.len()).filter(fits).take(spec.requests).collect();
    let (Some(&last), true) = (rows.last(), rows.len() == spec.requests) else {
        let asked = spec.requests;
        let of = match source.one_in {
            1 => String::new(),
            one_in => format!(" of one conversation in {one_in}"),
        };
        let found = rows.len();
        return Err(short(format!("{asked} requests asked for, {found}{of} from request {start} on")));
    };
    let shapes = rows.iter().map(|&i| {
        let row = &trace.requests[i];
        let (input, output) = (prompt_len(spec, row.input_len), scaled(row.output_len, spec.length_scale));
        Shape { prefix: row.prefix.as_ref(), ..Shape::single(input, output) }
    });
    let arrivals = match (spec.arrivals, spec.arrivals.draw(rows.len(), seed)) {
        (_, Some(arrivals)) => arrivals,
        (_, None) if !trace.meta.timed => {
            return Err(short("the trace has no times: choose other arrivals".into()));
        }
        (arrivals, None) => {
            let spread = source.spreads(trace).then(|| trace.spread_times(seed));
            let time = |i: usize| spread.as_ref().map_or(trace.requests[i].arrival_s, |times| times[i]);
            let taken_s = time(last) - time(rows[0]);
            let (from, scale) = match arrivals {
                ArrivalProcess::TraceAt { .. } if rows.len() > 1 && taken_s <= 0.0 => {
                    return Err(short("the requests taken came all at once: they have no rate".into()));
                }
                ArrivalProcess::TraceAt { rate } if rows.len() > 1 => {
                    (time(rows[0]), rate * taken_s / (rows.len() - 1) as f64)
                }
                ArrivalProcess::Trace { rate_scale } => (time(start), rate_scale),
                _ => (time(rows[0]), 1.0),
            };
            rows.iter().map(|&i| (time(i) - from) / scale).collect()
        }
    };
    Ok(Drawn {
        shapes: shapes.collect(),
        arrivals,
        dropped: ((start..=last).filter(|&i| sample.has(i)).count() - rows.len()) as u64,
        trace: Some(trace.meta.clone()),
        conversations: None,
    })
}
