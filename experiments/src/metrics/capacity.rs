//! The highest rate that a system sustains.

use serde::{Deserialize, Serialize};

/// One measured rate of a system.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatePoint {
    /// Requests a second.
    pub rate: f64,
    /// What is bounded (mean normalized latency, or the share of requests that miss their limits); none where the rate was
    /// left out after saturation at a lower one, which counts as beyond every bound.
    pub value: Option<f64>,
}

/// The highest rate that a system sustains: at which a value stays within a bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Requests a second.
    pub rate: f64,
    /// Whether no measured rate was beyond the bound, so that the capacity is at least this.
    pub at_least: bool,
}

/// Share of the requests that must meet their limits for a rate to count as sustained within them, as in SLOs-Serve
/// (Chen et al., 2025: more than 90 %).
pub const SLO_SHARE: f64 = 0.9;

/// Capacity from points by ascending rate. Between the last rate within the bound and the first beyond it, the value is
/// taken as a straight line; where the latter was left out, the former is the capacity. None without a value at
/// the lowest rate.
pub fn rate_capacity(points: &[RatePoint], factor: f64) -> Option<Capacity> {
    rate_within(points, factor * points.first()?.value?)
}

/// The highest rate at which the value is at most `bound`, as [`rate_capacity`] takes it from points. Where the lowest rate
/// is beyond the bound, it is that rate: compare its value.
pub fn rate_within(points: &[RatePoint], bound: f64) -> Option<Capacity> {
    let (first, rest) = points.split_first()?;
    if first.value? > bound {
        return Some(Capacity { rate: first.rate, at_least: false });
    }
    let mut within = (first.rate, first.value?);
    for point in rest {
        match point.value {
            Some(value) if value <= bound => within = (point.rate, value),
            Some(value) => {
                let share = (bound - within.1) / (value - within.1);
                return Some(Capacity { rate: within.0 + share * (point.rate - within.0), at_least: false });
            }
            None => return Some(Capacity { rate: within.0, at_least: false }),
        }
    }
    Some(Capacity { rate: within.0, at_least: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[(f64, Option<f64>)]) -> Vec<RatePoint> {
        values.iter().map(|&(rate, value)| RatePoint { rate, value }).collect()
    }

    #[test]
    fn the_crossing_is_interpolated() {
        // Bound 0.5; at 2 it is 0.2, at 4 it is 0.8: crossed half-way.
        let p = points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, Some(0.8)), (8.0, Some(0.3))]);
        let c = rate_capacity(&p, 5.0).unwrap();
        assert!((c.rate - 3.0).abs() < 1e-12 && !c.at_least, "{c:?}");
    }

    #[test]
    fn never_crossed_is_a_lower_bound() {
        let c = rate_capacity(&points(&[(1.0, Some(0.1)), (2.0, Some(0.5))]), 5.0).unwrap();
        assert_eq!(c, Capacity { rate: 2.0, at_least: true });
    }

    #[test]
    fn a_bound_of_its_own_is_crossed_elsewhere() {
        let p = points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, Some(0.8))]);
        let rate = |bound| rate_within(&p, bound).unwrap();
        assert!((rate(0.15).rate - 1.5).abs() < 1e-12);
        assert_eq!(rate(0.05), Capacity { rate: 1.0, at_least: false });
        assert_eq!(rate(1.0), Capacity { rate: 4.0, at_least: true });
    }

    #[test]
    fn a_rate_left_out_ends_it() {
        let c = rate_capacity(&points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, None)]), 5.0).unwrap();
        assert_eq!(c, Capacity { rate: 2.0, at_least: false });
        assert_eq!(rate_capacity(&points(&[(1.0, None)]), 5.0), None);
    }
}
