//! Scales and ticks.

/// How values are laid along an axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Evenly, from zero.
    Linear,
    /// By logarithm.
    Log,
    /// By logarithm, with ticks at powers of two: for settings that are such.
    Log2,
}

/// An axis: a range of values with its ticks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// An axis that covers `values` (those it can show) with about `wanted` ticks.
    pub(crate) fn covering(scale: Scale, values: impl Iterator<Item = f64>, wanted: usize) -> Self {
        let shown = values.filter(|v| v.is_finite() && (scale == Scale::Linear || *v > 0.0));
        let (low, high) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        match scale {
            Scale::Linear => Self::linear(if high.is_finite() { high.max(0.0) } else { 1.0 }, wanted),
            Scale::Log if high.is_finite() => Self::log(low, high, wanted),
            Scale::Log => Self::log(0.1, 1.0, wanted),
            Scale::Log2 if high.is_finite() => Self::log2(low, high, wanted),
            Scale::Log2 => Self::log2(1.0, 2.0, wanted),
        }
    }

    fn linear(high: f64, wanted: usize) -> Self {
        // Near the least number there is, steps would round to nothing.
        let high = if high > 1e-300 { high * 1.06 } else { 1.0 };
        let rough = high / wanted.max(1) as f64;
        let magnitude = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .into_iter()
            .map(|m| m * magnitude)
            .find(|step| *step >= rough * 0.999)
            .unwrap_or(10.0 * magnitude);
        let count = (high / step).floor() as usize;
        let ticks = (0..=count).map(|i| i as f64 * step).collect();
        Self { scale: Scale::Linear, low: 0.0, high, ticks }
    }

    fn log(low: f64, high: f64, wanted: usize) -> Self {
        // A little air at both ends, and at least half a decade so that noise does not fill the axis.
        let (mut low, mut high) = (low / 1.15, high * 1.15);
        if high / low < 3.2 {
            let middle = (low * high).sqrt();
            (low, high) = (middle / 1.8, middle * 1.8);
        }
        let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
        let at = |mantissas: &[f64]| -> Vec<f64> {
            decades
                .clone()
                .flat_map(|d| mantissas.iter().map(move |m| m * 10f64.powi(d)))
                .filter(|v| low <= *v && *v <= high)
                .collect()
        };
        let choices: [&[f64]; 3] = [&[1.0], &[1.0, 3.0], &[1.0, 2.0, 5.0]];
        let few = (wanted / 2).max(2);
        let ticks = choices
            .iter()
            .map(|m| at(m))
            .find(|t| t.len() >= few)
            .unwrap_or_else(|| at(&[1.0, 2.0, 3.0, 5.0, 7.0]));
        Self { scale: Scale::Log, low, high, ticks }
    }

    fn log2(low: f64, high: f64, wanted: usize) -> Self {
        let within = |low: f64, high: f64| low.log2().ceil() as i32..=high.log2().floor() as i32;
        // Two ticks at least: one alone says nothing of the scale.
        let (low, high) = if within(low, high).count() < 2 { (low / 2.0, high * 2.0) } else { (low, high) };
        let powers = within(low, high);
        let apart = powers.clone().count().div_ceil(wanted.max(1)).max(1);
        let ticks = powers.step_by(apart).map(|power| 2f64.powi(power)).collect();
        // A little air at both ends, also around a single value.
        Self { scale: Scale::Log2, low: low / 1.2, high: high * 1.2, ticks }
    }

    /// Where `value` lies: 0 at the low end, 1 at the high end. None when this axis cannot show it.
    pub(crate) fn position(&self, value: f64) -> Option<f64> {
        let at = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log | Scale::Log2 if value > 0.0 => (value / self.low).ln() / (self.high / self.low).ln(),
            Scale::Log | Scale::Log2 => return None,
        };
        at.is_finite().then_some(at)
    }

    /// As [`Axis::position`], with values outside the axis moved to its ends.
    pub(crate) fn clamped(&self, value: f64) -> f64 {
        self.position(value).map_or(0.0, |p| p.clamp(0.0, 1.0))
    }

    /// Ticks: position and label.
    pub(crate) fn ticks(&self) -> impl Iterator<Item = (f64, String)> + '_ {
        self.ticks.iter().map(|&t| (self.clamped(t), tick_label(t)))
    }
}

/// A number as short as it can be with four significant digits.
fn tick_label(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{value:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks().map(|t| t.1).collect()
    }

    #[test]
    fn linear_ticks_are_round_and_start_at_zero() {
        assert_eq!(
            labels(&Axis::covering(Scale::Linear, [3.0, 9.5].into_iter(), 5)),
            ["0", "2.5", "5", "7.5", "10"]
        );
        assert_eq!(labels(&Axis::covering(Scale::Linear, [0.03].into_iter(), 3)), ["0", "0.02"]);
        let none = labels(&Axis::covering(Scale::Linear, [5e-324].into_iter(), 5));
        assert_eq!(none, labels(&Axis::covering(Scale::Linear, [0.0].into_iter(), 5)));
    }

    #[test]
    fn log_ticks_cover_decades_or_parts_of_one() {
        assert_eq!(labels(&Axis::covering(Scale::Log, [0.05, 30.0].into_iter(), 4)), ["0.1", "1", "10"]);
        assert_eq!(labels(&Axis::covering(Scale::Log, [0.11, 0.4].into_iter(), 4)), ["0.1", "0.3"]);
    }

    #[test]
    fn powers_of_two_are_thinned_where_they_are_many() {
        let all = || [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0].into_iter();
        assert_eq!(labels(&Axis::covering(Scale::Log2, all(), 9)).len(), 9);
        assert_eq!(labels(&Axis::covering(Scale::Log2, all(), 5)), ["1", "4", "16", "64", "256"]);
        let few = Axis::covering(Scale::Log2, [16.0].into_iter(), 5);
        assert!(few.position(16.0).is_some_and(|middle| (middle - 0.5).abs() < 1e-9));
        assert_eq!(labels(&few), ["8", "16", "32"], "one tick alone says nothing of a scale");
        assert_eq!(few.position(0.0), None);
    }

    #[test]
    fn what_cannot_be_shown_does_not_break_an_axis() {
        let axis = Axis::covering(Scale::Log, [0.0, -1.0, f64::INFINITY].into_iter(), 4);
        assert_eq!(axis.position(0.0), None);
        let flat = Axis::covering(Scale::Linear, [0.0, 0.0].into_iter(), 4);
        assert_eq!(flat.position(0.5), Some(0.5));
        assert_eq!(
            Axis::covering(Scale::Linear, std::iter::empty(), 4).position(1.0).map(|p| p > 0.9),
            Some(true)
        );
    }
}
