//! What was accepted last: the numbers that do not depend on how fast a machine is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

use super::replay::Counts;
use crate::config::Source;

/// The committed baseline of a suite.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// Instructions by path.
    #[serde(default)]
    pub instructions: BTreeMap<String, u64>,
    /// Counts by replay.
    #[serde(default)]
    pub counts: BTreeMap<String, Counts>,
}

/// A count that is not the baseline's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The replay.
    pub replay: String,
    /// What is counted.
    pub count: String,
    /// In the baseline; none where it has no such replay.
    pub old: Option<u64>,
    /// Now; none where the suite has no such replay.
    pub new: Option<u64>,
}

const HEADER: &str = "# What was accepted last, by `experiment suite NAME --accept`. Not to be edited: see docs/regressions.md.\n\n";

impl Baseline {
    /// Reads a baseline; an empty one where there is no file yet.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                Source::new(path.display().to_string(), text).parse().map_err(|error| anyhow!("{error}"))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).context("cannot put the baseline into words")?;
        std::fs::write(path, format!("{HEADER}{text}"))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// The counts of `new` that differ, replays that only one of them has included.
    pub fn changes(&self, new: &BTreeMap<String, Counts>) -> Vec<Change> {
        let replays: BTreeSet<&String> = self.counts.keys().chain(new.keys()).collect();
        let mut changes = Vec::new();
        for replay in replays {
            let (before, after) = (self.counts.get(replay), new.get(replay));
            let names = [before, after].into_iter().flatten().flat_map(|counts| counts.0.keys());
            for name in names.collect::<BTreeSet<_>>() {
                let [old, new] = [before, after].map(|counts| counts.map(|counts| counts.get(name)));
                if old != new {
                    changes.push(Change { replay: replay.clone(), count: name.clone(), old, new });
                }
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pairs: &[(&str, u64)]) -> Counts {
        Counts(pairs.iter().map(|(name, count)| ((*name).to_string(), *count)).collect())
    }

    #[test]
    fn a_baseline_is_read_as_it_was_written_and_tells_what_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("baseline.toml");
        assert_eq!(Baseline::read(&path).unwrap(), Baseline::default());
        let old = Baseline {
            instructions: [("decode".to_string(), 9)].into(),
            counts: [("a".to_string(), counts(&[("steps", 5), ("padding_tokens", 2)]))].into(),
        };
        old.write(&path).unwrap();
        assert_eq!(Baseline::read(&path).unwrap(), old);
        assert_eq!(old.changes(&old.counts), []);

        let new = [("a".to_string(), counts(&[("steps", 6)])), ("b".to_string(), counts(&[("steps", 1)]))];
        let changes = old.changes(&new.into());
        let seen: Vec<_> = changes.iter().map(|c| (&*c.replay, &*c.count, c.old, c.new)).collect();
        assert_eq!(
            seen,
            [
                ("a", "padding_tokens", Some(2), Some(0)),
                ("a", "steps", Some(5), Some(6)),
                ("b", "steps", None, Some(1))
            ]
        );
        std::fs::write(&path, "counst = {}").unwrap();
        assert!(Baseline::read(&path).unwrap_err().to_string().contains("counst"));
    }
}
