//! Means, percentiles and confidence intervals. Intervals are over seeds only, never over one run's requests.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, StudentsT};

/// Fewest samples from which the 99th percentile is given.
pub const MIN_SAMPLES_FOR_P99: u64 = 1_000;

/// Confidence level of every interval.
pub const CONFIDENCE: f64 = 0.95;

/// Mean and percentiles of one quantity over a cell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Values counted.
    pub count: u64,
    /// Of these, values that are lower bounds, from requests that had not ended.
    pub lower_bounds: u64,
    /// Arithmetic mean; none without values.
    pub mean: Option<f64>,
    /// Median.
    pub p50: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 99th percentile, given from [`MIN_SAMPLES_FOR_P99`] values up.
    pub p99: Option<f64>,
    /// The largest value, exactly.
    #[serde(default)]
    pub max: Option<f64>,
    /// What the median is at most, however large the values are of which only lower bounds are known; none where that is open.
    #[serde(default)]
    pub p50_most: Option<f64>,
    /// The same of the 90th percentile.
    #[serde(default)]
    pub p90_most: Option<f64>,
    /// The same of the 99th percentile.
    #[serde(default)]
    pub p99_most: Option<f64>,
}

/// Collects values in seconds into a [`Distribution`]: the mean is exact, percentiles come from a histogram of
/// microseconds with three significant digits.
#[derive(Debug)]
pub struct Sampler {
    micros: Histogram<u64>,
    /// Of these, the values that are lower bounds.
    bounds: Histogram<u64>,
    sum: f64,
    max: f64,
}

impl Default for Sampler {
    fn default() -> Self {
        let micros: Histogram<u64> = Histogram::new(3).expect("three digits are allowed");
        Self { bounds: micros.clone(), micros, sum: 0.0, max: 0.0 }
    }
}

impl Sampler {
    /// Counts a value of `seconds`.
    pub fn add(&mut self, seconds: f64) {
        record(&mut self.micros, seconds);
        self.sum += seconds;
        self.max = self.max.max(seconds);
    }

    /// Counts a value known only to be at least `seconds`.
    pub fn add_lower_bound(&mut self, seconds: f64) {
        self.add(seconds);
        record(&mut self.bounds, seconds);
    }

    /// What was collected.
    pub fn finish(&self) -> Distribution {
        let count = self.micros.len();
        let quantile = |q: f64| (count > 0).then(|| self.micros.value_at_quantile(q) as f64 / 1e6);
        let mut exact = self.micros.clone();
        exact.subtract(&self.bounds).expect("all bounds are among the values");
        // With every value that is bounded beyond all others, the value of the same rank.
        let most = |q: f64| {
            let rank = (q * count as f64).ceil();
            let share = (rank - 0.5) / exact.len() as f64; // rounded up to the rank again, whatever the division gives
            (rank <= exact.len() as f64).then(|| exact.value_at_quantile(share) as f64 / 1e6)
        };
        let tail = count >= MIN_SAMPLES_FOR_P99;
        Distribution {
            count,
            lower_bounds: self.bounds.len(),
            mean: (count > 0).then(|| self.sum / count as f64),
            p50: quantile(0.5),
            p90: quantile(0.9),
            p99: quantile(0.99).filter(|_| tail),
            max: (count > 0).then_some(self.max),
            p50_most: most(0.5),
            p90_most: most(0.9),
            p99_most: most(0.99).filter(|_| tail),
        }
    }
}

fn record(histogram: &mut Histogram<u64>, seconds: f64) {
    let micros = (seconds * 1e6).round().clamp(0.0, 9e15) as u64;
    histogram.record(micros).expect("the histogram resizes itself");
}

/// A mean over seeds with its confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Mean over seeds.
    pub mean: f64,
    /// Half the width of the interval at [`CONFIDENCE`]; none with one seed.
    pub half_width: Option<f64>,
    /// Seeds.
    pub seeds: usize,
}

impl Estimate {
    /// Mean of one value a seed, with Student's interval. None without values.
    pub fn over_seeds(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let half_width = (values.len() > 1).then(|| {
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
            student_quantile(values.len() - 1) * (variance / n).sqrt()
        });
        Some(Self { mean, half_width, seeds: values.len() })
    }

    /// Lower and upper end of the interval; none with one seed.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.half_width.map(|half| (self.mean - half, self.mean + half))
    }
}

/// A ratio over paired seeds: the geometric mean of one ratio a seed, with the interval of its logarithm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RatioEstimate {
    /// Geometric mean of the ratios.
    pub ratio: f64,
    /// Ends of the interval at [`CONFIDENCE`]; none with one seed.
    pub interval: Option<(f64, f64)>,
    /// Pairs.
    pub seeds: usize,
}

impl RatioEstimate {
    /// From pairs `(numerator, denominator)`, one a seed. None without pairs, and where a value is not positive: a ratio
    /// over the other pairs would be of those seeds alone in which neither is zero.
    pub fn paired(pairs: &[(f64, f64)]) -> Option<Self> {
        let positive = |value: f64| value > 0.0 && value.is_finite();
        if !pairs.iter().all(|&(a, b)| positive(a) && positive(b)) {
            return None;
        }
        let logs: Vec<f64> = pairs.iter().map(|(a, b)| (a / b).ln()).collect();
        Estimate::over_seeds(&logs).map(|log| Self {
            ratio: log.mean.exp(),
            interval: log.interval().map(|(low, high)| (low.exp(), high.exp())),
            seeds: log.seeds,
        })
    }
}

/// Two-sided quantile of Student's t at [`CONFIDENCE`].
fn student_quantile(degrees: usize) -> f64 {
    StudentsT::new(0.0, 1.0, degrees as f64)
        .expect("at least one degree of freedom")
        .inverse_cdf(0.5 + CONFIDENCE / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        let mut sampler = Sampler::default();
        for i in 1..=10 {
            sampler.add(f64::from(i) * 0.1);
        }
        let d = sampler.finish();
        assert_eq!(d.count, 10);
        assert!((d.mean.unwrap() - 0.55).abs() < 1e-12);
        assert!((d.p50.unwrap() - 0.5).abs() < 0.001, "{:?}", d.p50);
        assert!((d.p90.unwrap() - 0.9).abs() < 0.001, "{:?}", d.p90);
        assert_eq!(d.p99, None, "ten values do not give a 99th percentile");
        assert_eq!(d.max, Some(1.0));
    }

    /// Whatever rank over number rounds to.
    #[test]
    fn bounds_beyond_a_percentile_leave_it_known() {
        for known in 1..200u32 {
            for bounds in 1..4u32 {
                let mut sampler = Sampler::default();
                (1..=known).for_each(|i| sampler.add(f64::from(i)));
                (1..=bounds).for_each(|i| sampler.add_lower_bound(f64::from(1000 + i)));
                let found = sampler.finish();
                let beyond = (0.5 * f64::from(known + bounds)).ceil() > f64::from(known);
                let expected = found.p50.filter(|_| !beyond);
                assert_eq!(found.p50_most, expected, "{known} values, {bounds} bounds");
            }
        }
    }

    #[test]
    fn p99_appears_at_a_thousand() {
        let mut sampler = Sampler::default();
        for i in 1..=1000 {
            sampler.add(f64::from(i) * 0.001);
        }
        assert!((sampler.finish().p99.unwrap() - 0.99).abs() < 0.001);
    }

    #[test]
    fn a_percentile_is_known_as_far_as_the_values_around_it_are() {
        let of = |open: i32| {
            let mut sampler = Sampler::default();
            (1..=1000 - open).for_each(|i| sampler.add(f64::from(i) * 0.001));
            (0..open).for_each(|_| sampler.add_lower_bound(0.0005));
            sampler.finish()
        };
        let near = |found: Option<f64>, value: f64| (found.unwrap() - value).abs() < 0.001;
        let d = of(0);
        assert_eq!((d.p50, d.p90, d.p99), (d.p50_most, d.p90_most, d.p99_most));
        // Five values may be small, as they seem, or the largest of all.
        let d = of(5);
        assert_eq!(d.lower_bounds, 5);
        assert!(near(d.p50, 0.495) && near(d.p50_most, 0.5));
        assert!(near(d.p99, 0.985) && near(d.p99_most, 0.99));
        let d = of(11);
        assert!(near(d.p90_most, 0.9));
        assert_eq!(d.p99_most, None, "more are open than lie above it");
    }

    #[test]
    fn nothing_gives_nothing() {
        assert_eq!(Sampler::default().finish().mean, None);
        assert_eq!(Estimate::over_seeds(&[]), None);
    }

    #[test]
    fn student_interval_by_hand() {
        // Mean 3, standard deviation sqrt(2.5), t(4, 97.5 %) = 2.776445.
        let e = Estimate::over_seeds(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!((e.mean - 3.0).abs() < 1e-12);
        assert!((e.half_width.unwrap() - 2.776_445 * (2.5f64 / 5.0).sqrt()).abs() < 1e-4);
        assert_eq!(Estimate::over_seeds(&[1.0]).unwrap().half_width, None);
    }

    #[test]
    fn paired_ratio_is_geometric() {
        let r = RatioEstimate::paired(&[(2.0, 1.0), (8.0, 1.0)]).unwrap();
        assert!((r.ratio - 4.0).abs() < 1e-12);
        assert_eq!(r.seeds, 2);
        // Logs ln 2 and ln 8: deviation ln 4 / sqrt 2, t(1) = 12.7062.
        let half = 12.706_2 * (4f64.ln() / 2f64.sqrt()) / 2f64.sqrt();
        assert!((r.interval.unwrap().1.ln() - (4f64.ln() + half)).abs() < 1e-3);
    }

    #[test]
    fn a_pair_with_a_zero_leaves_no_ratio() {
        for odd in [(0.0, 1.0), (1.0, 0.0), (f64::NAN, 1.0), (f64::INFINITY, 1.0)] {
            assert_eq!(RatioEstimate::paired(&[(2.0, 1.0), odd]), None, "{odd:?}");
        }
        assert_eq!(RatioEstimate::paired(&[]), None);
    }
}
