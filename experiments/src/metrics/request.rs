//! The figures of one request. Times are seconds on the run's clock; every figure counts from the intended arrival.

/// How a request ended, as far as metrics go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// All its tokens were delivered.
    Finished,
    /// It had not ended when the cell did.
    Censored,
    /// The system refused it.
    Rejected,
    /// The system broke while serving it.
    Failed,
    /// The client took it back.
    Cancelled,
}

/// Tokens that came together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Emission {
    /// When.
    pub at_s: f64,
    /// How many, at least one.
    pub tokens: u32,
}

/// What metrics need to know of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// When it was to be sent.
    pub intended_s: f64,
    /// Its tokens by time.
    pub emissions: Vec<Emission>,
    /// How it ended.
    pub ending: Ending,
    /// Whether it finished with fewer tokens than it was to have, by no choice of the model's: its KV memory ran out, or the
    /// system ended it early.
    pub cut: bool,
    /// When it ended; for a censored request, when watching it ended.
    pub end_s: f64,
    /// Output tokens it was to have by its trace.
    pub expected_tokens: u32,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Of these, found in a cache: known when it has finished.
    pub cached_tokens: u32,
    /// Priority class, 0 is the best; none where there are no classes.
    pub class: Option<u8>,
    /// Outputs wanted of its prompt: figures per token are of each, `emissions` of all.
    pub outputs: u32,
}

/// Limits a request must keep to count for goodput.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slo {
    /// Time to first token, seconds.
    pub ttft_s: f64,
    /// Time per output token after the first, seconds.
    pub tpot_s: f64,
}

impl Observed {
    /// Output tokens delivered.
    pub fn tokens(&self) -> u64 {
        self.emissions.iter().map(|e| u64::from(e.tokens)).sum()
    }

    /// Tokens of one output, where there are several.
    fn tokens_each(&self) -> f64 {
        self.tokens() as f64 / f64::from(self.outputs.max(1))
    }

    /// Whether its latencies count: those of requests that were rejected, failed or were cancelled do not, whatever they had.
    fn counts(&self) -> bool {
        matches!(self.ending, Ending::Finished | Ending::Censored)
    }

    /// Time to first token.
    pub fn ttft(&self) -> Option<f64> {
        self.emissions.first().filter(|_| self.counts()).map(|e| e.at_s - self.intended_s)
    }

    /// End-to-end time of a finished request.
    pub fn e2e(&self) -> Option<f64> {
        (self.ending == Ending::Finished).then_some(self.end_s - self.intended_s)
    }

    /// Time per output token after the first, (E2E - TTFT) / (n - 1), of a finished request; undefined at n = 1.
    pub fn tpot(&self) -> Option<f64> {
        let after_first = Some(self.tokens_each() - 1.0).filter(|n| *n > 0.0)?;
        Some((self.e2e()? - self.ttft()?) / after_first)
    }

    /// Normalized latency, E2E / n, of a finished request.
    pub fn normalized_latency(&self) -> Option<f64> {
        let tokens = Some(self.tokens_each()).filter(|n| *n > 0.0)?;
        Some(self.e2e()? / tokens)
    }

    /// What the normalized latency of a censored request will be at least: the time watched over the tokens it was
    /// to have (or already has, if that is more).
    pub fn normalized_latency_bound(&self) -> Option<f64> {
        let tokens = f64::from(self.expected_tokens).max(self.tokens_each()).max(1.0);
        self.watched().map(|watched| watched / tokens)
    }

    /// What the time to first token of a censored request without a token will be at least.
    pub fn ttft_bound(&self) -> Option<f64> {
        self.watched().filter(|_| self.emissions.is_empty())
    }

    /// What the time per output token of a censored request with a first token will be at least: the time watched since
    /// then over the tokens it was to have after it.
    pub fn tpot_bound(&self) -> Option<f64> {
        let after_first = f64::from(self.expected_tokens).max(self.tokens_each()) - 1.0;
        let first =
            self.emissions.first().filter(|_| self.ending == Ending::Censored && after_first > 0.0)?;
        Some((self.end_s - first.at_s).max(0.0) / after_first)
    }

    /// The gap after the last token of a censored request that was to have more: it will be at least as long.
    pub fn open_gap(&self) -> Option<f64> {
        let expected = u64::from(self.expected_tokens) * u64::from(self.outputs.max(1));
        let last = self.emissions.last();
        let last = last.filter(|_| self.ending == Ending::Censored && self.tokens() < expected)?;
        Some((self.end_s - last.at_s).max(0.0))
    }

    fn watched(&self) -> Option<f64> {
        (self.ending == Ending::Censored).then_some((self.end_s - self.intended_s).max(0.0))
    }

    /// Gaps between emissions. Tokens that came together are one gap, to the emission before them; with `all`, also
    /// a gap of zero for each token after the first of an emission.
    pub fn gaps(&self, all: bool) -> impl Iterator<Item = f64> + '_ {
        let emissions = if self.counts() { &self.emissions[..] } else { &[] };
        let between = emissions.windows(2).map(|pair| pair[1].at_s - pair[0].at_s);
        let within = emissions.iter().map(|e| e.tokens.saturating_sub(1) as usize).sum();
        between.chain(std::iter::repeat_n(0.0, if all { within } else { 0 }))
    }

    /// Whether it finished, with all its tokens, within every limit; where TPOT is undefined, TTFT alone decides.
    pub fn meets(&self, slo: &Slo) -> bool {
        self.ending == Ending::Finished
            && !self.cut
            && self.ttft().is_some_and(|t| t <= slo.ttft_s)
            && self.tpot().is_none_or(|t| t <= slo.tpot_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Intended at 10; tokens at 12, 13, 15 (two at once); ended at 16.
    fn example() -> Observed {
        let emission = |at_s, tokens| Emission { at_s, tokens };
        Observed {
            intended_s: 10.0,
            emissions: vec![emission(12.0, 1), emission(13.0, 1), emission(15.0, 2)],
            ending: Ending::Finished,
            cut: false,
            end_s: 16.0,
            expected_tokens: 4,
            prompt_tokens: 5,
            cached_tokens: 0,
            class: None,
            outputs: 1,
        }
    }

    #[test]
    fn a_finished_request_by_hand() {
        let r = example();
        assert_eq!(r.tokens(), 4);
        assert_eq!(r.ttft(), Some(2.0));
        assert_eq!(r.e2e(), Some(6.0));
        assert_eq!(r.tpot(), Some(4.0 / 3.0));
        assert_eq!(r.normalized_latency(), Some(1.5));
        assert_eq!(r.gaps(false).collect::<Vec<_>>(), [1.0, 2.0]);
        assert_eq!(r.gaps(true).collect::<Vec<_>>(), [1.0, 2.0, 0.0]);
        let bounds = [r.normalized_latency_bound(), r.tpot_bound(), r.open_gap()];
        assert_eq!(bounds, [None; 3], "it is known, not bounded");
    }

    #[test]
    fn one_that_was_cut_short_has_latencies_and_meets_no_limit() {
        let slo = Slo { ttft_s: 9.0, tpot_s: 9.0 };
        assert!(example().meets(&slo));
        let cut = Observed { cut: true, ..example() };
        assert!(!cut.meets(&slo));
        assert_eq!(cut.normalized_latency(), example().normalized_latency());
    }

    #[test]
    fn tpot_is_undefined_for_one_token() {
        let mut r = example();
        r.emissions.truncate(1);
        assert_eq!(r.tpot(), None);
        assert!(r.meets(&Slo { ttft_s: 2.0, tpot_s: 0.0 }), "the first token came in time");
        assert!(!r.meets(&Slo { ttft_s: 1.9, tpot_s: 9.0 }));
    }

    #[test]
    fn a_censored_request_gives_lower_bounds() {
        let mut r = example();
        r.ending = Ending::Censored;
        r.end_s = 20.0;
        r.expected_tokens = 8;
        assert_eq!((r.e2e(), r.tpot(), r.normalized_latency()), (None, None, None));
        assert_eq!(r.normalized_latency_bound(), Some(10.0 / 8.0));
        assert_eq!(r.ttft_bound(), None, "its first token came");
        assert_eq!(r.tpot_bound(), Some((20.0 - 12.0) / (8.0 - 1.0)));
        assert_eq!(r.open_gap(), Some(5.0), "four tokens of eight came, the last at 15");
        r.expected_tokens = 4;
        assert_eq!(r.open_gap(), None, "it waits for its end only");
        assert!(!r.meets(&Slo { ttft_s: 100.0, tpot_s: 100.0 }));
        r.emissions.clear();
        assert_eq!(r.ttft_bound(), Some(10.0));
        assert_eq!((r.tpot_bound(), r.open_gap()), (None, None), "nothing is known of either");
    }

    #[test]
    fn limits_are_inclusive() {
        assert!(example().meets(&Slo { ttft_s: 2.0, tpot_s: 4.0 / 3.0 }));
        assert!(!example().meets(&Slo { ttft_s: 2.0, tpot_s: 1.3 }));
    }

    #[test]
    fn what_failed_or_was_cancelled_has_no_latency() {
        for ending in [Ending::Failed, Ending::Cancelled] {
            let r = Observed { ending, ..example() };
            assert_eq!((r.ttft(), r.tpot(), r.gaps(true).count()), (None, None, 0), "{ending:?}");
        }
    }

    #[test]
    fn a_refused_request_has_no_latency_at_all() {
        let mut r = example();
        r.ending = Ending::Rejected;
        r.emissions.clear();
        assert_eq!((r.ttft(), r.ttft_bound(), r.normalized_latency_bound()), (None, None, None));
    }
}
