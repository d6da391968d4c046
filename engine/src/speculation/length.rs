//! How many tokens to propose.

use super::DraftLength;
use crate::stats::BatchStats;

/// What one step's observation counts against all before it.
const SHARE: f64 = 0.05;

/// Each of so many steps tries another length than the best, to see what it would cost and whether it would be accepted.
const TRIES: u32 = 64;

/// Chooses the draft length.
#[derive(Debug)]
pub(crate) struct LengthRule {
    rule: DraftLength,
    /// Probability that a proposal is accepted when those before it were.
    acceptance: f64,
    times: StepTimes,
    /// Seconds that a proposal of all sequences takes.
    draft_s: f64,
    /// The last choice.
    chosen: u32,
    /// Choices made.
    choices: u32,
}

impl LengthRule {
    pub(crate) fn new(rule: DraftLength) -> Self {
        // Until something is known, proposals are worth a try.
        Self { rule, acceptance: 0.7, times: StepTimes::default(), draft_s: 0.0, chosen: 0, choices: 0 }
    }

    /// Tokens to propose for each of `sequences` sequences.
    pub(crate) fn choose(&mut self, sequences: usize) -> u32 {
        self.chosen = match self.rule {
            DraftLength::Fixed { tokens } => tokens,
            // All of them first, so that something is known of each.
            DraftLength::Adaptive { most } if self.choices <= 2 * most => self.choices % (most + 1),
            DraftLength::Adaptive { most } => {
                let best = self.best(most, sequences as f64);
                match self.choices.is_multiple_of(TRIES) {
                    true => best.checked_sub(1).unwrap_or(1),
                    false => best,
                }
            }
        };
        self.choices = self.choices.wrapping_add(1);
        self.chosen
    }

    /// The length that promises most tokens a second.
    fn best(&self, most: u32, sequences: f64) -> u32 {
        let worth = |length: u32| {
            let rows = sequences * f64::from(length + 1);
            let seconds = self.times.expected(rows) + self.draft_s * f64::from(length);
            expected_tokens(self.acceptance, length) / seconds
        };
        // Of equals, the shortest.
        (0..=most).rev().max_by(|&a, &b| worth(a).total_cmp(&worth(b))).unwrap_or(0)
    }

    /// Learns from a step: its rows, the seconds it took, and of these the seconds that proposing took.
    pub(crate) fn observe(&mut self, batch: &BatchStats, seconds: f64, draft_s: f64) {
        // A prompt's rows cost less than those that a token is sampled after, which are what a choice adds.
        if batch.prefill_tokens == 0 {
            let rows = batch.decode_tokens + batch.drafted_tokens;
            self.times.add(f64::from(rows), (seconds - draft_s).max(0.0));
        }
        if batch.drafted_tokens == 0 {
            return;
        }
        let tested = batch.accepted_tokens + batch.refused_drafts;
        if tested > 0 {
            let seen = f64::from(batch.accepted_tokens) / f64::from(tested);
            self.acceptance += SHARE * (seen - self.acceptance);
        }
        self.draft_s += SHARE * (draft_s / f64::from(self.chosen.max(1)) - self.draft_s);
    }
}

/// Tokens that a step yields for a sequence with `length` proposals of which each is accepted with probability
/// `acceptance` when those before it were (Leviathan et al., equation 1).
pub fn expected_tokens(acceptance: f64, length: u32) -> f64 {
    (0..=length as i32).map(|i| acceptance.powi(i)).sum()
}

/// How long steps take by their rows: a line, fitted by least squares to what was seen, the latest most.
#[derive(Debug, Default)]
struct StepTimes {
    /// Means of rows, seconds, rows squared and rows times seconds.
    rows: f64,
    seconds: f64,
    squares: f64,
    products: f64,
    weight: f64,
    /// Seconds a row, as last fitted.
    slope: f64,
}

impl StepTimes {
    fn add(&mut self, rows: f64, seconds: f64) {
        self.weight = (1.0 - SHARE) * self.weight + SHARE;
        let share = SHARE / self.weight;
        self.rows += share * (rows - self.rows);
        self.seconds += share * (seconds - self.seconds);
        self.squares += share * (rows * rows - self.squares);
        self.products += share * (rows * seconds - self.products);
        // Steps all of one size say nothing of others: what was known of those stays.
        let variance = self.squares - self.rows * self.rows;
        if variance > 0.01 * self.squares {
            self.slope = ((self.products - self.rows * self.seconds) / variance).max(0.0);
        }
    }

    /// Seconds of a step of so many rows: on a line through what was seen. Until sizes have differed, rows cost nothing,
    /// and the first proposals show what they do.
    fn expected(&self, rows: f64) -> f64 {
        (self.seconds + self.slope * (rows - self.rows)).max(0.1 * self.seconds).max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a rule against a machine whose steps take `base + per_row * rows` seconds and accept with probability
    /// `acceptance`; the mean of its last choices.
    fn settled(base: f64, per_row: f64, acceptance: f64, sequences: u32) -> f64 {
        let mut rule = LengthRule::new(DraftLength::Adaptive { most: 8 });
        let (mut sum, mut random) = (0.0, 1u64);
        for step in 0..2000u32 {
            let length = rule.choose(sequences as usize);
            let mut batch = BatchStats { decode_tokens: sequences, ..BatchStats::default() };
            for _ in 0..sequences {
                batch.drafted_tokens += length;
                for _ in 0..length {
                    random = quire_kernels::generated::mix(random);
                    if (random >> 11) as f64 / (1u64 << 53) as f64 >= acceptance {
                        batch.refused_drafts += 1;
                        break;
                    }
                    batch.accepted_tokens += 1;
                }
            }
            let rows = f64::from(sequences * (length + 1));
            rule.observe(&batch, base + per_row * rows, 0.0);
            if step >= 1000 {
                sum += f64::from(length);
            }
        }
        sum / 1000.0
    }

    #[test]
    fn tokens_expected_by_hand() {
        assert_eq!(expected_tokens(0.5, 0), 1.0);
        assert_eq!(expected_tokens(0.5, 2), 1.75);
        assert_eq!(expected_tokens(1.0, 3), 4.0);
    }

    #[test]
    fn where_rows_are_free_proposals_are_long_and_where_they_cost_none() {
        // A memory-bound step: 1 sequence, rows nearly free.
        assert!(settled(10e-3, 0.01e-3, 0.9, 1) > 7.0);
        // Compute-bound: the time is all rows. Only tries are left.
        assert!(settled(0.1e-3, 1e-3, 0.6, 64) < 0.1);
        // What is never accepted is not proposed.
        assert!(settled(10e-3, 0.2e-3, 0.02, 8) < 0.5);
        // In between: a few.
        let some = settled(10e-3, 0.3e-3, 0.7, 8);
        assert!((0.9..5.0).contains(&some), "{some}");
    }

    #[test]
    fn a_fixed_length_is_fixed() {
        let mut rule = LengthRule::new(DraftLength::Fixed { tokens: 3 });
        assert_eq!((rule.choose(1), rule.choose(1000)), (3, 3));
    }
}
