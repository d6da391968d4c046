//! Beam search: which beams go on, and when there is nothing better to come.
//!
//! The rules are those of Hugging Face Transformers' `generate`: of the best continuations of all beams, those that end the
//! output are kept as hypotheses when they rank among the first `width`, and the best `width` others go on.

use crate::{FinishReason, TokenLogprob};

/// The most beams.
pub const MAX_BEAM_WIDTH: u32 = 16;

/// The most continuations of a beam that are looked at, for each beam of the width.
const MOST_CANDIDATES: usize = 8;

/// Keep the `width` most probable outputs instead of sampling one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamSearch {
    /// Beams, and hypotheses returned: 1 to [`MAX_BEAM_WIDTH`].
    pub width: u32,
    /// Hypotheses rank by the sum of their tokens' log-probabilities over their length to this power: above 0 longer ones
    /// gain, below 0 shorter ones.
    pub length_penalty: f32,
    /// When to stop, once there are `width` hypotheses.
    pub early_stopping: EarlyStopping,
}

/// When a search with enough hypotheses stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// At once (`True`).
    Always,
    /// When the best beam, at its present length, would not rank above the worst hypothesis (Transformers' `False`).
    #[default]
    Unlikely,
    /// When no continuation of the best beam can rank above the worst hypothesis, whatever its length (`"never"`).
    Impossible,
}

impl Eq for BeamSearch {}

impl BeamSearch {
    /// A search with the plain mean of log-probabilities as score.
    pub fn new(width: u32) -> Self {
        Self { width, length_penalty: 1.0, early_stopping: EarlyStopping::default() }
    }

    /// Checks that every parameter has a meaning.
    ///
    /// # Errors
    /// What is wrong, for a person.
    pub fn validate(&self) -> Result<(), String> {
        if !(1..=MAX_BEAM_WIDTH).contains(&self.width) {
            return Err(format!("the beam width is {}: choose 1 to {MAX_BEAM_WIDTH}", self.width));
        }
        if !(-100.0..=100.0).contains(&self.length_penalty) {
            return Err(format!("the length penalty is {}: choose -100 to 100", self.length_penalty));
        }
        Ok(())
    }

    /// Continuations that are looked at, of each beam and of all: as many as surely leave `width` that go on, whichever of
    /// `stops` tokens end an output; of very many such tokens, not all need be.
    pub(crate) fn candidates(&self, stops: usize) -> u32 {
        self.width * (1 + stops).clamp(2, MOST_CANDIDATES) as u32
    }

    fn score(&self, logprob: f64, len: u32) -> f64 {
        logprob / f64::from(len).powf(f64::from(self.length_penalty))
    }
}

/// A whole output that a beam search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// Its tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Sum of their log-probabilities.
    pub logprob: f64,
    /// What it ranks by: the best is the first.
    pub score: f64,
    /// Why it ended.
    pub reason: FinishReason,
}

/// How a beam goes on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Continuation {
    /// The beam, by its place among those that are under way.
    pub(crate) parent: usize,
    /// The next token.
    pub(crate) token: u32,
    /// Sum of the log-probabilities, this token's included.
    pub(crate) logprob: f64,
}

/// The best hypotheses so far.
#[derive(Debug)]
pub(crate) struct Hypotheses {
    pub(crate) search: BeamSearch,
    best: Vec<Hypothesis>,
}

/// The best continuations of beams, best first: as many as may matter. `beams` are the sums of log-probabilities so far and
/// the candidates for the next token, the most probable first.
pub(crate) fn best_continuations<'a>(
    candidates: u32,
    beams: impl Iterator<Item = (f64, &'a [TokenLogprob])>,
) -> Vec<Continuation> {
    let mut all = Vec::new();
    for (parent, (so_far, candidates)) in beams.enumerate() {
        all.extend(candidates.iter().map(|candidate| Continuation {
            parent,
            token: candidate.token,
            logprob: so_far + f64::from(candidate.logprob),
        }));
    }
    // Stable: of equal ones the better beam's, and then the more probable token's.
    all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob));
    all.truncate(candidates as usize);
    all
}

impl Hypotheses {
    pub(crate) fn new(search: BeamSearch) -> Self {
        Self { search, best: Vec::new() }
    }

    /// Takes an output that ended, if it is among the best.
    pub(crate) fn add(&mut self, tokens: Vec<u32>, logprob: f64, reason: FinishReason) {
        let score = self.search.score(logprob, tokens.len() as u32);
        let place = self.best.partition_point(|other| other.score >= score);
        self.best.insert(place, Hypothesis { tokens, logprob, score, reason });
        self.best.truncate(self.search.width as usize);
    }

    /// Whether the search is over: `best` is the best beam that could go on, after `len` output tokens of at most `max_len`.
    pub(crate) fn suffice(&self, best: Option<&Continuation>, len: u32, max_len: u32) -> bool {
        let Some(best) = best else { return true };
        let Some(worst) = self.best.get(self.search.width as usize - 1) else { return false };
        let attainable = match self.search.early_stopping {
            EarlyStopping::Always => return true,
            EarlyStopping::Unlikely => self.search.score(best.logprob, len),
            // Sums only fall, and their length helps where the penalty is positive.
            EarlyStopping::Impossible if self.search.length_penalty > 0.0 => {
                self.search.score(best.logprob, max_len)
            }
            EarlyStopping::Impossible => self.search.score(best.logprob, len),
        };
        worst.score >= attainable
    }

    /// The best first.
    pub(crate) fn into_best(self) -> Vec<Hypothesis> {
        self.best
    }
}
