//! Latencies and goodput of each priority class.

use serde::{Deserialize, Serialize};

use super::cell::{normalized_latency, ttft};
use super::request::Observed;
use crate::stats::Distribution;

/// Figures of the requests of one priority class, over the same stretch as the cell's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    /// The class, 0 is the best.
    pub class: u8,
    /// Requests that arrived.
    pub requests: u64,
    /// Seconds a token.
    pub normalized_latency: Distribution,
    /// Time to first token.
    pub ttft: Distribution,
    /// Requests a second that met every limit; none without limits.
    pub goodput_rps: Option<f64>,
}

/// Figures of each class that `requests` have, the best first; `goodput` is of those that it is given.
pub(super) fn by_class(
    requests: &[&Observed],
    goodput: impl Fn(&[&Observed]) -> Option<f64>,
) -> Vec<ClassMetrics> {
    let mut classes: Vec<u8> = requests.iter().filter_map(|request| request.class).collect();
    classes.sort_unstable();
    classes.dedup();
    let figures = classes.into_iter().map(|class| {
        let own: Vec<&Observed> =
            requests.iter().copied().filter(|request| request.class == Some(class)).collect();
        ClassMetrics {
            class,
            requests: own.len() as u64,
            normalized_latency: normalized_latency(&own),
            ttft: ttft(&own),
            goodput_rps: goodput(&own),
        }
    });
    figures.collect()
}

#[cfg(test)]
mod tests {
    use super::super::request::{Emission, Ending, Slo};
    use super::*;

    #[test]
    fn classes_are_told_apart() {
        let request = |class, first_s| Observed {
            intended_s: 1.0,
            emissions: vec![
                Emission { at_s: first_s, tokens: 1 },
                Emission { at_s: first_s + 1.0, tokens: 1 },
            ],
            ending: Ending::Finished,
            cut: false,
            end_s: first_s + 1.0,
            expected_tokens: 2,
            prompt_tokens: 1,
            cached_tokens: 0,
            class,
            outputs: 1,
        };
        let all = [request(Some(2), 5.0), request(Some(0), 2.0), request(Some(2), 7.0)];
        let slo = Slo { ttft_s: 4.0, tpot_s: 1.0 };
        let goodput =
            |requests: &[&Observed]| Some(requests.iter().filter(|r| r.meets(&slo)).count() as f64 / 2.0);
        let classes = by_class(&all.iter().collect::<Vec<_>>(), goodput);
        let seen: Vec<_> = classes.iter().map(|c| (c.class, c.requests, c.ttft.mean)).collect();
        assert_eq!(seen, [(0, 1, Some(1.0)), (2, 2, Some(5.0))]);
        // (2 - 1 + 1) / 2; and of the others (5 + 7) / 2 / 2.
        assert_eq!(classes[0].normalized_latency.mean, Some(1.0));
        assert_eq!(classes[1].normalized_latency.mean, Some(3.0));
        // A first token after 1 second is in time; after 4 and 6, one of two is.
        assert_eq!(classes.iter().map(|c| c.goodput_rps).collect::<Vec<_>>(), [Some(0.5), Some(0.5)]);
        assert!(by_class(&[&request(None, 2.0)], goodput).is_empty());
    }
}
