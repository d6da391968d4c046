//! What a micro-benchmark measures: every line at every value of every panel.

use serde::{Deserialize, Serialize};

use super::MeasureConfig;

/// A line or a panel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Name for claims.
    pub name: String,
    /// Name in the figure.
    pub label: String,
    /// The number that it stands for: of a panel its batch size or length, of a line its block size; 0 where there is none.
    pub value: u32,
}

/// All that is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Panels.
    pub panels: Vec<Named>,
    /// Lines.
    pub lines: Vec<Named>,
    /// Horizontal values.
    pub xs: Vec<u32>,
    /// What these are.
    pub x_label: String,
    /// What was measured, in words.
    pub what: String,
}

fn named(name: impl Into<String>, label: impl Into<String>, value: u32) -> Named {
    Named { name: name.into(), label: label.into(), value }
}

impl Plan {
    pub(super) fn new(measure: &MeasureConfig) -> Self {
        match measure {
            MeasureConfig::Attention { heads, kv_dtype, batches, contexts, block_sizes } => {
                let paged =
                    |&size: &u32| named(format!("paged-{size}"), format!("Paged, blocks of {size}"), size);
                let contiguous = named("contiguous", "Contiguous", 0);
                Self {
                    panels: batches
                        .iter()
                        .map(|&batch| named(format!("batch-{batch}"), format!("Batch of {batch}"), batch))
                        .collect(),
                    lines: [contiguous].into_iter().chain(block_sizes.iter().map(paged)).collect(),
                    xs: contexts.clone(),
                    x_label: "Context (tokens)".into(),
                    what: format!(
                        "Attention of one layer in a decode step: {} query and {} KV heads of {}, KV in {}, from memory, \
                         blocks at random places",
                        heads.heads,
                        heads.kv_heads,
                        heads.head_dim,
                        kv_dtype.name()
                    ),
                }
            }
            MeasureConfig::Preemption { model, kv_dtype, tokens, block_sizes, .. } => Self {
                panels: tokens
                    .iter()
                    .map(|&n| named(format!("tokens-{n}"), format!("Sequence of {n} tokens"), n))
                    .collect(),
                lines: vec![
                    named("recompute", "Recomputation", 0),
                    named("swap", "Swapping out and in", 0),
                    named("swap_out", "Swapping out", 0),
                    named("swap_in", "Swapping in", 0),
                ],
                xs: block_sizes.clone(),
                x_label: "Block size (tokens)".into(),
                what: format!(
                    "K and V of one sequence, all layers of {}, in {}, blocks at random places",
                    describe_model(model),
                    kv_dtype.name()
                ),
            },
        }
    }

    /// The place of a line.
    pub(crate) fn line(&self, name: &str) -> Option<usize> {
        self.lines.iter().position(|line| line.name == name)
    }
}

fn describe_model(model: &str) -> String {
    match model.strip_prefix("dummy:") {
        Some(shape) => format!("random weights of {shape}'s shape (dummy)"),
        None => model.rsplit(['/', '\\']).next().unwrap_or(model).to_string(),
    }
}
