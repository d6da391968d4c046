//! Instructions of host paths, counted by Valgrind's callgrind: the same within a fraction of a percent on every run,
//! however busy the machine.

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::config::PathEntry;

/// Steps of the two runs. What both do, the program's start and the warm-up, goes out in the difference, which is a
/// multiple of a block's tokens.
const STEPS: [u32; 2] = [32, 96];

/// Whether callgrind can run: its version, or why not.
pub(super) fn version() -> Result<String, String> {
    let output = Command::new("valgrind").arg("--version").output().map_err(|error| match error.kind() {
        ErrorKind::NotFound => "valgrind is not installed here".to_string(),
        _ => format!("valgrind does not run here: {error}"),
    })?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_string()),
        false => Err("valgrind does not run here".to_string()),
    }
}

/// Instructions that a step of a path takes on average. `suite` is the file that has it, `folder` takes what callgrind
/// writes.
///
/// # Errors
/// When callgrind or the path fails.
pub(super) fn instructions(suite: &Path, entry: &PathEntry, folder: &Path) -> Result<u64> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let count = |steps: u32| -> Result<u64> {
        let file = folder.join(format!("callgrind.{}.{steps}", entry.name));
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--quiet"])
            .arg(format!("--callgrind-out-file={}", file.display()))
            .args(entry.function.as_ref().map(|function| format!("--toggle-collect={function}")))
            .arg(&program)
            .arg("host-path")
            .arg(suite)
            .arg(&entry.name)
            .args(["--steps", &steps.to_string()])
            .output()
            .context("cannot start valgrind")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("path `{}` under valgrind: {}: {}", entry.name, output.status, error.trim());
        }
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        total(&text).with_context(|| format!("{} says no total", file.display()))
    };
    let [few, many] = [count(STEPS[0])?, count(STEPS[1])?];
    let more = many.checked_sub(few).filter(|&more| more > 0).with_context(|| match &entry.function {
        Some(function) => format!("path `{}`: no step calls `{function}`", entry.name),
        None => format!("path `{}`: more steps took no more instructions", entry.name),
    })?;
    Ok(more / u64::from(STEPS[1] - STEPS[0]))
}

/// The instructions of a whole program in callgrind's file: its line `totals: N`, or `summary: N` where it has none.
fn total(text: &str) -> Option<u64> {
    let value = |name: &str| {
        let line = text.lines().rev().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    value("totals:").or_else(|| value("summary:"))
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn the_total_is_read_from_callgrinds_file() {
        let text = "version: 1\nevents: Ir\nfn=(1) main\n16 400\nsummary: 5 0\n\ntotals: 123456\n";
        assert_eq!(total(text), Some(123_456));
        assert_eq!(total("summary: 17\n"), Some(17));
        assert_eq!(total("events: Ir\n"), None);
        assert_eq!(total("totals: many\n"), None);
    }
}
