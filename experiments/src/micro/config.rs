//! The configuration of a micro-benchmark.

use std::path::Path;

use quire_engine::model::WeightDtype;
use quire_kernels::HeadShape;
use serde::{Deserialize, Serialize};

use super::Plan;
use crate::config::{ConfigError, Device, KvPrecision, Source, Step, check_bounds};
use crate::manifest::without_folders;
use crate::names;

/// The configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroConfig {
    /// Name of the figure: its folder under `results/` and its file name.
    pub name: String,
    figure: MicroFigure,
    /// Threads on a CPU; all cores when left out.
    pub threads: Option<u16>,
    /// What is measured.
    pub measure: MeasureConfig,
    /// How often.
    pub run: MicroRun,
    /// What `--quick` changes.
    #[serde(default)]
    pub quick: MicroProfile,
    /// What `--full` changes.
    #[serde(default)]
    pub full: MicroProfile,
    /// What `--device cuda` changes.
    pub cuda: Option<MicroCuda>,
    /// What papers found.
    #[serde(default)]
    pub claim: Vec<MicroClaim>,
}

/// The `[figure]` table; its kind says which configurations are of this shape.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum MicroFigure {
    Micro {
        /// The line that the others are divided by in the row of ratios.
        over: String,
    },
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum MeasureConfig {
    /// The attention of a decode step over contexts of equal length, contiguous (`contiguous`) and in blocks at random places
    /// (`paged-SIZE`), against the length: a panel a batch size.
    Attention {
        /// Heads of the layer.
        heads: Heads,
        /// How K and V are held.
        kv_dtype: KvPrecision,
        /// Sequences in a step.
        batches: Vec<u32>,
        /// Tokens of each context, ascending.
        contexts: Vec<u32>,
        /// Slots in a block.
        block_sizes: Vec<u32>,
    },
    /// What brings the K and V of a preempted sequence back, against the block size: computing them again (`recompute`), or
    /// copying them to host memory and back (`swap`, and its halves `swap_out` and `swap_in`). A panel a length.
    Preemption {
        /// The model: `dummy:SHAPE`, a Hugging Face folder or a GGUF file.
        model: String,
        /// How weights are held.
        weights: WeightDtype,
        /// How K and V are held.
        kv_dtype: KvPrecision,
        /// Tokens of the sequence.
        tokens: Vec<u32>,
        /// Slots in a block, ascending.
        block_sizes: Vec<u32>,
    },
}

/// Heads of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Query heads.
    pub heads: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements in a head.
    pub head_dim: u32,
}

impl From<Heads> for HeadShape {
    fn from(of: Heads) -> Self {
        Self { heads: of.heads as usize, kv_heads: of.kv_heads as usize, head_dim: of.head_dim as usize }
    }
}

/// How often things are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroRun {
    /// Repeats, each with a seed of its own: where blocks lie, and what memory holds. For attention, memory is taken anew.
    pub repeats: u32,
    /// Times that each line is measured at each point of a repeat, in turns with the other lines.
    pub rounds: u32,
    /// Seed of the first repeat; the others count up.
    pub seed: u64,
}

/// What a profile changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroProfile {
    /// Instead of `run.repeats`.
    pub repeats: Option<u32>,
    /// Instead of `run.rounds`.
    pub rounds: Option<u32>,
}

/// What runs differently on a GPU.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroCuda {
    /// Instead of `measure`.
    pub measure: MeasureConfig,
    /// Changes of `[run]`.
    #[serde(default)]
    pub run: MicroProfile,
}

/// A finding of a paper about a line, or about the ratio of two.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MicroClaim {
    /// What the paper found, in a sentence.
    pub says: String,
    /// Which paper, and where in it.
    pub source: String,
    /// In which panel; may be left out where there is one.
    pub panel: Option<String>,
    /// About which line.
    pub line: String,
    /// Divided by this one.
    pub over: Option<String>,
    /// Where.
    pub x: u32,
    /// The claim holds from here on; seconds where nothing is divided.
    pub at_least: Option<f64>,
    /// The claim holds up to here.
    pub at_most: Option<f64>,
    /// The device without which the claim cannot be judged.
    pub needs: Option<Device>,
}

impl MicroProfile {
    pub(super) fn apply(self, run: &mut MicroRun) {
        run.repeats = self.repeats.unwrap_or(run.repeats);
        run.rounds = self.rounds.unwrap_or(run.rounds);
    }
}

impl MicroConfig {
    /// Reads and checks a configuration, what is for another device included.
    ///
    /// # Errors
    /// With the line that is wrong.
    pub fn parse(source: &Source) -> Result<Self, ConfigError> {
        use Step::{Index, Key};
        let config: Self = source.parse()?;
        names::check("`name`", &config.name).map_err(|message| source.error(&[Key("name")], message))?;
        let MicroRun { repeats, rounds, .. } = config.run;
        let profiles =
            [config.quick, config.full, config.cuda.as_ref().map_or_else(Default::default, |c| c.run)];
        let counts = profiles.iter().flat_map(|profile| [profile.repeats, profile.rounds]).flatten();
        if counts.chain([repeats, rounds]).any(|count| count == 0) {
            return Err(source.error(&[Key("run")], "`repeats` and `rounds` must be 1 or more everywhere"));
        }
        if config.threads == Some(0) {
            return Err(source.error(&[Key("threads")], "`threads` must be 1 or more"));
        }
        let mut plans = Vec::new();
        let on_gpu = config
            .cuda
            .as_ref()
            .map(|cuda| (&cuda.measure, Device::Cuda, &[Key("cuda"), Key("measure")][..]));
        for (measure, device, path) in
            [Some((&config.measure, Device::Cpu, &[Key("measure")][..])), on_gpu].into_iter().flatten()
        {
            measure.check(device).map_err(|message| source.error(path, message))?;
            let plan = Plan::new(measure);
            if plan.line(config.over()).is_none() {
                let message = format!("`over`: there is no line `{}`", config.over());
                return Err(source.error(&[Key("figure"), Key("over")], message));
            }
            plans.push(plan);
        }
        for (i, claim) in config.claim.iter().enumerate() {
            // It may be about any device's lines and values.
            let errors: Vec<_> = plans.iter().filter_map(|plan| claim.check(plan).err()).collect();
            if let (Some((key, message)), true) = (errors.first(), errors.len() == plans.len()) {
                return Err(source.error(&[Key("claim"), Index(i), Key(key)], message.as_str()));
            }
            if let Err(message) = check_bounds(claim.at_least, claim.at_most) {
                return Err(source.error(&[Key("claim"), Index(i), Key("at_least")], message));
            }
        }
        Ok(config)
    }

    /// The line that the others are divided by.
    pub(super) fn over(&self) -> &str {
        let MicroFigure::Micro { over } = &self.figure;
        over
    }
}

impl MicroClaim {
    /// Checks that what it is about is in `plan`; the key that is wrong, and why.
    pub(super) fn check(&self, plan: &Plan) -> Result<(), (&'static str, String)> {
        for (key, name) in [("line", Some(&self.line)), ("over", self.over.as_ref())] {
            if let Some(name) = name.filter(|name| plan.line(name).is_none()) {
                return Err((key, format!("no line `{name}`")));
            }
        }
        match &self.panel {
            None if plan.panels.len() > 1 => {
                Err(("panel", "there are several panels: `panel` must say which the claim is about".into()))
            }
            Some(name) if !plan.panels.iter().any(|panel| panel.name == *name) => {
                Err(("panel", format!("no panel `{name}`")))
            }
            _ if !plan.xs.contains(&self.x) => Err(("x", format!("nothing is measured at {}", self.x))),
            _ => Ok(()),
        }
    }
}

/// Most tokens of a sequence, and most sequences times tokens: the slots of a layer are numbered in 32 bits, and memory is
/// bounded.
const MOST_TOKENS: u64 = 1 << 22;

/// Slots of the largest block; contiguous contexts begin at multiples of it too.
const LARGEST_BLOCK: u64 = 256;

/// Slots that hold so many tokens.
fn in_blocks(tokens: u64) -> u64 {
    tokens.next_multiple_of(LARGEST_BLOCK)
}

impl MeasureConfig {
    fn check(&self, device: Device) -> Result<(), String> {
        let ascending = |values: &[u32]| {
            !values.is_empty() && values[0] > 0 && values.windows(2).all(|pair| pair[0] < pair[1])
        };
        let list = |name: &str, values: &[u32]| match ascending(values) {
            true => Ok(()),
            false => Err(format!("`{name}` must be one or more numbers above 0, ascending")),
        };
        let (precision, block_sizes, slots) = match self {
            Self::Attention { heads, kv_dtype, batches, contexts, block_sizes } => {
                let Heads { heads, kv_heads, head_dim } = *heads;
                list("batches", batches)?;
                list("contexts", contexts)?;
                if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads == 0 || heads > 1024 {
                    return Err("`heads` must be 1 to 1024 query heads, a multiple of `kv_heads`".into());
                }
                if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > 256 {
                    return Err("`head_dim` must be a multiple of 8 up to 256".into());
                }
                (kv_dtype, block_sizes, last(batches).saturating_mul(in_blocks(last(contexts))))
            }
            Self::Preemption { kv_dtype, tokens, block_sizes, .. } => {
                list("tokens", tokens)?;
                (kv_dtype, block_sizes, in_blocks(last(tokens)))
            }
        };
        list("block_sizes", block_sizes)?;
        let least = if device == Device::Cuda { 8 } else { 1 };
        if block_sizes[0] < least || last(block_sizes) > LARGEST_BLOCK {
            return Err(format!("`block_sizes` must be {least} to {LARGEST_BLOCK} on this device"));
        }
        if device == Device::Cpu && matches!(precision, KvPrecision::F16 | KvPrecision::Fp8) {
            return Err(format!("`kv_dtype` {} is for GPUs: choose f32 or bf16", precision.name()));
        }
        if slots > MOST_TOKENS {
            return Err(format!(
                "{slots} tokens of K and V at once, in blocks of {LARGEST_BLOCK}: choose {MOST_TOKENS} at most"
            ));
        }
        Ok(())
    }
}

impl MeasureConfig {
    /// Without the folders of this machine: of an absolute path, only the last part.
    pub(super) fn without_folders(mut self) -> Self {
        if let Self::Preemption { model, .. } = &mut self
            && Path::new(model).is_absolute()
        {
            *model = without_folders(model);
        }
        self
    }
}

fn last(values: &[u32]) -> u64 {
    values.last().copied().map_or(0, u64::from)
}
