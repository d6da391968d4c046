//! Distribution functions of a trace and of the fit that stands for it.

use quire_workloads::Trace;
use serde::{Deserialize, Serialize};
use statrs::distribution::{ContinuousCDF, Gamma};

use super::fit::Fit;

/// Points of a curve, at most about.
const POINTS: usize = 256;

/// From how many seconds on a gap counts as idle, where no fit says.
const IDLE_S: f64 = 5.0;

/// What is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Prompt tokens.
    Input,
    /// Answer tokens.
    Output,
    /// Time between two arrivals over its mean. Idle gaps, of 5 s and more, are left out.
    Gap,
}

/// A distribution of a source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distribution {
    /// Of what.
    pub of: Axis,
    /// Its curves.
    pub curves: Vec<Curve>,
    /// Largest distance between the functions of the trace and of the fit (Kolmogorov and Smirnov's); none without a
    /// trace.
    pub distance: Option<f64>,
}

/// A distribution function.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Curve {
    /// Whose.
    pub kind: CurveKind,
    /// What it is, in words.
    pub what: String,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// Points `[value, share up to it]`, ascending.
    pub points: Vec<[f64; 2]>,
}

/// Whose a curve is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CurveKind {
    /// The trace's.
    Trace,
    /// The project's fit's.
    Fit,
    /// Poisson arrivals', for comparison.
    Poisson,
}

/// All distributions of a source.
pub(super) fn distributions(fit: &Fit, trace: Option<&Trace>) -> Vec<Distribution> {
    let lengths = |of, get: fn(&quire_workloads::trace::TraceRequest) -> u32| {
        let mut values: Vec<u32> = trace.iter().flat_map(|t| &t.requests).map(get).collect();
        values.sort_unstable();
        length(fit, of, &values)
    };
    let mut all = vec![lengths(Axis::Input, |r| r.input_len), lengths(Axis::Output, |r| r.output_len)];
    let gaps = trace.filter(|t| t.meta.timed).map(|t| {
        t.requests.windows(2).map(|pair| pair[1].arrival_s - pair[0].arrival_s).collect::<Vec<f64>>()
    });
    if fit.arrivals.is_some() || gaps.is_some() {
        let (idle_s, cv) = fit.arrivals.map_or((IDLE_S, None), |own| (own.idle_s, Some(own.busy_cv)));
        all.push(gap(idle_s, cv, gaps.unwrap_or_default()));
    }
    all
}

fn length(stats: &Fit, of: Axis, data: &[u32]) -> Distribution {
    let function = |tokens| stats.up_to(of, tokens);
    let summary = stats.summary(of);
    let points = grid().into_iter().map(|tokens| [f64::from(tokens), function(tokens)]);
    let fit = Curve {
        kind: CurveKind::Fit,
        what: stats.what(),
        mean: summary.mean,
        p50: summary.p50,
        p95: summary.p95,
        points: ends_cut(points.collect()),
    };
    let values: Vec<f64> = data.iter().map(|&tokens| f64::from(tokens)).collect();
    let n = data.len() as f64;
    let mut below = 0.0;
    let jumps = data.chunk_by(|a, b| a == b).map(|equal| {
        let before = below / n;
        below += equal.len() as f64;
        (before - function(equal[0] - 1)).abs().max((below / n - function(equal[0])).abs())
    });
    let distance = jumps.reduce(f64::max);
    Distribution { of, curves: empirical(&values).into_iter().chain([fit]).collect(), distance }
}

/// Gaps beside those of gamma arrivals of a coefficient of variation, where there is a fit, and of Poisson's.
fn gap(idle_s: f64, cv: Option<f64>, data: Vec<f64>) -> Distribution {
    let mut gaps: Vec<f64> = data.into_iter().filter(|&gap| gap < idle_s).collect();
    let mean = gaps.iter().sum::<f64>() / gaps.len().max(1) as f64;
    // Where all requests came at once there is nothing to divide by.
    if mean <= 0.0 {
        gaps.clear();
    }
    gaps.iter_mut().for_each(|gap| *gap /= mean);
    gaps.sort_by(f64::total_cmp);
    let fit = cv.and_then(|cv| gamma(CurveKind::Fit, cv, format!("gamma, CV {cv:.2}")));
    let poisson = gamma(CurveKind::Poisson, 1.0, "exponential, CV 1".into());
    let n = gaps.len() as f64;
    let distance = cv.and_then(shape).and_then(|function| {
        let at = |(i, gap): (usize, &f64)| {
            let share = function.cdf(*gap);
            (share - i as f64 / n).abs().max(((i + 1) as f64 / n - share).abs())
        };
        gaps.iter().enumerate().map(at).reduce(f64::max)
    });
    let curves = empirical(&gaps).into_iter().chain([fit, poisson].into_iter().flatten());
    Distribution { of: Axis::Gap, curves: curves.collect(), distance }
}

/// Gamma gaps of mean 1.
fn shape(cv: f64) -> Option<Gamma> {
    Gamma::new(1.0 / (cv * cv), 1.0 / (cv * cv)).ok()
}

fn gamma(kind: CurveKind, cv: f64, what: String) -> Option<Curve> {
    let function = shape(cv)?;
    let values = (0..POINTS).map(|i| 10f64.powf(-3.0 + 4.5 * i as f64 / (POINTS - 1) as f64));
    let points: Vec<[f64; 2]> = values.map(|value| [value, function.cdf(value)]).collect();
    let [p50, p95] = [0.5, 0.95].map(|share| function.inverse_cdf(share));
    Some(Curve { kind, what, mean: 1.0, p50, p95, points: ends_cut(points) })
}

/// The function of sorted values: at up to [`POINTS`] of their quantiles.
fn empirical(sorted: &[f64]) -> Option<Curve> {
    let last = sorted.len().checked_sub(1)?;
    let at = |share: f64| sorted[(share * last as f64).round() as usize];
    let mut points: Vec<[f64; 2]> = Vec::new();
    for i in 0..=POINTS {
        let value = at(i as f64 / POINTS as f64);
        let share = sorted.partition_point(|v| *v <= value) as f64 / sorted.len() as f64;
        if points.last().is_none_or(|point| point[0] < value) {
            points.push([value, share]);
        }
    }
    Some(Curve {
        kind: CurveKind::Trace,
        what: format!("{} values", sorted.len()),
        mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
        p50: at(0.5),
        p95: at(0.95),
        points,
    })
}

/// Lengths from 1 on, ever farther apart.
fn grid() -> Vec<u32> {
    let mut lengths: Vec<u32> =
        (0..POINTS).map(|i| 10f64.powf(5.0 * i as f64 / (POINTS - 1) as f64).round() as u32).collect();
    lengths.dedup();
    lengths
}

/// Points without those that only repeat 0 before a curve and 1 after it.
fn ends_cut(points: Vec<[f64; 2]>) -> Vec<[f64; 2]> {
    let first = points.partition_point(|point| point[1] < 5e-4).saturating_sub(1);
    let last = points.partition_point(|point| point[1] < 1.0 - 5e-5);
    points[first..(last + 1).min(points.len())].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Source;

    fn carried(name: &str) -> Fit {
        let source = toml::from_str(&format!("name = \"x\"\ntitle = \"X\"\nfit = \"{name}\"")).unwrap();
        Fit::of(&source, &Source::new("x.toml", "")).unwrap()
    }

    #[test]
    fn fits_are_distribution_functions() {
        let all = distributions(&carried("azure_conv_2023"), None);
        assert_eq!(all.iter().map(|d| d.of).collect::<Vec<_>>(), [Axis::Input, Axis::Output, Axis::Gap]);
        for distribution in &all {
            assert_eq!(distribution.distance, None, "there is no trace");
            for curve in &distribution.curves {
                assert_ne!(curve.kind, CurveKind::Trace);
                let rises = curve.points.windows(2).all(|p| p[0][0] < p[1][0] && p[0][1] <= p[1][1]);
                assert!(rises && curve.points[0][1] < 0.05 && curve.points.last().unwrap()[1] > 0.99);
            }
        }
        assert_eq!(distributions(&carried("share_gpt_like"), None).len(), 2, "it has no arrivals");
    }

    #[test]
    fn requests_that_came_at_once_have_no_distribution_of_gaps() {
        let of = |data: &[f64]| gap(IDLE_S, Some(1.1), data.to_vec());
        let kinds = |data: &[f64]| of(data).curves.iter().map(|c| c.kind).collect::<Vec<_>>();
        let fits = [CurveKind::Fit, CurveKind::Poisson];
        assert_eq!(kinds(&[0.0; 3]), fits);
        assert_eq!(of(&[0.0; 3]).distance, None);
        assert_eq!(kinds(&[1.0, 0.0]), [&[CurveKind::Trace][..], &fits].concat());
    }

    #[test]
    fn values_are_counted() {
        let curve = empirical(&[1.0, 2.0, 2.0, 4.0]).unwrap();
        assert_eq!(curve.points, [[1.0, 0.25], [2.0, 0.75], [4.0, 1.0]]);
        assert_eq!((curve.mean, curve.p50), (2.25, 2.0));
        assert_eq!(empirical(&[]), None);
    }

    #[test]
    fn the_distance_is_the_largest_between_the_functions() {
        let stats = carried("share_gpt_like");
        // All of it at one length: the function jumps from 0 to 1 there.
        let found = length(&stats, Axis::Output, &[338; 10]).distance.unwrap();
        let [before, after] = [337, 338].map(|tokens| stats.up_to(Axis::Output, tokens));
        assert!((found - before.max(1.0 - after)).abs() < 1e-12, "{found} {before} {after}");
    }
}
