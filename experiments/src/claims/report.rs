//! Judged claims for people and for other tools.

use std::fmt::{self, Write};
use std::path::Path;

use super::{Judged, Verdict, Why};
use crate::frame::{FrameError, column, frame, write_csv};
use crate::text_table::number;

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Holds => "holds",
            Verdict::Fails => "fails",
            Verdict::Undecided(_) => "undecided",
        })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::OneSeed { agrees: Some(true) } => f.write_str("one seed, whose value agrees"),
            Why::OneSeed { agrees: Some(false) } => f.write_str("one seed, whose value disagrees"),
            Why::OneSeed { agrees: None } => {
                f.write_str("one seed, whose value is a bound that tells nothing")
            }
            Why::WithinNoise => f.write_str("the interval over seeds includes the claim's bound"),
            Why::OneSided => f.write_str("the value is a bound that tells nothing"),
            Why::Missing(what) | Why::NotRun(what) => f.write_str(what),
            Why::Needs(device) => write!(f, "needs --device {device}"),
        }
    }
}

impl Judged {
    /// Why it is undecided; empty where it holds or fails.
    pub fn why(&self) -> String {
        match &self.verdict {
            Verdict::Undecided(why) => why.to_string(),
            _ => String::new(),
        }
    }

    /// Lower end of its interval, if it has one.
    pub fn low(&self) -> Option<f64> {
        self.interval.map(|interval| interval.0).filter(|end| end.is_finite())
    }

    /// Upper end of its interval, if it has one.
    pub fn high(&self) -> Option<f64> {
        self.interval.map(|interval| interval.1).filter(|end| end.is_finite())
    }

    /// Its bounds in words.
    pub fn claimed(&self) -> String {
        let part = |word: &str, bound: Option<f64>| bound.map(|b| format!("{word} {b}"));
        let parts = [part("at least", self.at_least), part("at most", self.at_most)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
    }
}

/// The claims as text: verdict, what was measured against what was claimed, and the paper's words. Empty without claims.
pub fn text(claims: &[Judged]) -> String {
    let mut out = String::new();
    for claim in claims {
        let show = |end: f64| number(Some(end));
        let interval = claim.interval.map(|(low, high)| match (low.is_finite(), high.is_finite()) {
            (true, true) => format!(" ({} to {})", show(low), show(high)),
            (true, false) => format!(" (at least {})", show(low)),
            (false, _) => format!(" (at most {})", show(high)),
        });
        let value = format!("{}{}", claim.value.map_or("", |_| claim.known.mark()), number(claim.value));
        let why = match &claim.verdict {
            Verdict::Undecided(why) => format!(": {why}"),
            _ => String::new(),
        };
        let _ = writeln!(
            out,
            "  {:<9}  {}: {}{}, claimed {}{why}\n             {}: {}",
            claim.verdict.to_string(),
            claim.what,
            value,
            interval.unwrap_or_default(),
            claim.claimed(),
            claim.source,
            claim.says,
        );
    }
    if out.is_empty() { out } else { format!("What papers found, and what this run says:\n{out}") }
}

/// How many claims hold, fail and stay undecided: a line for a figure's caption; none without claims.
pub fn caption_line(claims: &[Judged]) -> Option<String> {
    if claims.is_empty() {
        return None;
    }
    let count = |test: &dyn Fn(&Verdict) -> bool| claims.iter().filter(|c| test(&c.verdict)).count();
    let parts = [
        (count(&|v| *v == Verdict::Holds), ["holds", "hold"]),
        (count(&|v| *v == Verdict::Fails), ["fails", "fail"]),
        (count(&|v| matches!(v, Verdict::Undecided(_))), ["is undecided", "are undecided"]),
    ];
    let told = |(n, [one, more]): (usize, [&str; 2])| format!("{n} {}", if n == 1 { one } else { more });
    let parts: Vec<String> = parts.into_iter().filter(|(n, _)| *n > 0).map(told).collect();
    let one_seed = |value| Verdict::Undecided(Why::OneSeed { agrees: Some(value) });
    let suggested = match [true, false].map(|value| count(&|v| *v == one_seed(value))) {
        [0, 0] => String::new(),
        [agree, disagree] => {
            let [agrees, does] = [(agree, ["agrees", "agree"]), (disagree, ["does", "do"])].map(told);
            format!("; of the values of one seed, which decide nothing, {agrees} and {does} not")
        }
    };
    Some(format!("Of {} claims of papers: {}{suggested}.", claims.len(), parts.join(", ")))
}

/// Writes claims.csv into `folder`, a row a claim; without claims there is none, and one that is there goes.
///
/// # Errors
/// When the file cannot be written or removed.
pub fn write_claims(claims: &[Judged], folder: &Path) -> Result<(), FrameError> {
    let path = folder.join("claims.csv");
    if claims.is_empty() {
        return match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(FrameError::new(&path, e)),
            _ => Ok(()),
        };
    }
    let text = |of: &dyn Fn(&Judged) -> String| claims.iter().map(of).collect::<Vec<_>>();
    let value = |of: &dyn Fn(&Judged) -> Option<f64>| claims.iter().map(of).collect::<Vec<_>>();
    let mut table = frame(
        claims.len(),
        vec![
            column("verdict", text(&|c| c.verdict.to_string())),
            column("why", text(&Judged::why)),
            column("what", text(&|c| c.what.clone())),
            column("value", value(&|c| c.value)),
            column("known", text(&|c| c.value.map_or("", |_| c.known.name()).to_string())),
            column("low", value(&|c| c.low())),
            column("high", value(&|c| c.high())),
            column("seeds", claims.iter().map(|c| c.seeds as u32).collect::<Vec<_>>()),
            column("at_least", value(&|c| c.at_least)),
            column("at_most", value(&|c| c.at_most)),
            column("source", text(&|c| c.source.clone())),
            column("says", text(&|c| c.says.clone())),
        ],
    );
    write_csv(&path, &mut table)
}
