//! The stationary window of a cell, and whether the system keeps up in it.

use serde::{Deserialize, Serialize};

/// Share of the window's arrivals by which the queue must grow for the cell to count as saturated.
pub const SATURATION_SHARE: f64 = 0.2;

/// Fewest requests by which it must grow.
pub const SATURATION_MIN_GROWTH: f64 = 3.0;

/// A stretch of a cell's time, seconds on its clock: from `start_s` up to, not including, `end_s`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// First moment.
    pub start_s: f64,
    /// One past the last.
    pub end_s: f64,
}

impl Window {
    /// The stationary window of a cell whose requests were intended at `arrivals`: of the stretch from the first to
    /// the last, the first `warm_up` and the last `drain` (shares) are left out.
    pub fn stationary(arrivals: &[f64], warm_up: f64, drain: f64) -> Self {
        let (first, last) = bounds(arrivals);
        let span = last - first;
        Self { start_s: first + warm_up * span, end_s: last - drain * span }
    }

    /// The whole cell, from the first arrival to `end_s`.
    pub fn full(arrivals: &[f64], end_s: f64) -> Self {
        let (first, last) = bounds(arrivals);
        // One past the last arrival even when the cell ended with it.
        Self { start_s: first, end_s: end_s.max(last.next_up()) }
    }

    /// Whether `at_s` lies in the window.
    pub fn contains(&self, at_s: f64) -> bool {
        self.start_s <= at_s && at_s < self.end_s
    }

    /// Seconds.
    pub fn length(&self) -> f64 {
        (self.end_s - self.start_s).max(0.0)
    }

    /// Seconds of `from..to` that lie in the window.
    pub fn overlap(&self, from: f64, to: f64) -> f64 {
        (to.min(self.end_s) - from.max(self.start_s)).max(0.0)
    }
}

fn bounds(arrivals: &[f64]) -> (f64, f64) {
    arrivals.iter().fold((f64::INFINITY, 0.0), |(low, high), &a| (a.min(low), a.max(high)))
}

/// By how many requests the queue grows through the window: the slope of the least-squares line through its length,
/// times the window's length. `waits` are when each request joined and left the queue; one that never left it has an
/// infinite end.
pub fn queue_growth(waits: impl Iterator<Item = (f64, f64)>, window: &Window) -> f64 {
    let length = window.length();
    if length <= 0.0 {
        return 0.0;
    }
    let middle = window.start_s + length / 2.0;
    // Each request adds 1 over its wait, so the slope's numerator is a sum of integrals of (t - middle).
    let moment: f64 = waits
        .map(|(arrived, ended)| (arrived.max(window.start_s), ended.min(window.end_s)))
        .filter(|(from, to)| from < to)
        .map(|(from, to)| ((to - middle).powi(2) - (from - middle).powi(2)) / 2.0)
        .sum();
    moment * 12.0 / length.powi(2)
}

/// Whether a queue that grew by `growth` requests while `arrivals` arrived says that the system does not keep up.
pub fn is_saturated(growth: f64, arrivals: u64) -> bool {
    growth >= SATURATION_MIN_GROWTH && growth > SATURATION_SHARE * arrivals as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_leaves_out_warm_up_and_drain() {
        let w = Window::stationary(&[2.0, 12.0, 7.0], 0.2, 0.1);
        assert_eq!(w, Window { start_s: 4.0, end_s: 11.0 });
        assert!(w.contains(4.0) && !w.contains(11.0));
        assert_eq!(w.overlap(3.0, 5.0), 1.0);
        assert_eq!(w.overlap(12.0, 13.0), 0.0);
    }

    #[test]
    fn a_queue_that_nobody_leaves_grows_by_the_arrivals() {
        // One arrival a second, none leaves: a line of slope 1.
        let window = Window { start_s: 0.0, end_s: 100.0 };
        let waits = (0..100).map(|i| (f64::from(i), f64::INFINITY));
        let growth = queue_growth(waits, &window);
        assert!((growth - 100.0).abs() < 0.1, "{growth}");
        assert!(is_saturated(growth, 100));
    }

    #[test]
    fn the_queue_of_a_system_that_keeps_up_is_flat() {
        // One arrival a second, each waits 3 s, in the middle of a longer run.
        let window = Window { start_s: 10.0, end_s: 110.0 };
        let growth = queue_growth((0..200).map(|i| (f64::from(i), f64::from(i) + 3.0)), &window);
        assert!(growth.abs() < 0.1, "{growth}");
        assert!(!is_saturated(growth, 100));
    }

    #[test]
    fn the_queue_at_half_the_needed_speed_grows_by_half_the_arrivals() {
        // Request i arrives at i and leaves at 2 i: at t, t - t/2 wait.
        let window = Window { start_s: 0.0, end_s: 200.0 };
        let growth = queue_growth((0..200).map(|i| (f64::from(i), 2.0 * f64::from(i))), &window);
        assert!((growth - 100.0).abs() < 1.0, "{growth}");
    }

    #[test]
    fn two_requests_more_are_no_saturation() {
        assert!(!is_saturated(2.0, 5));
    }
}
