//! Fixed work of two revisions' programs in turns: what one run alone cannot tell, a slowdown that all systems share.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::checkout::Programs;
use super::config::WorkEntry;
use crate::compare::{Verdict, verdict};
use crate::metrics::Better;
use crate::stats::RatioEstimate;

/// How long a revision's program took for the same work as another's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Turns {
    /// New over base: geometric mean over groups, with its interval.
    pub ratio: RatioEstimate,
    /// Mean seconds of a run: the base's and the new program's. Of this machine, as it was then.
    pub seconds: [f64; 2],
}

/// What the `quire` command prints of its work; it says more.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
struct Report {
    seconds: f64,
}

/// Which program runs when in a group of four: a drift of the machine's speed that is steady over the group falls on both
/// alike.
const ORDERS: [[usize; 4]; 2] = [[0, 1, 1, 0], [1, 0, 0, 1]];

/// Has both programs do the work in turns.
///
/// # Errors
/// When a program fails or does not say how long it took.
pub(super) fn take_turns(entry: &WorkEntry, programs: &Programs) -> Result<Turns> {
    let of = [&*programs.base, &*programs.new];
    // Files and processor are warm after one run of each, which does not count.
    for program in of {
        seconds(program, entry)?;
    }
    turns(entry.groups, |program| seconds(of[program], entry))
}

fn turns(groups: u32, mut run: impl FnMut(usize) -> Result<f64>) -> Result<Turns> {
    let (mut pairs, mut sums) = (Vec::new(), [0.0; 2]);
    for group in 0..groups as usize {
        let mut spent = [0.0; 2];
        for program in ORDERS[group % ORDERS.len()] {
            spent[program] += run(program)?;
        }
        pairs.push((spent[1], spent[0]));
        sums = [sums[0] + spent[0], sums[1] + spent[1]];
    }
    let ratio = RatioEstimate::paired(&pairs).context("the work took no time")?;
    Ok(Turns { ratio, seconds: sums.map(|sum| sum / (2.0 * f64::from(groups))) })
}

/// Whether the new program took longer than allowed.
pub(super) fn judge(entry: &WorkEntry, turns: &Turns) -> Verdict {
    verdict(turns.ratio, Better::Lower, entry.max_regression)
}

fn seconds(program: &Path, entry: &WorkEntry) -> Result<f64> {
    let output = Command::new(program).args(&entry.arguments).output();
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    let name = program.file_stem().unwrap_or_default().to_string_lossy();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("work `{}`: {name}: {}: {}", entry.name, output.status, error.trim());
    }
    let report: Report = serde_json::from_slice(&output.stdout).with_context(|| {
        format!("work `{}`: {name} prints no JSON with `seconds`: give it --json", entry.name)
    })?;
    Ok(report.seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> WorkEntry {
        WorkEntry { name: "work".into(), arguments: vec![], groups: 6, max_regression: 0.05 }
    }

    /// Seconds of runs on a machine that gets slower by 2% from run to run and jitters by 1%.
    fn drifting(slower: f64) -> impl FnMut(usize) -> Result<f64> {
        let mut run = 0;
        move |program| {
            run += 1;
            let jitter = if (run * 7) % 3 == 0 { 1.01 } else { 1.0 };
            Ok((1.0 + 0.02 * f64::from(run)) * jitter * if program == 1 { slower } else { 1.0 })
        }
    }

    #[test]
    fn a_drift_of_the_machine_is_no_slowdown_and_a_slowdown_is_seen_through_it() {
        let same = turns(6, drifting(1.0)).unwrap();
        assert!((same.ratio.ratio - 1.0).abs() < 0.01, "{same:?}");
        assert_eq!(judge(&entry(), &same), Verdict::Fine);
        let slower = turns(6, drifting(1.1)).unwrap();
        assert!((slower.ratio.ratio - 1.1).abs() < 0.011, "{slower:?}");
        assert_eq!(judge(&entry(), &slower), Verdict::Regression);
        assert!(slower.seconds[1] > slower.seconds[0]);
    }

    #[test]
    fn noise_beyond_the_bound_decides_nothing() {
        let mut run = 0;
        let noisy = turns(2, |program| {
            run += 1;
            Ok(if program == 1 && run < 5 { 1.5 } else { 1.0 })
        });
        assert_eq!(judge(&entry(), &noisy.unwrap()), Verdict::Undecided);
    }

    #[test]
    fn a_program_that_says_no_seconds_is_an_error() {
        let error = seconds(Path::new("true"), &entry()).unwrap_err().to_string();
        assert!(error.contains("--json"), "{error}");
        assert!(seconds(Path::new("false"), &entry()).is_err());
    }
}
