//! Counts that depend on the settings alone.

use std::collections::BTreeMap;

use super::CountChange;
use crate::metrics::CellMetrics;
use crate::run_data::{CellData, RunData};
use crate::settings::Settings;
use crate::systems::SystemConfig;

/// What differs, cell by cell where both runs have the cell.
pub(super) fn changes(old: &RunData, new: &RunData) -> Vec<CountChange> {
    let mut changes = Vec::new();
    if old.disagreements.is_empty() && !new.disagreements.is_empty() {
        changes.push(CountChange {
            what: "requests whose output differs between systems".into(),
            old: 0,
            new: new.disagreements.len() as u64,
        });
    }
    if old.manifest.settings_sha256 != new.manifest.settings_sha256 {
        return changes;
    }
    let by_id: BTreeMap<String, &CellData> = old.cells.iter().map(|c| (c.entry.key.id(), c)).collect();
    for cell in &new.cells {
        let Some(other) = by_id.get(&cell.entry.key.id()) else { continue };
        let (Some(after), Some(before)) = (&cell.full, &other.full) else { continue };
        let [before, after] =
            [(*other, before), (cell, after)].map(|(cell, full)| counts(&new.manifest.settings, cell, full));
        for ((what, old), (_, new)) in before.into_iter().zip(after) {
            if old != new {
                changes.push(CountChange { what: format!("{what}, {}", cell.entry.key), old, new });
            }
        }
    }
    changes
}

/// How many requests systems rejected or failed, where that differs: over the cells that ran in both.
pub(super) fn losses(old: &RunData, new: &RunData) -> Vec<String> {
    let by_id: BTreeMap<String, &CellData> = old.cells.iter().map(|c| (c.entry.key.id(), c)).collect();
    let mut sums: BTreeMap<(&str, &str), [[u64; 2]; 2]> = BTreeMap::new();
    for cell in &new.cells {
        let Some(before) = by_id.get(&cell.entry.key.id()).and_then(|other| other.full.as_ref()) else {
            continue;
        };
        let Some(after) = &cell.full else { continue };
        let sum = sums.entry((&cell.entry.key.system, &cell.entry.key.panel)).or_default();
        for (sum, full) in sum.iter_mut().zip([before, after]) {
            *sum = [sum[0] + full.rejected, sum[1] + full.failed];
        }
    }
    let changed = sums.into_iter().filter(|(_, [old, new])| old != new);
    let line = |((system, panel), [old, new]): ((&str, &str), [[u64; 2]; 2])| {
        let [what_rejected, what_failed] = [("rejected", 0), ("failed", 1)]
            .map(|(what, i)| (old[i] != new[i]).then(|| format!("{what} {} -> {}", old[i], new[i])));
        let what: Vec<String> = [what_rejected, what_failed].into_iter().flatten().collect();
        format!("requests of {system} in {panel}: {}", what.join(", "))
    };
    changed.map(line).collect()
}

/// The counts of a cell that do not depend on how fast anything is.
fn counts(settings: &Settings, cell: &CellData, full: &CellMetrics) -> Vec<(&'static str, u64)> {
    let key = &cell.entry.key;
    let panel = settings.panels.iter().find(|panel| panel.name == key.panel);
    let serve = settings.systems.iter().find(|s| s.name == key.system).map(|system| &system.serve);
    let mut counts = Vec::new();
    // Which turns of conversations are sent depends on when the answers before them ended.
    if panel.is_some_and(|panel| panel.conversations.is_none()) {
        counts.push(("requests", full.requests));
        // A system refuses what its model does not admit, and an engine what does not fit its memory; but also what comes
        // while too many wait.
        let never_full = |max_waiting: u32| u64::from(max_waiting) >= full.requests;
        counts.push(match serve {
            Some(SystemConfig::Engine(engine)) if never_full(engine.scheduler.max_waiting) => {
                ("rejected requests", full.rejected)
            }
            _ => (
                "rejected of the inadmissible requests",
                full.rejected.min(cell.entry.workload_limits.inadmissible),
            ),
        });
    }
    // A server elsewhere fails by its own network, load and limits.
    if !matches!(serve, Some(SystemConfig::OpenAi(_))) {
        counts.push(("failed requests", full.failed));
    }
    counts
}
