//! What a suite found, as Markdown for a pull request.

use std::fmt::{self, Write};

use super::args::Part;
use crate::machine::{Machine, Revision};

/// What became of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is worse than allowed.
    Green,
    /// Something is, or the part could not be judged.
    Red,
    /// It did not run: this says nothing.
    Skipped,
}

impl Outcome {
    /// Red when anything is.
    pub(super) fn of(red: bool) -> Self {
        if red { Self::Red } else { Self::Green }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Green => "green",
            Self::Red => "**red**",
            Self::Skipped => "skipped",
        }
    }
}

/// One part's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartReport {
    /// Which.
    pub part: Part,
    /// What became of it.
    pub outcome: Outcome,
    /// A line: what was judged, or why it was not.
    pub line: String,
    /// Paragraphs and tables, in Markdown.
    pub details: String,
    /// Whether `--accept` may make what it found the baseline.
    pub acceptable: bool,
}

impl PartReport {
    /// A part that did not run.
    pub(super) fn skipped(part: Part, why: impl Into<String>) -> Self {
        let (line, details) = (why.into(), String::new());
        Self { part, outcome: Outcome::Skipped, line, details, acceptable: true }
    }

    /// A part that failed.
    pub(super) fn broken(part: Part, error: &anyhow::Error) -> Self {
        let details = format!("```\n{error:#}\n```\n");
        Self { part, outcome: Outcome::Red, line: "could not be judged".into(), details, acceptable: false }
    }
}

/// A suite's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuiteReport {
    /// The suite.
    pub suite: String,
    /// The source.
    pub revision: Revision,
    /// Where it ran.
    pub machine: Machine,
    /// What a reader must not overlook.
    pub remarks: Vec<String>,
    /// The parts that were asked for.
    pub parts: Vec<PartReport>,
}

impl SuiteReport {
    /// Whether anything is worse than allowed.
    pub fn is_red(&self) -> bool {
        self.parts.iter().any(|part| part.outcome == Outcome::Red)
    }

    /// Why `--accept` refuses it; none where it does not. A row of the history that lacks a part looks like one without it.
    pub fn refusal(&self) -> Option<String> {
        let refusal = |part: &PartReport| match (part.outcome, part.acceptable) {
            (Outcome::Skipped, _) => Some(format!(
                "{} was skipped ({}): run it, or name the parts that are meant with --only",
                part.part.name(),
                part.line
            )),
            (_, false) => Some(format!("{} is red and no baseline could make it green", part.part.name())),
            _ => None,
        };
        self.parts.iter().find_map(refusal)
    }
}

impl fmt::Display for SuiteReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let judged = self.parts.iter().any(|part| part.outcome != Outcome::Skipped);
        let verdict = match (self.is_red(), judged) {
            (true, _) => Outcome::Red,
            (false, true) => Outcome::Green,
            (false, false) => Outcome::Skipped,
        };
        writeln!(f, "# Suite {}: {}\n", self.suite, verdict.word())?;
        let dirty = if self.revision.dirty { ", with changes" } else { "" };
        writeln!(f, "Revision {}{dirty}; {}.\n", self.revision.commit, self.machine.describe())?;
        for remark in &self.remarks {
            writeln!(f, "{remark}\n")?;
        }
        let rows = self
            .parts
            .iter()
            .map(|part| [part.part.name().to_string(), part.outcome.word().to_string(), part.line.clone()]);
        f.write_str(&markdown(["part", "outcome", "judged"], rows))?;
        for part in self.parts.iter().filter(|part| !part.details.is_empty()) {
            write!(f, "\n## {}\n\n{}", part.part.name(), part.details)?;
        }
        Ok(())
    }
}

/// A table in Markdown.
pub(super) fn markdown<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut text = format!("| {} |\n|{}\n", header.join(" | "), "---|".repeat(N));
    for row in rows {
        // A bar would begin another cell.
        let cells = row.map(|cell| cell.replace('|', "\\|"));
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Device;

    #[test]
    fn a_summary_is_red_when_a_part_is_and_says_what_was_skipped() {
        let part = |part, outcome| PartReport {
            part,
            outcome,
            line: "a|b".into(),
            details: "Words.\n".into(),
            acceptable: true,
        };
        let mut report = SuiteReport {
            suite: "ci".into(),
            revision: Revision { commit: "abc".into(), dirty: true },
            machine: Machine::this(Device::Cpu),
            remarks: vec![],
            parts: vec![
                part(Part::Counts, Outcome::Green),
                PartReport::skipped(Part::Instructions, "valgrind is not installed here"),
            ],
        };
        let text = report.to_string();
        assert!(!report.is_red() && text.starts_with("# Suite ci: green\n"), "{text}");
        assert!(text.contains("| instructions | skipped | valgrind is not installed here |"), "{text}");
        assert!(
            text.contains("| counts | green | a\\|b |") && text.contains("## counts\n\nWords."),
            "{text}"
        );
        let refusal = report.refusal().unwrap();
        assert!(
            refusal.starts_with("instructions was skipped (valgrind is not installed here)"),
            "{refusal}"
        );
        report.parts.push(part(Part::Base, Outcome::Red));
        assert!(report.is_red() && report.to_string().starts_with("# Suite ci: **red**"));
        let mut whole = report.clone();
        whole.parts.retain(|part| part.outcome != Outcome::Skipped);
        assert_eq!(whole.refusal(), None, "counts that changed are what is accepted");
        whole.parts.push(PartReport::broken(Part::Ratios, &anyhow::anyhow!("no run")));
        assert!(whole.refusal().unwrap().starts_with("ratios is red"));
        report.parts.retain(|part| part.outcome == Outcome::Skipped);
        assert!(report.to_string().starts_with("# Suite ci: skipped"));
    }
}
