//! Figures over a parameter: systems that differ in one setting, each a point of a line.

use quire_engine::KvLayout;
use serde::{Deserialize, Serialize};

use super::{EngineChanges, SystemEntry};
use crate::systems::SystemConfig;

/// Says that no system has this name, and which have one.
pub(crate) fn no_system<'a>(name: &str, systems: impl IntoIterator<Item = &'a SystemEntry>) -> String {
    let quoted = |names: Vec<String>| names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
    let systems: Vec<&SystemEntry> = systems.into_iter().collect();
    match systems.iter().find(|system| system.name == name && system.sweep.is_some()) {
        Some(sweep) => format!("`{name}` stands for several systems: name one of {}", quoted(sweep.names())),
        None => {
            let all = systems.iter().flat_map(|system| system.names());
            format!("no system `{name}`; there are {}", quoted(all.collect()))
        }
    }
}

/// Where a system lies in a figure over a parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepPoint {
    /// Name of its line in the legend.
    pub line: String,
    /// Its horizontal value.
    pub x: f64,
}

/// A setting of the engine and the values that it takes: one system each, called `NAME-VALUE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SweepConfig {
    /// Slots in a block of paged KV memory.
    BlockSize(Vec<u32>),
    /// Tokens that a step computes at most.
    TokenBudget(Vec<u32>),
    /// Sequences that run at most.
    MaxRunning(Vec<u32>),
}

impl SweepConfig {
    fn values(&self) -> &[u32] {
        let (Self::BlockSize(values) | Self::TokenBudget(values) | Self::MaxRunning(values)) = self;
        values
    }

    fn change(&self, value: u32) -> EngineChanges {
        match self {
            Self::BlockSize(_) => EngineChanges { block_size: Some(value), ..EngineChanges::default() },
            Self::TokenBudget(_) => EngineChanges { token_budget: Some(value), ..EngineChanges::default() },
            Self::MaxRunning(_) => EngineChanges { max_running: Some(value), ..EngineChanges::default() },
        }
    }

    /// What a value is, for legends.
    fn describe(&self, value: u32) -> String {
        match self {
            Self::BlockSize(_) => format!("blocks of {value}"),
            Self::TokenBudget(_) => format!("{value} tokens a step"),
            Self::MaxRunning(_) => format!("{value} running"),
        }
    }
}

impl SystemEntry {
    /// The names of the systems that it stands for.
    pub(crate) fn names(&self) -> Vec<String> {
        match &self.sweep {
            None => vec![self.name.clone()],
            Some(sweep) => sweep.values().iter().map(|value| format!("{}-{value}", self.name)).collect(),
        }
    }

    /// Whether `name` means it: its own, or that of a sweep that it is, or is a point of.
    pub(crate) fn is_meant_by(&self, name: &str) -> bool {
        self.name == name || self.is_point_of(name) || self.names().iter().any(|own| own == name)
    }

    /// Whether it is one of the systems that a sweep of the system `name` stands for.
    pub(crate) fn is_point_of(&self, name: &str) -> bool {
        let Some(point) = &self.point else { return false };
        let value = self.name.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        value.and_then(|value| value.parse().ok()) == Some(point.x)
    }

    /// The systems that it stands for: itself, or one for each value of its sweep.
    ///
    /// # Errors
    /// When its sweep has no values or one twice, or changes what the system does not have.
    pub(crate) fn expand(&self) -> Result<Vec<Self>, String> {
        let Some(sweep) = &self.sweep else { return Ok(vec![self.clone()]) };
        let SystemConfig::Engine(engine) = &self.serve else {
            return Err("`sweep` changes settings of the engine: it needs serve.kind = \"engine\"".into());
        };
        if self.point.is_some() {
            return Err("`sweep` gives each of its systems a `point`: leave that out".into());
        }
        if matches!(sweep, SweepConfig::BlockSize(_)) && !matches!(engine.kv, KvLayout::Paged { .. }) {
            return Err("`sweep.block_size` needs kv = { kind = \"paged\", .. }: there are no blocks".into());
        }
        let values = sweep.values();
        if values.is_empty() || !values.windows(2).all(|pair| pair[0] < pair[1]) {
            return Err("`sweep` must have one value or more, ascending".into());
        }
        let at = |&value: &u32| {
            let mut changed = engine.clone();
            changed.change(sweep.change(value));
            let serve = SystemConfig::Engine(changed);
            serve.check().map_err(|message| format!("`sweep` at {value}: {message}"))?;
            Ok(Self {
                name: format!("{}-{value}", self.name),
                label: format!("{}, {}", self.label, sweep.describe(value)),
                serve,
                panels: self.panels.clone(),
                from_rate: self.from_rate.clone(),
                sweep: None,
                point: Some(SweepPoint { line: self.label.clone(), x: f64::from(value) }),
            })
        };
        values.iter().map(at).collect()
    }
}
