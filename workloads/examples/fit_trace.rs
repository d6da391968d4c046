//! Computes the statistics that the crate carries from a trace, and prints them as JSON:
//! `cargo run --release -p quire-workloads --example fit_trace -- trace.csv "what it is" > data/name.json`

use std::error::Error;
use std::path::PathBuf;

use quire_workloads::lengths::{JointTable, QuantileTable};
use quire_workloads::stats::{ArrivalStats, LengthModel, LengthSummary, TraceStats};
use quire_workloads::trace::{ReadOptions, Trace};

/// Ranges of prompt length for which answers are tabulated.
const BINS: usize = 8;
/// Steps of the tables; the tail has some more.
const INPUT_STEPS: usize = 64;
const OUTPUT_STEPS: usize = 24;
/// Gaps of this many seconds and more count as idle.
const IDLE_S: f64 = 5.0;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let usage = "usage: fit_trace TRACE SOURCE";
    let path = PathBuf::from(args.next().ok_or(usage)?);
    let source = args.next().ok_or(usage)?.into_string().map_err(|_| "SOURCE is not UTF-8")?;
    let trace = Trace::load(&path, &ReadOptions::default())?;
    if trace.requests.len() < 100 * BINS {
        return Err(format!("{} requests are too few to fit", trace.requests.len()).into());
    }
    print(&fit(&trace, source)?)?;
    Ok(())
}

fn fit(trace: &Trace, source: String) -> Result<TraceStats, Box<dyn Error>> {
    let mut pairs: Vec<(u32, u32)> = trace.requests.iter().map(|r| (r.input_len, r.output_len)).collect();
    let rank_correlation = rank_correlation(&pairs);
    // Stable: requests with equal prompts keep the order of the trace.
    pairs.sort_by_key(|pair| pair.0);
    let inputs: Vec<u32> = pairs.iter().map(|pair| pair.0).collect();
    let mut outputs: Vec<u32> = pairs.iter().map(|pair| pair.1).collect();
    let mut output_given_input = Vec::new();
    for bin in 0..BINS {
        let range = bin * outputs.len() / BINS..(bin + 1) * outputs.len() / BINS;
        let mut answers = outputs[range].to_vec();
        answers.sort_unstable();
        output_given_input.push(table(&answers, OUTPUT_STEPS)?);
    }
    outputs.sort_unstable();
    Ok(TraceStats {
        source,
        requests: trace.requests.len() as u64,
        arrivals: Some(arrivals(trace)),
        input: summary(&inputs),
        output: summary(&outputs),
        rank_correlation: rounded(rank_correlation, 3),
        lengths: LengthModel::Joint {
            table: JointTable { input: table(&inputs, INPUT_STEPS)?, output_given_input },
        },
    })
}

fn arrivals(trace: &Trace) -> ArrivalStats {
    let gaps: Vec<f64> =
        trace.requests.windows(2).map(|pair| pair[1].arrival_s - pair[0].arrival_s).collect();
    let busy: Vec<f64> = gaps.iter().copied().filter(|&gap| gap < IDLE_S).collect();
    let (rate, cv) = rate_and_cv(&gaps);
    let (busy_rate, busy_cv) = rate_and_cv(&busy);
    ArrivalStats { rate, cv, busy_rate, busy_cv, idle_s: IDLE_S }
}

fn rate_and_cv(gaps: &[f64]) -> (f64, f64) {
    let n = gaps.len() as f64;
    let mean = gaps.iter().sum::<f64>() / n;
    let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / n;
    (rounded(1.0 / mean, 4), rounded(variance.sqrt() / mean, 4))
}

fn summary(sorted: &[u32]) -> LengthSummary {
    let mean = sorted.iter().map(|&v| f64::from(v)).sum::<f64>() / sorted.len() as f64;
    LengthSummary { mean: rounded(mean, 2), p50: quantile(sorted, 0.5), p95: quantile(sorted, 0.95) }
}

fn quantile(sorted: &[u32], probability: f64) -> f64 {
    f64::from(sorted[(probability * (sorted.len() - 1) as f64).round() as usize])
}

/// Quantiles at even steps and at some more of the tail, where lengths are far apart.
fn table(sorted: &[u32], steps: usize) -> Result<QuantileTable, Box<dyn Error>> {
    let mut probabilities: Vec<f64> = (0..=steps).map(|i| rounded(i as f64 / steps as f64, 6)).collect();
    probabilities.extend([0.95, 0.99, 0.995, 0.999].iter().filter(|_| sorted.len() >= 1000));
    probabilities.sort_by(f64::total_cmp);
    probabilities.dedup();
    Ok(probabilities.into_iter().map(|p| [p, quantile(sorted, p)]).collect::<Vec<_>>().try_into()?)
}

/// Pearson's correlation of the ranks, ties sharing their mean rank.
fn rank_correlation(pairs: &[(u32, u32)]) -> f64 {
    let inputs = ranks(pairs.iter().map(|pair| pair.0).collect());
    let outputs = ranks(pairs.iter().map(|pair| pair.1).collect());
    let mean = (pairs.len() - 1) as f64 / 2.0;
    let product =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(x, y)| (x - mean) * (y - mean)).sum() };
    product(&inputs, &outputs) / (product(&inputs, &inputs) * product(&outputs, &outputs)).sqrt()
}

fn ranks(values: Vec<u32>) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|&i| values[i]);
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    for group in order.chunk_by(|&a, &b| values[a] == values[b]) {
        for &i in group {
            ranks[i] = start as f64 + (group.len() - 1) as f64 / 2.0;
        }
        start += group.len();
    }
    ranks
}

fn rounded(value: f64, digits: i32) -> f64 {
    (value * 10_f64.powi(digits)).round() / 10_f64.powi(digits)
}

/// JSON with a table a line: compact, and its changes can be read.
fn print(stats: &TraceStats) -> Result<(), Box<dyn Error>> {
    let text = serde_json::to_string(stats)?;
    let text = text.replace(r#","input":"#, ",\n\"input\":").replace(r#","output":"#, ",\n\"output\":");
    let text = text.replace(r#","lengths":"#, ",\n\"lengths\":").replace("]],[[", "]],\n[[");
    println!("{}", text.replace(r#","output_given_input":"#, ",\n\"output_given_input\":\n"));
    Ok(())
}
