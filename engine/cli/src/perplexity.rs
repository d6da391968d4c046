//! `quire perplexity`: how well a model predicts a text.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use quire_engine::KvCapacity;

use crate::interrupt;
use crate::model_args::ModelArgs;

#[derive(Args)]
#[command(after_help = "Example:
  quire perplexity --model models/SmolLM2-135M-Instruct.Q4_1.gguf engine/tests/golden/text.txt

The text is cut into windows of --window tokens. In each, every token but the first is predicted from those before it
in the window; the perplexity is e to the mean negative log-probability of all of them.")]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text, UTF-8.
    file: PathBuf,
    /// Tokens of a window.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=8192))]
    window: u32,
}

pub(crate) fn run(args: &PerplexityArgs) -> anyhow::Result<()> {
    let window = args.window as usize;
    let text = std::fs::read_to_string(&args.file).with_context(|| args.file.display().to_string())?;
    let source = args.model.source()?;
    let tokens = source.tokenizer()?.encode_plain(&text)?;
    if tokens.len() < 2 {
        bail!("{}: {} tokens are too few to predict one", args.file.display(), tokens.len());
    }
    let mut executor = args.model.load(&source, KvCapacity::Slots(window), window, 1)?;
    let vocab = executor.info().config.vocab;
    interrupt::listen()?;
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} tokens, {eta} left, perplexity {msg}")
        .context("the progress bar's template")?;
    let bar = ProgressBar::new(tokens.len() as u64).with_style(style);
    let (mut sum, mut count) = (0.0f64, 0u64);
    for window in tokens.chunks(window) {
        if interrupt::requested() {
            return Ok(());
        }
        let logits = executor.score(window)?;
        for (row, &next) in logits.chunks_exact(vocab).zip(&window[1..]) {
            sum -= log_probability(row, next);
            count += 1;
        }
        bar.inc(window.len() as u64);
        bar.set_message(format!("{:.3}", (sum / count.max(1) as f64).exp()));
    }
    bar.finish_and_clear();
    writeln!(std::io::stdout(), "perplexity {:.4} over {count} tokens", (sum / count as f64).exp())?;
    Ok(())
}

/// Logarithm of the probability that the softmax of `row` gives `token`.
fn log_probability(row: &[f32], token: u32) -> f64 {
    let greatest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = row.iter().map(|&logit| f64::from(logit - greatest).exp()).sum();
    f64::from(row[token as usize] - greatest) - total.ln()
}

#[cfg(test)]
mod tests {
    use super::log_probability;

    #[test]
    fn probabilities_are_the_softmaxs() {
        let row = [0.0, (3.0f32).ln()];
        assert!((log_probability(&row, 1) - 0.75f64.ln()).abs() < 1e-7);
        assert!((log_probability(&[1000.0, 1000.0], 0) - 0.5f64.ln()).abs() < 1e-7);
    }
}
