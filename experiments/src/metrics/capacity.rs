//! The highest rate that a system sustains.

use serde::{Deserialize, Serialize};

/// From which side a value is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Known {
    /// From both.
    Exactly,
    /// It is this or more.
    AtLeast,
    /// It is this or less.
    AtMost,
}

impl Known {
    /// What is written before such a value.
    pub fn mark(self) -> &'static str {
        match self {
            Self::Exactly => "",
            Self::AtLeast => ">",
            Self::AtMost => "<",
        }
    }

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exactly => "exactly",
            Self::AtLeast => "at least",
            Self::AtMost => "at most",
        }
    }
}

/// One measured rate of a system.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RatePoint {
    /// Requests a second.
    pub rate: f64,
    /// What is bounded (mean normalized latency, or the share of requests that miss their limits); none where the rate was
    /// left out after the system was overloaded at a lower one or too many requests were rejected or failed, which counts as beyond every bound.
    pub value: Option<f64>,
    /// Whether the value is a lower bound, from requests that had not ended.
    pub is_bound: bool,
}

/// The highest rate that a system sustains: at which a value stays within a bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Requests a second.
    pub rate: f64,
    /// From which side it is known: it is at least this where no measured rate was beyond the bound, and at most this where
    /// the lowest was. None where lower bounds leave both sides open.
    pub known: Option<Known>,
}

/// Share of the requests that must meet their limits for a rate to count as sustained within them, as in SLOs-Serve
/// (Chen et al., 2025: more than 90 %).
pub const SLO_SHARE: f64 = 0.9;

/// Capacity from points by ascending rate. Between the last rate within the bound and the first beyond it, the value is
/// taken as a straight line; where the latter was left out, the former is the capacity. None without a value at
/// the lowest rate.
pub fn rate_capacity(points: &[RatePoint], factor: f64) -> Option<Capacity> {
    let (first, rest) = points.split_first()?;
    // Whatever its value is, it is within a multiple of itself.
    let within = RatePoint { is_bound: false, ..*first };
    rate_within(&[&[within], rest].concat(), factor * first.value?, first.is_bound)
}

/// The highest rate at which the value is at most `bound`, as [`rate_capacity`] takes it from points; `is_bound` where
/// `bound` itself is a lower bound of the one that is meant.
pub fn rate_within(points: &[RatePoint], bound: f64, mut is_bound: bool) -> Option<Capacity> {
    points.first()?;
    let (mut within, mut crossing) = (None, None);
    // Whether a value so far may be beyond the bound after all; and the last rate before the first that may.
    let (mut open, mut sure) = (false, None);
    for point in points {
        open |= point.is_bound;
        crossing = match (point.value, within) {
            (Some(value), _) if value <= bound => {
                within = Some((point.rate, value));
                sure = if open { sure } else { Some(point.rate) };
                continue;
            }
            (Some(_), None) => Some(point.rate),
            (None, None) => {
                is_bound = false;
                Some(point.rate)
            }
            (None, Some((rate, _))) => {
                // It counts as beyond every bound, however high that is.
                is_bound = false;
                Some(rate)
            }
            (Some(value), Some((rate, last))) => {
                Some(rate + (bound - last) / (value - last) * (point.rate - rate))
            }
        };
        break;
    }
    let at_least_sure = |rate| match sure {
        Some(sure) => Capacity { rate: sure, known: Some(Known::AtLeast) },
        None => Capacity { rate, known: None },
    };
    let known = |rate, known| Capacity { rate, known: Some(known) };
    Some(match (crossing, within) {
        (Some(rate), None) if !is_bound => known(rate, Known::AtMost),
        (Some(rate), Some(_)) if !is_bound => known(rate, if open { Known::AtMost } else { Known::Exactly }),
        (Some(rate), Some(_)) if !open => known(rate, Known::AtLeast),
        (Some(rate), _) => at_least_sure(rate),
        (None, Some((rate, _))) if !open => known(rate, Known::AtLeast),
        (None, last) => at_least_sure(last?.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[(f64, Option<f64>)]) -> Vec<RatePoint> {
        values.iter().map(|&(rate, value)| RatePoint { rate, value, is_bound: false }).collect()
    }

    #[test]
    fn the_crossing_is_interpolated() {
        // Bound 0.5; at 2 it is 0.2, at 4 it is 0.8: crossed half-way.
        let p = points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, Some(0.8)), (8.0, Some(0.3))]);
        let c = rate_capacity(&p, 5.0).unwrap();
        assert!((c.rate - 3.0).abs() < 1e-12 && c.known == Some(Known::Exactly), "{c:?}");
    }

    #[test]
    fn never_crossed_is_a_lower_bound() {
        let c = rate_capacity(&points(&[(1.0, Some(0.1)), (2.0, Some(0.5))]), 5.0).unwrap();
        assert_eq!(c, Capacity { rate: 2.0, known: Some(Known::AtLeast) });
    }

    #[test]
    fn a_bound_of_its_own_is_crossed_elsewhere() {
        let p = points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, Some(0.8))]);
        let rate = |bound| rate_within(&p, bound, false).unwrap();
        assert!((rate(0.15).rate - 1.5).abs() < 1e-12);
        assert_eq!(rate(0.05), Capacity { rate: 1.0, known: Some(Known::AtMost) });
        assert_eq!(rate(1.0), Capacity { rate: 4.0, known: Some(Known::AtLeast) });
    }

    #[test]
    fn a_rate_left_out_ends_it() {
        let c = rate_capacity(&points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, None)]), 5.0).unwrap();
        assert_eq!(c, Capacity { rate: 2.0, known: Some(Known::Exactly) });
        assert_eq!(rate_capacity(&points(&[(1.0, None)]), 5.0), None);
    }

    #[test]
    fn a_lowest_rate_beyond_every_bound_is_at_most() {
        let p = points(&[(1.0, None), (2.0, Some(0.1))]);
        let at_most = Some(Capacity { rate: 1.0, known: Some(Known::AtMost) });
        assert_eq!((rate_within(&p, 0.5, true), rate_within(&p, 0.5, false)), (at_most, at_most));
        assert_eq!(rate_within(&[], 0.5, false), None);
    }

    #[test]
    fn lower_bounds_are_known_from_one_side() {
        // Bound 0.5. The values at the rates in `open` are lower bounds.
        let p = points(&[(1.0, Some(0.1)), (2.0, Some(0.4)), (4.0, Some(0.8))]);
        let within = |open: &[f64], last: usize, is_bound| {
            let mut p = p[..last].to_vec();
            p.iter_mut().for_each(|point| point.is_bound = open.contains(&point.rate));
            let c = rate_within(&p, 0.5, is_bound).unwrap();
            (c.rate, c.known)
        };
        assert_eq!(within(&[], 3, false), (2.5, Some(Known::Exactly)));
        // Any of them may be higher, and the crossing before.
        assert_eq!(within(&[4.0], 3, false), (2.5, Some(Known::AtMost)));
        assert_eq!(within(&[2.0], 3, false), (2.5, Some(Known::AtMost)));
        // The bound may be higher, and the crossing behind.
        assert_eq!(within(&[], 3, true), (2.5, Some(Known::AtLeast)));
        // Both: what lies before the first that is open is within, whatever the others are.
        assert_eq!(within(&[4.0], 3, true), (2.0, Some(Known::AtLeast)));
        assert_eq!(within(&[2.0], 3, true), (1.0, Some(Known::AtLeast)));
        assert_eq!(within(&[1.0], 3, true), (2.5, None));
        // No rate is beyond.
        assert_eq!(within(&[2.0], 2, false), (1.0, Some(Known::AtLeast)));
        assert_eq!(within(&[1.0], 2, false), (2.0, None));
        // The lowest is beyond the bound as far as that is known.
        assert_eq!(rate_within(&p[2..], 0.5, true), Some(Capacity { rate: 4.0, known: None }));
    }

    #[test]
    fn a_system_is_within_a_multiple_of_itself() {
        let mut p = points(&[(1.0, Some(0.1)), (2.0, Some(0.2)), (4.0, Some(0.8))]);
        p[0].is_bound = true;
        let c = rate_capacity(&p, 5.0).unwrap();
        assert!((c.rate - 3.0).abs() < 1e-12 && c.known == Some(Known::AtLeast), "{c:?}");
        p[2].is_bound = true;
        assert_eq!(rate_capacity(&p, 5.0), Some(Capacity { rate: 2.0, known: Some(Known::AtLeast) }));
        p[1] = RatePoint { value: None, ..p[1] };
        assert_eq!(rate_capacity(&p, 5.0), Some(Capacity { rate: 1.0, known: Some(Known::Exactly) }));
    }
}
