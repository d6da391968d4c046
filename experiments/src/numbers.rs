//! What a document reads of runs: their numbers as JSON, and their figures without the captions, for a page that has
//! captions of its own.
//!
//! A list says which runs. One whose folder is not there is left out, as `null`, so that a document can name a figure
//! before its run is kept. Everything is computed from records, as for tables and figures.

mod micro;
mod run;
mod traces;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};

use crate::claims::{Judged, Verdict, Why, judge};
use crate::config::{FigureConfig, Source};
use crate::metrics::Metric;
use crate::plot::{Picture, micro_figure, run_figure, save, traces_figure, with_extension};
use crate::run_data::{RunData, claims_in};
use crate::{micro as micro_records, names, traces as trace_records};
use micro::MicroNumbers;
use run::RunNumbers;
use traces::TracesNumbers;

/// The file that the numbers of all runs are written to.
const FILE: &str = "numbers.json";

/// Runs that a document shows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    run: Vec<Shown>,
}

/// One of them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shown {
    /// Its name in the document.
    name: String,
    /// Where it lies, full or packed; a path as seen from the current folder.
    folder: PathBuf,
    /// A configuration whose claims it is held against, instead of those that it was made with.
    claims: Option<PathBuf>,
    /// What its figure shows, instead of the rows of its configuration: a page has less room.
    #[serde(default)]
    rows: Vec<Metric>,
    /// The system whose latency at its lowest rate is the measure of all systems' rates (`rate_at` of a claim).
    reference: Option<String>,
}

/// What [`write_numbers`] did.
#[derive(Debug)]
pub struct Written {
    /// The file of numbers.
    pub file: PathBuf,
    /// Runs whose numbers are in it.
    pub shown: Vec<String>,
    /// Runs that were left out since their folder is not there, each with the folder.
    pub left_out: Vec<(String, PathBuf)>,
}

/// Numbers of a run of any kind.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Numbers {
    Run(Box<RunNumbers>),
    Micro(MicroNumbers),
    Traces(TracesNumbers),
}

/// A value over seeds.
#[derive(Debug, Serialize)]
struct Number {
    value: f64,
    /// Ends of the 95 % interval over seeds; none with one seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<(f64, f64)>,
    seeds: usize,
    /// From which side it is known.
    known: &'static str,
}

/// A claim and what a run says about it.
#[derive(Debug, Serialize)]
struct ClaimNumbers {
    says: String,
    source: String,
    what: String,
    claimed: String,
    at_least: Option<f64>,
    at_most: Option<f64>,
    value: Option<f64>,
    known: &'static str,
    low: Option<f64>,
    high: Option<f64>,
    seeds: usize,
    verdict: String,
    why: String,
    /// Of one seed, which decides nothing: whether its value is within the claim's bounds.
    agrees: Option<bool>,
    /// Whether the run was made for it.
    ran: bool,
}

impl From<&Judged> for ClaimNumbers {
    fn from(claim: &Judged) -> Self {
        let agrees = match claim.verdict {
            Verdict::Undecided(Why::OneSeed { agrees }) => agrees,
            _ => None,
        };
        Self {
            says: claim.says.clone(),
            source: claim.source.clone(),
            what: claim.what.clone(),
            claimed: claim.claimed(),
            at_least: claim.at_least,
            at_most: claim.at_most,
            value: claim.value,
            known: claim.known.name(),
            low: claim.low(),
            high: claim.high(),
            seeds: claim.seeds,
            verdict: claim.verdict.to_string(),
            why: claim.why(),
            agrees,
            ran: !matches!(claim.verdict, Verdict::Undecided(Why::NotRun(_))),
        }
    }
}

/// Writes the numbers and figures of the runs that `list` names into the folder `out`, which is made where needed.
///
/// # Errors
/// When the list or a run that is there cannot be read, when it asks for what a run does not have, or when a file cannot
/// be written.
pub fn write_numbers(list: &Path, out: &Path) -> Result<Written> {
    let source = Source::read(list).map_err(|error| anyhow!("{error}"))?;
    let List { run: shown } = source.parse().map_err(|error| anyhow!("{error}"))?;
    let mut known = BTreeSet::new();
    if let Some(twice) = shown.iter().find(|run| !known.insert(&run.name)) {
        bail!("{}: two runs have the name {}", list.display(), twice.name);
    }
    for run in &shown {
        names::check("the name", &run.name).map_err(|what| anyhow!("{}: {what}", list.display()))?;
    }
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut written = Written { file: out.join(FILE), shown: Vec::new(), left_out: Vec::new() };
    remove_figures(&written.file)?;
    let mut numbers = BTreeMap::new();
    for run in &shown {
        if run.folder.exists() {
            let of_run =
                read(run, out).with_context(|| format!("{} ({})", run.name, run.folder.display()))?;
            written.shown.push(run.name.clone());
            numbers.insert(&run.name, Some(of_run));
        } else {
            written.left_out.push((run.name.clone(), run.folder.clone()));
            numbers.insert(&run.name, None);
        }
    }
    let text = serde_json::to_string(&numbers).context("numbers are plain data")?;
    fs::write(&written.file, text + "\n")
        .with_context(|| format!("cannot write {}", written.file.display()))?;
    Ok(written)
}

/// Removes the figures that were drawn with the numbers in `file`: of a run that is shown no more, none is to stay.
fn remove_figures(file: &Path) -> Result<()> {
    let Ok(text) = fs::read_to_string(file) else { return Ok(()) };
    let old: BTreeMap<String, serde::de::IgnoredAny> =
        serde_json::from_str(&text).with_context(|| format!("{} is damaged: remove it", file.display()))?;
    for name in old.keys().filter(|name| names::is_plain(name)) {
        for extension in ["svg", "png"] {
            let figure = with_extension(&file.with_file_name(name), extension);
            if figure.exists() {
                fs::remove_file(&figure).with_context(|| format!("cannot remove {}", figure.display()))?;
            }
        }
    }
    Ok(())
}

fn read(shown: &Shown, out: &Path) -> Result<Numbers> {
    let stem = out.join(&shown.name);
    let [of_traces, of_micro] =
        [trace_records::is_record(&shown.folder), micro_records::is_record(&shown.folder)];
    if (of_traces || of_micro)
        && (shown.claims.is_some() || !shown.rows.is_empty() || shown.reference.is_some())
    {
        bail!(
            "figures of traces and micro-benchmarks have their own claims and rows, and no systems: give a name and \
             a folder alone"
        );
    }
    if of_micro {
        let record = micro_records::read(&shown.folder)?;
        let caption = draw(micro_figure(&record), &stem)?;
        return Ok(Numbers::Micro(MicroNumbers::new(&record, caption)?));
    }
    if of_traces {
        let record = trace_records::read(&shown.folder)?;
        let caption = draw(traces_figure(&record), &stem)?;
        return Ok(Numbers::Traces(TracesNumbers::new(&record, caption)?));
    }
    let mut run = RunData::load(&shown.folder)?;
    if let Some(path) = &shown.claims {
        let source = Source::read(path).map_err(|error| anyhow!("{error}"))?;
        run.claims = Ok(claims_in(&source, &run.manifest.settings).map_err(|error| anyhow!("{error}"))?);
    }
    if let Err(error) = &run.claims {
        bail!("its claims cannot be read: {error}");
    }
    if !shown.rows.is_empty() {
        run.manifest.settings.figure = with_rows(&run.manifest.settings.figure, &shown.rows)?;
    }
    if let Some(system) = &shown.reference
        && !run.manifest.settings.selected_systems().any(|known| known.name == *system)
    {
        bail!("`reference`: the run has no system {system}");
    }
    let caption = draw(run_figure(&run), &stem)?;
    let claims_of = shown.claims.as_ref().and_then(|path| path.file_name());
    let claims_of = claims_of.map(|name| name.to_string_lossy().into_owned());
    let claims = judge(&run).iter().map(ClaimNumbers::from).collect();
    let reference = shown.reference.as_deref();
    Ok(Numbers::Run(Box::new(RunNumbers::new(&run, reference, caption, claims, claims_of))))
}

/// The figure with other rows.
fn with_rows(figure: &FigureConfig, rows: &[Metric]) -> Result<FigureConfig> {
    let figure = match figure {
        FigureConfig::Rates { .. } => FigureConfig::Rates { rows: rows.to_vec() },
        FigureConfig::Tradeoff { x, .. } => FigureConfig::Tradeoff { x: *x, rows: rows.to_vec() },
        FigureConfig::Sweep { x, scale, .. } => {
            FigureConfig::Sweep { x: x.clone(), scale: *scale, rows: rows.to_vec() }
        }
        FigureConfig::Ablation { over, .. } => {
            FigureConfig::Ablation { over: over.clone(), rows: rows.to_vec() }
        }
        _ => bail!("`rows`: its figure has no rows to choose"),
    };
    figure.check().map_err(|what| anyhow!(what))?;
    Ok(figure)
}

/// Draws a figure without its caption, which is returned.
fn draw(mut picture: Picture, stem: &Path) -> Result<Vec<String>> {
    let caption = picture.take_caption();
    save(&picture, stem)?;
    Ok(caption)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SweepScale;

    #[test]
    fn rows_are_those_of_the_list_where_a_figure_has_rows() {
        let rows = [Metric::TtftBestClass, Metric::TtftWorstClass];
        let ablation = FigureConfig::Ablation { over: "all".into(), rows: vec![Metric::Ttft] };
        let other = with_rows(&ablation, &rows).unwrap();
        assert_eq!(other, FigureConfig::Ablation { over: "all".into(), rows: rows.to_vec() });
        let sweep = |rows| FigureConfig::Sweep { x: "Block size".into(), scale: SweepScale::Log2, rows };
        assert_eq!(with_rows(&sweep(vec![Metric::Ttft]), &rows).unwrap(), sweep(rows.to_vec()));
        assert!(with_rows(&FigureConfig::Memory {}, &rows).is_err());
    }
}
