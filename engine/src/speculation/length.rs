//! How many tokens to propose.

use super::DraftLength;
use crate::stats::BatchStats;

/// What one step's observation counts against all before it.
const SHARE: f64 = 0.05;
/// The same of the times of one length, which may come from another load: lengths that are only tried have few of them.
const SHARE_OF_LENGTH: f64 = 0.2;

/// Each of so many steps tries another length than the best, to see what it would cost and whether it would be accepted: by
/// turns none, a shorter one and a longer one.
const TRIES: u32 = 64;

/// What acceptance is taken for until something is known, and how many tested proposals that counts as.
const PRIOR: (f64, f64) = (0.7, 2.0);

/// Chooses the draft length.
#[derive(Debug)]
pub(crate) struct LengthRule {
    rule: DraftLength,
    /// Proposals that were accepted, and those that were tested (all before them accepted), the latest most.
    accepted: f64,
    tested: f64,
    times: StepTimes,
    /// Seconds that a proposal of all sequences takes.
    draft: Mean,
    /// The last choice.
    chosen: u32,
    /// Choices made.
    choices: u32,
}

impl LengthRule {
    pub(crate) fn new(rule: DraftLength) -> Self {
        let (acceptance, tested) = PRIOR;
        Self {
            rule,
            accepted: acceptance * tested,
            tested,
            times: StepTimes::new(rule.most()),
            draft: Mean::default(),
            chosen: 0,
            choices: 0,
        }
    }

    /// Tokens to propose for each of `sequences` sequences. A step that decodes none is no choice: its tries would be spent
    /// on nothing.
    pub(crate) fn choose(&mut self, sequences: usize) -> u32 {
        if sequences == 0 {
            return 0;
        }
        self.chosen = match self.rule {
            DraftLength::Fixed { tokens } => tokens,
            DraftLength::Adaptive { most } => self.adapted(most, sequences as f64),
        };
        self.choices = self.choices.wrapping_add(1);
        self.chosen
    }

    /// The best length, or one that is tried.
    fn adapted(&self, most: u32, sequences: f64) -> u32 {
        // Few tries say what rows and proposals cost, roughly; the first of all steps is often a slow one.
        let first = [1, 0, most, 0, most.div_ceil(2)];
        if let Some(&first) = first.get(self.choices as usize) {
            return first;
        }
        let best = self.best(most, sequences);
        match (self.choices % TRIES, self.choices / TRIES % 3) {
            (0, 0) if best > 0 => 0,
            (0, 1) => best.checked_sub(1).unwrap_or(1),
            (0, 2) => (best + 1).min(most),
            _ => best,
        }
    }

    /// The length that promises most tokens a second.
    fn best(&self, most: u32, sequences: f64) -> u32 {
        let worth = |length: u32| {
            let rows = sequences * f64::from(length + 1);
            let seconds = self.times.expected(length, rows) + self.draft.mean * f64::from(length);
            expected_tokens(self.accepted / self.tested, length) / seconds
        };
        // Of equals, the shortest.
        (0..=most).rev().max_by(|&a, &b| worth(a).total_cmp(&worth(b))).unwrap_or(0)
    }

    /// Learns from a step: its rows, the seconds it took, and of these the seconds that proposing took.
    pub(crate) fn observe(&mut self, batch: &BatchStats, seconds: f64, draft_s: f64) {
        // A prompt's rows cost less than those that a token is sampled after, which are what a choice adds.
        if batch.prefill_tokens == 0 {
            let rows = f64::from(batch.decode_tokens + batch.drafted_tokens);
            let length = f64::from(batch.drafted_tokens) / f64::from(batch.decode_tokens.max(1));
            self.times.add(length.round() as usize, rows, (seconds - draft_s).max(0.0));
        }
        if batch.drafted_tokens == 0 {
            return;
        }
        // A step whose proposals were all left untested says nothing, and makes nothing older.
        let tested = batch.accepted_tokens + batch.refused_drafts;
        if tested > 0 {
            self.accepted = (1.0 - SHARE) * self.accepted + f64::from(batch.accepted_tokens);
            self.tested = (1.0 - SHARE) * self.tested + f64::from(tested);
        }
        self.draft.add(draft_s / f64::from(self.chosen.max(1)), SHARE);
    }
}

/// Tokens that a step yields for a sequence with `length` proposals of which each is accepted with probability
/// `acceptance` when those before it were (Leviathan et al., equation 1).
pub fn expected_tokens(acceptance: f64, length: u32) -> f64 {
    (0..=length as i32).map(|i| acceptance.powi(i)).sum()
}

/// A mean in which the latest counts most.
#[derive(Debug, Default)]
struct Mean {
    mean: f64,
    weight: f64,
}

impl Mean {
    /// Counts `value`, as `share` of all.
    fn add(&mut self, value: f64, share: f64) {
        self.weight = (1.0 - share) * self.weight + share;
        self.mean += share / self.weight * (value - self.mean);
    }
}

/// How long steps take, by the proposals of a sequence and by their rows.
///
/// By proposals, since kernels change with the rows that they get: on two cores with AVX-512, SmolLM2-135M in Q4_1 takes 3.8,
/// 3.9, 4.3, 6.8 and 11.5 ms for 1, 2, 3, 5 and 9 rows, which is no line. By rows, since the sequences of a step come and go: along a line that is fitted to
/// all steps by least squares, the latest most.
#[derive(Debug)]
struct StepTimes {
    /// Means of rows and of seconds by length.
    seen: Vec<[Mean; 2]>,
    /// Means of rows, seconds, rows squared, and rows times seconds.
    rows: Mean,
    seconds: Mean,
    squares: Mean,
    products: Mean,
    /// Seconds a row, as last fitted.
    slope: f64,
}

impl StepTimes {
    /// For lengths up to `most`.
    fn new(most: u32) -> Self {
        Self {
            seen: (0..=most).map(|_| Default::default()).collect(),
            rows: Mean::default(),
            seconds: Mean::default(),
            squares: Mean::default(),
            products: Mean::default(),
            slope: 0.0,
        }
    }

    fn add(&mut self, length: usize, rows: f64, seconds: f64) {
        if let Some([of_rows, of_seconds]) = self.seen.get_mut(length) {
            of_rows.add(rows, SHARE_OF_LENGTH);
            of_seconds.add(seconds, SHARE_OF_LENGTH);
        }
        self.rows.add(rows, SHARE);
        self.seconds.add(seconds, SHARE);
        self.squares.add(rows * rows, SHARE);
        self.products.add(rows * seconds, SHARE);
        // Steps all of one size say nothing of others: what was known of those stays.
        let variance = self.squares.mean - self.rows.mean * self.rows.mean;
        if variance > 0.01 * self.squares.mean {
            let covariance = self.products.mean - self.rows.mean * self.seconds.mean;
            self.slope = (covariance / variance).max(0.0);
        }
    }

    /// Seconds of a step of this length and so many rows, from what was seen of the length, or else of the next longer one,
    /// or shorter one. Until sizes have differed, rows cost nothing, and the first proposals show what they do.
    fn expected(&self, length: u32, rows: f64) -> f64 {
        let (shorter, longer) = self.seen.split_at(length as usize);
        let nearest = longer.iter().chain(shorter.iter().rev()).find(|[rows, _]| rows.weight > 0.0);
        let [of_rows, of_seconds] = nearest.map_or([0.0; 2], |seen| seen.each_ref().map(|mean| mean.mean));
        (of_seconds + self.slope * (rows - of_rows)).max(0.1 * of_seconds).max(1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose steps take `base + per_row * rows` seconds, `jump` more with more than one row a sequence, and
    /// `draft` for a proposal, and accept with probability `acceptance`.
    #[derive(Clone, Copy)]
    struct Machine {
        base: f64,
        per_row: f64,
        jump: f64,
        draft: f64,
        acceptance: f64,
        sequences: u32,
    }

    impl Machine {
        /// A new rule's choices.
        fn choices(&self, steps: usize) -> Vec<u32> {
            self.choices_of(&mut LengthRule::new(DraftLength::Adaptive { most: 8 }), steps)
        }

        /// A rule's choices.
        fn choices_of(&self, rule: &mut LengthRule, steps: usize) -> Vec<u32> {
            let sequences = self.sequences;
            let mut random = 1u64;
            let step = |_| {
                let length = rule.choose(sequences as usize);
                let mut batch = BatchStats { decode_tokens: sequences, ..BatchStats::default() };
                for _ in 0..sequences {
                    batch.drafted_tokens += length;
                    for _ in 0..length {
                        random = quire_kernels::generated::mix(random);
                        if (random >> 11) as f64 / (1u64 << 53) as f64 >= self.acceptance {
                            batch.refused_drafts += 1;
                            break;
                        }
                        batch.accepted_tokens += 1;
                    }
                }
                let draft = self.draft * f64::from(length);
                let rows = f64::from(sequences * (length + 1));
                let jump = if length > 0 { self.jump } else { 0.0 };
                rule.observe(&batch, self.base + self.per_row * rows + jump + draft, draft);
                length
            };
            (0..steps).map(step).collect()
        }
    }

    /// The mean of a rule's choices when it has seen a thousand steps; proposals cost nothing by themselves.
    fn settled(base: f64, per_row: f64, acceptance: f64, sequences: u32) -> f64 {
        let choices = Machine { base, per_row, jump: 0.0, draft: 0.0, acceptance, sequences }.choices(2000);
        choices[1000..].iter().map(|&length| f64::from(length)).sum::<f64>() / 1000.0
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
    fn what_does_not_pay_is_seen_in_the_first_steps() {
        // A proposal takes as long as a step: an early exit from half of the layers, and more.
        let free =
            Machine { base: 10e-3, per_row: 0.1e-3, jump: 0.0, draft: 0.0, acceptance: 0.6, sequences: 1 };
        let dear = Machine { draft: 10e-3, ..free }.choices(200);
        // The first five, and three tries.
        assert!(dear.iter().sum::<u32>() <= 8 + 1 + 4 + 3, "{dear:?}");
        // What is refused, though it costs nothing but its rows.
        let refused = Machine { per_row: 1e-3, acceptance: 0.0, sequences: 4, ..free }.choices(64);
        assert!(refused[16..].iter().all(|&length| length == 0), "{refused:?}");
        // And what pays is used from then on.
        let cheap = Machine { per_row: 0.01e-3, acceptance: 0.9, sequences: 4, ..free }.choices(64);
        assert!(cheap[5..].iter().all(|&length| length >= 6), "{cheap:?}");
    }

    #[test]
    fn steps_without_decodes_spend_no_tries() {
        let machine =
            Machine { base: 10e-3, per_row: 0.1e-3, jump: 0.0, draft: 10e-3, acceptance: 0.6, sequences: 1 };
        let mut rule = LengthRule::new(DraftLength::Adaptive { most: 8 });
        assert!((0..100).all(|_| rule.choose(0) == 0));
        assert_eq!(machine.choices_of(&mut rule, 200), machine.choices(200));
    }

    #[test]
    fn a_kernel_that_takes_longer_from_the_second_row_on_is_seen() {
        // Of a third accepted come 1.33 to 1.5 tokens a step, which takes 1.5 times as long and more: that does not pay.
        let jump =
            Machine { base: 10e-3, per_row: 0.1e-3, jump: 5e-3, draft: 0.0, acceptance: 0.33, sequences: 1 };
        let choices = jump.choices(1000);
        let none = choices[200..].iter().filter(|&&length| length == 0).count();
        assert!(none > 700, "{none} of 800: {choices:?}");
        let choices = Machine { acceptance: 0.9, ..jump }.choices(1000);
        assert!(choices[200..].iter().filter(|&&length| length >= 6).count() > 700, "{choices:?}");
    }

    #[test]
    fn what_was_seen_at_another_load_is_forgotten() {
        // Few sequences, whose rows are free; then many, whose rows take all the time.
        let mut rule = LengthRule::new(DraftLength::Adaptive { most: 8 });
        let few =
            Machine { base: 10e-3, per_row: 0.01e-3, jump: 0.0, draft: 0.0, acceptance: 0.6, sequences: 2 };
        few.choices_of(&mut rule, 2000);
        let many = Machine { base: 0.1e-3, per_row: 1e-3, sequences: 100, ..few }.choices_of(&mut rule, 600);
        let none = many[200..].iter().filter(|&&length| length == 0).count();
        assert!(none >= 390, "{many:?}");
        let few = few.choices_of(&mut rule, 600);
        assert!(few[200..].iter().filter(|&&length| length >= 3).count() > 380, "{few:?}");
    }

    #[test]
    fn a_fixed_length_is_fixed() {
        let mut rule = LengthRule::new(DraftLength::Fixed { tokens: 3 });
        assert_eq!((rule.choose(1), rule.choose(1000)), (3, 3));
    }
}
