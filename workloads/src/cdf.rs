//! Distribution functions of lengths: what is drawn from, in closed form, to be laid over a trace.

use crate::lengths::{JointTable, LengthDistribution, QuantileTable, Z95};
use crate::stats::LengthModel;

impl QuantileTable {
    /// The share of the distribution that is at most `value`.
    pub fn share_up_to(&self, value: f64) -> f64 {
        let points = self.points();
        let after = points.partition_point(|point| point[1] <= value);
        match (after.checked_sub(1).map(|before| points[before]), points.get(after)) {
            (None, _) => 0.0,
            (Some(_), None) => 1.0,
            (Some([p0, v0]), Some([p1, v1])) => p0 + (p1 - p0) * (value - v0) / (v1 - v0),
        }
    }
}

impl LengthDistribution {
    /// The share of draws that are at most `tokens`. Draws are rounded, and at least 1.
    pub fn share_up_to(&self, tokens: u32) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        // What is below it is rounded to `tokens` or less.
        let edge = f64::from(tokens) + 0.5;
        let lognormal = |median: f64, sigma: f64| normal(libm::log(edge / median) / sigma);
        match self {
            Self::Fixed { tokens: length } => f64::from(u8::from(*length <= tokens)),
            Self::Uniform { min, max } => {
                let lengths = f64::from(max - min + 1);
                ((f64::from(tokens) - f64::from(*min) + 1.0) / lengths).clamp(0.0, 1.0)
            }
            Self::Lognormal { median, sigma } => lognormal(*median, *sigma),
            Self::LognormalMean { mean, sigma } => lognormal(mean * libm::exp(-sigma * sigma / 2.0), *sigma),
            Self::LognormalPercentiles { p50, p95 } => lognormal(*p50, libm::log(p95 / p50) / Z95),
            Self::Empirical { quantiles } => quantiles.share_up_to(edge),
        }
    }
}

impl JointTable {
    /// The share of answers that are at most `value`: each range of prompts is as likely as the others.
    fn outputs_up_to(&self, value: f64) -> f64 {
        let tables = &self.output_given_input;
        tables.iter().map(|table| table.share_up_to(value)).sum::<f64>() / tables.len() as f64
    }
}

impl LengthModel {
    /// The share of prompts that are at most `tokens` long.
    pub fn inputs_up_to(&self, tokens: u32) -> f64 {
        match self {
            _ if tokens == 0 => 0.0,
            Self::Joint { table } => table.input.share_up_to(f64::from(tokens) + 0.5),
            Self::Independent { input, .. } => input.share_up_to(tokens),
        }
    }

    /// The share of answers that are at most `tokens` long.
    pub fn outputs_up_to(&self, tokens: u32) -> f64 {
        match self {
            _ if tokens == 0 => 0.0,
            Self::Joint { table } => table.outputs_up_to(f64::from(tokens) + 0.5),
            Self::Independent { output, .. } => output.share_up_to(tokens),
        }
    }
}

/// The standard normal's distribution function.
fn normal(z: f64) -> f64 {
    libm::erfc(-z / std::f64::consts::SQRT_2) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Stream, Use};
    use crate::stats::StatsName;

    /// Shares of 40,000 draws are within five standard deviations of the function's.
    fn agrees(share: f64, drawn: &[u32], tokens: u32) {
        let n = drawn.len() as f64;
        let found = drawn.iter().filter(|&&length| length <= tokens).count() as f64 / n;
        let allowed = 5.0 * (share * (1.0 - share) / n).sqrt() + 1e-9;
        assert!((found - share).abs() <= allowed, "{tokens}: {found} drawn, {share} computed");
    }

    #[test]
    fn functions_are_those_of_the_draws() {
        let mut stream = Stream::new(7, Use::Lengths, 0);
        for name in [StatsName::AzureConv2023, StatsName::AzureCode2023, StatsName::ShareGptLike] {
            let model = name.stats().lengths;
            let drawn: Vec<(u32, u32)> = (0..40_000).map(|_| model.draw(&mut stream)).collect();
            let (inputs, outputs): (Vec<u32>, Vec<u32>) = drawn.into_iter().unzip();
            for tokens in [1, 5, 13, 60, 129, 400, 1020, 1469, 4083] {
                agrees(model.inputs_up_to(tokens), &inputs, tokens);
                agrees(model.outputs_up_to(tokens), &outputs, tokens);
            }
        }
        for distribution in [
            LengthDistribution::Fixed { tokens: 5 },
            LengthDistribution::Uniform { min: 3, max: 6 },
            LengthDistribution::Lognormal { median: 5.0, sigma: 0.7 },
            LengthDistribution::LognormalPercentiles { p50: 5.0, p95: 20.0 },
        ] {
            let drawn: Vec<u32> = (0..40_000).map(|_| distribution.draw(&mut stream)).collect();
            for tokens in 0..9 {
                agrees(distribution.share_up_to(tokens), &drawn, tokens);
            }
        }
    }

    #[test]
    fn a_table_is_inverted() {
        let table: QuantileTable = vec![[0.0, 2.0], [0.5, 4.0], [0.75, 4.0], [1.0, 8.0]].try_into().unwrap();
        let shares = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0].map(|value| table.share_up_to(value));
        assert_eq!(shares, [0.0, 0.0, 0.25, 0.75, 0.875, 1.0, 1.0]);
    }
}
