//! Speculative decoding, as a command's options.

use anyhow::Context;
use clap::Args;
use quire_engine::load::ModelSource;
use quire_engine::speculation::{DraftModel, Drafter};
use quire_engine::{
    BatchStats, DraftLength, DrafterConfig, Executor, KvCapacity, KvLayout, ModelExecutor, SpeculationConfig,
};

use crate::model_args::ModelArgs;

/// Proposed tokens at a time, where their number adapts.
const MOST: u32 = 8;

#[derive(Args)]
pub(crate) struct DraftArgs {
    /// Propose tokens and verify several in a pass; the text stays what it is (on a GPU with --batch-invariant): n-gram (what
    /// followed the last tokens before), suffix, early-exit:LAYERS (the model's own first layers), or model:PATH (a smaller
    /// model of the same vocabulary).
    #[arg(long, value_name = "DRAFTER", conflicts_with_all = ["outputs", "best_of", "beam_width"])]
    drafter: Option<DrafterArg>,
    /// Propose always this many tokens [default: up to 8, by what is accepted].
    #[arg(long, requires = "drafter", value_parser = clap::value_parser!(u32).range(1..=64))]
    draft_tokens: Option<u32>,
}

/// What proposes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum DrafterArg {
    NGram,
    Suffix,
    EarlyExit(u32),
    Model(String),
}

impl std::str::FromStr for DrafterArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').map_or((text, None), |(kind, value)| (kind, Some(value))) {
            ("n-gram", None) => Ok(Self::NGram),
            ("suffix", None) => Ok(Self::Suffix),
            ("early-exit", Some(layers)) => match layers.parse() {
                Ok(layers) => Ok(Self::EarlyExit(layers)),
                Err(_) => Err(format!("'{layers}' is no number of layers")),
            },
            ("model", Some(path)) if !path.is_empty() => Ok(Self::Model(path.into())),
            _ => Err(format!("'{text}' is none of n-gram, suffix, early-exit:LAYERS, model:PATH")),
        }
    }
}

/// What an engine is given of it.
#[derive(Default)]
pub(crate) struct Speculation {
    pub(crate) config: Option<SpeculationConfig>,
    /// The drafter, where it is a model.
    pub(crate) drafter: Option<Box<dyn Drafter>>,
}

impl DraftArgs {
    /// Tokens proposed at a time, at most: each takes a row of logits.
    pub(crate) fn most(&self) -> u32 {
        self.drafter.as_ref().map_or(0, |_| self.draft_tokens.unwrap_or(MOST))
    }

    /// The configuration, and the drafter where it is a model, for one sequence of a model loaded as `model` says.
    pub(crate) fn speculation(
        &self,
        model: &ModelArgs,
        executor: &dyn ModelExecutor,
        rows: usize,
    ) -> anyhow::Result<Speculation> {
        let Some(drafter) = &self.drafter else { return Ok(Speculation::default()) };
        let (config, given) = match drafter {
            DrafterArg::NGram => (DrafterConfig::NGram { longest: 4, shortest: 2 }, None),
            DrafterArg::Suffix => (DrafterConfig::Suffix { depth: 16 }, None),
            DrafterArg::EarlyExit(layers) => (DrafterConfig::EarlyExit { layers: *layers }, None),
            DrafterArg::Model(path) => {
                let slots = KvCapacity::Slots(executor.kv_slots());
                let mut draft = ModelSource::parse(path)
                    .map_err(anyhow::Error::from)
                    .and_then(|source| model.load_draft(&source, path, slots, rows))
                    .context("the draft model cannot be loaded")?;
                ModelArgs::prepare(&mut *draft, KvLayout::default())?;
                let draft: Box<dyn Executor> = Box::new(draft);
                (DrafterConfig::Model {}, Some(Box::new(DraftModel::new(draft)) as Box<dyn Drafter>))
            }
        };
        let length = self
            .draft_tokens
            .map_or(DraftLength::Adaptive { most: MOST }, |tokens| DraftLength::Fixed { tokens });
        Ok(Speculation { config: Some(SpeculationConfig { drafter: config, length }), drafter: given })
    }
}

/// What came of proposals.
#[derive(Debug, Default)]
pub(crate) struct Drafts {
    passes: u32,
    proposed: u32,
    accepted: u32,
}

impl Drafts {
    /// Counts a step.
    pub(crate) fn count(&mut self, batch: &BatchStats) {
        self.passes += u32::from(batch.decode_tokens > 0);
        self.proposed += batch.drafted_tokens;
        self.accepted += batch.accepted_tokens;
    }

    /// A line for people, where something was proposed; `later` is the tokens after the first.
    pub(crate) fn line(&self, later: u32) -> Option<String> {
        (self.proposed > 0).then(|| {
            format!(
                "drafts   {} of {} proposed tokens accepted ({:.0} %): {:.2} tokens a pass",
                self.accepted,
                self.proposed,
                100.0 * f64::from(self.accepted) / f64::from(self.proposed),
                f64::from(later) / f64::from(self.passes.max(1)),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafters_have_names() {
        let parse = |text: &str| text.parse::<DrafterArg>();
        assert_eq!(parse("n-gram"), Ok(DrafterArg::NGram));
        assert_eq!(parse("early-exit:3"), Ok(DrafterArg::EarlyExit(3)));
        assert_eq!(parse("model:a:b"), Ok(DrafterArg::Model("a:b".into())));
        for wrong in ["", "ngram", "early-exit", "early-exit:x", "model:", "suffix:4"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_line_says_what_was_accepted() {
        let mut drafts = Drafts::default();
        assert_eq!(drafts.line(9), None);
        drafts.count(&BatchStats {
            decode_tokens: 1,
            drafted_tokens: 4,
            accepted_tokens: 3,
            ..BatchStats::default()
        });
        drafts.count(&BatchStats { prefill_tokens: 7, ..BatchStats::default() });
        let line = drafts.line(4).unwrap();
        assert!(line.contains("3 of 4") && line.contains("75 %") && line.contains("4.00 tokens"), "{line}");
    }
}
