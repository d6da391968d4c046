//! Choices of the GPU's logits beside a reference's.

/// Index and value of the greatest logit, and what the next one lacks to it.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.select_nth_unstable_by(1, |&a, &b| logits[b].total_cmp(&logits[a]));
    let (first, second) = match logits[order[0]] >= logits[order[1]] {
        true => (order[0], order[1]),
        false => (order[1], order[0]),
    };
    (first, logits[first] - logits[second])
}

/// Rows of logits beside those of a reference: where their choices differ, the reference must have been undecided, which is to
/// say that its two greatest logits are closer than the logits' error.
#[derive(Default)]
pub(crate) struct Choices {
    /// The greatest difference of a logit in rows whose choices agree: a row whose choices differ says nothing of the error that
    /// it is judged by, since its own is never below half its gap.
    error: f64,
    /// Squares of the differences there, and of the reference's logits.
    squares: [f64; 2],
    /// What the second logit of each row lacks to the first, by the reference.
    gaps: Vec<f64>,
    /// Rows whose choices differ.
    differing: Vec<usize>,
}

impl Choices {
    pub(crate) fn add(&mut self, ours: &[f32], reference: &[f32]) {
        let ((choice, _), (wanted, gap)) = (best(ours), best(reference));
        self.gaps.push(f64::from(gap));
        if choice != wanted {
            self.differing.push(self.gaps.len() - 1);
            return;
        }
        for (&a, &b) in ours.iter().zip(reference) {
            let (difference, b) = (f64::from(a) - f64::from(b), f64::from(b));
            self.error = self.error.max(difference.abs());
            self.squares[0] += difference * difference;
            self.squares[1] += b * b;
        }
    }

    /// Prints and checks; `bound` is what the logits may be off by, relative to them.
    pub(crate) fn check(&self, what: &str, bound: f64) {
        let Self { error, squares, gaps, differing } = self;
        let relative = (squares[0] / squares[1]).sqrt();
        let undecided = gaps.iter().filter(|gap| *gap < error).count();
        let widest = differing.iter().map(|&row| gaps[row]).fold(0.0, f64::max);
        println!(
            "{what}: {} of {} choices differ, where the reference's gap is at most {widest:.4}; elsewhere the logits' greatest \
             error is {error:.4} (relative to them {relative:.2e}), and {undecided} gaps are below it",
            differing.len(),
            gaps.len()
        );
        // Else any gap would do.
        assert!(relative < bound, "{what}: the logits are off by {relative:.2e}");
        assert!(
            2 * undecided < gaps.len(),
            "{what}: {undecided} of {} gaps are below {error:.4}",
            gaps.len()
        );
        for &row in differing {
            let gap = gaps[row];
            assert!(
                gap < *error,
                "{what}, row {row}: the gap is {gap:.4}, the logits' error elsewhere {error:.4}"
            );
        }
    }
}
