//! `docs/configuration.md` has every key that there is, as the types that read them say.

use std::fmt::Debug;
use std::path::Path;

use quire_engine::kv::{KvLayout, Reservation};
use quire_engine::model::WeightDtype;
use quire_engine::{
    DraftLength, DrafterConfig, PolicyConfig, PreemptionConfig, SchedulerConfig, SpeculationConfig,
};
use quire_experiments::config::{
    Arrivals, ClaimConfig, Config, CudaConfig, EngineChanges, FigureConfig, KvPrecision, PanelConfig,
    ProfileConfig, Quantity, RunConfig, SweepConfig, SweepPoint, SystemEntry,
};
use quire_experiments::metrics::{Metric, Slo};
use quire_experiments::systems::SystemConfig;
use quire_workloads::stats::StatsName;
use quire_workloads::{
    ConversationSpec, Decoding, LaterTurns, LengthDistribution, LengthSource, OverLimit, ThinkTime,
    TraceFormat, TraceSource, TurnCount, Window,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::resolve;

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    std::fs::read_to_string(path).unwrap()
}

/// The names that the error of this text says it expected in the place of `nonsense`: none where there are none.
fn expected<T: DeserializeOwned + Debug>(text: &str) -> Vec<String> {
    let error = toml::from_str::<T>(text).unwrap_err().to_string();
    let (_, names) = error.split_once("`nonsense`, ").unwrap_or_else(|| panic!("{text}: {error}"));
    assert!(names.starts_with("expected ") || names.starts_with("there are no fields"), "{text}: {error}");
    names.split('`').skip(1).step_by(2).map(str::to_string).collect()
}

/// Keys of a table.
fn keys<T: DeserializeOwned + Debug>() -> Vec<String> {
    expected::<T>("nonsense = 1")
}

/// Kinds of a table, and the keys of each.
fn kinds<T: DeserializeOwned + Debug>() -> Vec<String> {
    let kinds = expected::<T>("kind = \"nonsense\"");
    let keys = |kind: &String| expected::<T>(&format!("kind = \"{kind}\"\nnonsense = 1"));
    let keys: Vec<String> = kinds.iter().flat_map(keys).collect();
    [kinds, keys].concat()
}

/// Values of a key that are names.
fn names<T: DeserializeOwned + Debug>() -> Vec<String> {
    #[derive(Debug, Deserialize)]
    struct Value<T> {
        #[allow(dead_code, reason = "only the error is wanted")]
        value: T,
    }
    expected::<Value<T>>("value = \"nonsense\"")
}

#[test]
fn every_key_of_a_configuration_is_documented() {
    let page = page();
    let all = [
        keys::<Config>(),
        keys::<Slo>(),
        keys::<RunConfig>(),
        keys::<ProfileConfig>(),
        keys::<CudaConfig>(),
        keys::<EngineChanges>(),
        keys::<PanelConfig>(),
        kinds::<Arrivals>(),
        kinds::<LengthSource>(),
        kinds::<LengthDistribution>(),
        names::<StatsName>(),
        keys::<TraceSource>(),
        names::<TraceFormat>(),
        kinds::<Window>(),
        keys::<ConversationSpec>(),
        kinds::<TurnCount>(),
        kinds::<ThinkTime>(),
        keys::<LaterTurns>(),
        names::<OverLimit>(),
        kinds::<Decoding>(),
        keys::<SystemEntry>(),
        names::<SweepConfig>(),
        keys::<SweepPoint>(),
        kinds::<SystemConfig>(),
        keys::<SchedulerConfig>(),
        kinds::<PolicyConfig>(),
        kinds::<KvLayout>(),
        names::<Reservation>(),
        kinds::<PreemptionConfig>(),
        keys::<SpeculationConfig>(),
        kinds::<DrafterConfig>(),
        kinds::<DraftLength>(),
        names::<WeightDtype>(),
        names::<KvPrecision>(),
        kinds::<FigureConfig>(),
        names::<Metric>(),
        keys::<ClaimConfig>(),
        kinds::<Quantity>(),
    ]
    .concat();
    assert!(all.len() > 200 && all.iter().any(|name| name == "block_size"), "{all:?}");
    let missing: Vec<&String> = all.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "docs/configuration.md does not name {missing:?}");
}

#[test]
fn the_documented_configuration_is_one() {
    let page = page();
    let (_, after) = page.split_once("```toml\n").unwrap();
    let (text, _) = after.split_once("```").unwrap();
    let settings = resolve(text, "").unwrap();
    assert_eq!((settings.panels.len(), settings.systems.len()), (1, 1));
}
