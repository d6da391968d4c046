//! The command line: what was typed. [`crate::settings`] resolves it with the configuration into what runs.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Device;
use crate::suite::{HostPathArgs, SuiteArgs};

const EXAMPLES: &str = "\
Examples:
  experiment configs/fig3.toml                    run the figure's matrix and draw it
  experiment configs/fig3.toml --quick            the same in less than a minute
  experiment configs/fig3.toml --dry-run          what would run, and for how long
  experiment configs/fig3.toml --only paged       one system, all panels
  experiment configs/fig3.toml --only paged/conversation
  experiment configs/fig3.toml --with mine.toml   a line of one's own beside the figure's: mine.toml has its [[system]]
  experiment configs/fig12.toml --repeats 3       three seeds: intervals, and claims that can hold or fail
  experiment configs/fig12.toml --rates-times 0.5 half the load, where two slow cores are overloaded throughout
  experiment configs/fig2.toml --trace azure_conv=traces/azure_llm_2023_conv.csv
                                                  a trace's distributions beside the fits that stand for it
  experiment configs/fig3.toml --resume results/fig3/20260101-120000
  experiment configs/fig3.toml --resume results/cpu/fig3 --out NEW
                                                  go on with a packed run in a new folder
  experiment plot results/fig3/20260101-120000    draw a run again from its records
  experiment compare OLD NEW --max-regression 5%  exit 1 when NEW is worse by more
  experiment join PART PART --out NEW             one run of parts that ran apart, as --only says
  experiment pack RUN results/cpu/fig3            the small form that is committed
  experiment numbers paper/runs.toml --out paper/generated
                                                  numbers and figures of committed runs, for the paper
  experiment suite ci --base main                 what a pull request made worse, as Markdown; exit 1 when something is";

/// Runs experiments: drives serving systems with a workload, records everything, draws figures from the records.
#[derive(Debug, Parser)]
#[command(name = "experiment", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do instead of running a configuration.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What to run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Everything but running.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw a run's figure, table and summary again, from its records alone
    Plot {
        /// The run's folder
        run: PathBuf,
        /// Hold it against the claims of this configuration, not against those it ran with
        #[arg(long, value_name = "CONFIG")]
        claims: Option<PathBuf>,
    },
    /// Compare two runs metric by metric; exit 1 when the new one is worse by more than allowed
    #[command(after_help = "\
Runs of one machine are compared in absolute figures. Runs of different machines are compared by the ratios between
systems inside each run and by counts that do not depend on speed, unless --absolute says otherwise.")]
    Compare(CompareArgs),
    /// Make one run of parts of one matrix that ran apart on machines of one kind, each with its own --only
    Join {
        /// The parts' folders
        #[arg(num_args = 2.., required = true)]
        parts: Vec<PathBuf>,
        /// Where to write; must not be a run already
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write what a document reads of runs: their numbers as JSON, and their figures without captions
    #[command(after_help = "\
LIST is TOML: a [[run]] each, with `name` and `folder`, and where wanted `claims` (a configuration whose claims the run is
held against), `rows` (metrics, instead of those of its figure) and `reference` (the system whose latency at its lowest
rate is the measure of all systems' rates). A run whose folder is not there is null.")]
    Numbers {
        /// The list of runs, as paper/runs.toml
        list: PathBuf,
        /// The folder to write to; what is in it is replaced
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Write the small form of a run, for committing: records as compressed parquet
    Pack {
        /// The run's folder
        run: PathBuf,
        /// Where to write; must not exist
        dest: PathBuf,
    },
    /// Run a fixed small set that tells whether something got worse; exit 1 when it did
    Suite(SuiteArgs),
    /// Make steps of a suite's host path: what `suite` has callgrind count
    #[command(hide = true)]
    HostPath(HostPathArgs),
}

/// Arguments of a run.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The configuration, as configs/fig3.toml
    pub config: Option<PathBuf>,
    /// More of the configuration, as if written at its end: systems of one's own, panels, claims. May be repeated
    #[arg(long = "with", value_name = "CONFIG", requires = "config")]
    pub with: Vec<PathBuf>,
    /// With the changes of the configuration's `quick` profile
    #[arg(long, conflicts_with = "full")]
    pub quick: bool,
    /// With the changes of the configuration's `full` profile
    #[arg(long)]
    pub full: bool,
    /// Where the systems compute: cpu, or cuda with the changes of the configuration's `cuda` table
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: Device,
    /// Print the cells and how long they take, and stop
    #[arg(long, conflicts_with = "resume")]
    pub dry_run: bool,
    /// Where results go; a new folder under results/ when left out. With --resume: where a packed run goes on
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on with an interrupted run in this folder, on the machine it began on; a packed run stays as it is and goes
    /// on in the folder that --out names
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,
    /// Also write trace.json, for Perfetto or chrome://tracing
    #[arg(long)]
    pub trace_steps: bool,
    /// Only this system, or this system in this panel; of one with a sweep, all points or one (`paged-16`); may be repeated
    #[arg(long, value_name = "SYSTEM[/PANEL]")]
    pub only: Vec<Only>,
    /// Instead of the configuration's model: a folder, a GGUF file, or dummy:SHAPE
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Replay this trace in the panels that stand for one (`replay = true`), or in the one that is named, instead of its
    /// statistics; draw it beside the fit of the source that is named. May be repeated
    #[arg(long, value_name = "[NAME=]PATH")]
    pub trace: Vec<TraceArg>,
    /// Threads of every system, instead of the configuration's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Seeds, one after another, instead of the configuration's number: with two or more there are intervals
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: Option<u32>,
    /// All request rates times this, for a machine that is slower or faster than the one they were chosen for
    #[arg(long, value_name = "FACTOR", value_parser = rate_factor)]
    pub rates_times: Option<f64>,
}

/// By what rates may be multiplied.
pub(crate) const RATE_FACTORS: RangeInclusive<f64> = 0.001..=1000.0;

fn rate_factor(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor| RATE_FACTORS.contains(factor));
    factor.ok_or_else(|| format!("`{text}` is no number from 0.001 to 1000"))
}

/// Arguments of a comparison.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// The run to compare with
    pub old: PathBuf,
    /// The run in question
    pub new: PathBuf,
    /// By how much a figure may be worse
    #[arg(long, value_name = "PERCENT", default_value = "5%")]
    pub max_regression: Percent,
    /// Compare absolute figures although the machines differ
    #[arg(long)]
    pub absolute: bool,
}

/// A selection of cells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Only {
    /// Name of a system.
    pub system: String,
    /// Name of a panel; all when none.
    pub panel: Option<String>,
}

impl std::str::FromStr for Only {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (system, panel) = match text.split_once('/') {
            Some((system, panel)) => (system, Some(panel)),
            None => (text, None),
        };
        if system.is_empty() || panel.is_some_and(str::is_empty) {
            return Err("expected SYSTEM or SYSTEM/PANEL".into());
        }
        Ok(Self { system: system.into(), panel: panel.map(str::to_string) })
    }
}

/// A trace for a panel or a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceArg {
    /// Name of the panel or the source; any that asks for a trace when none.
    pub name: Option<String>,
    /// The file.
    pub path: PathBuf,
}

impl std::str::FromStr for TraceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // What has a folder in it is a path: `./a=b.csv` is one.
        let named = text.split_once('=').filter(|(name, _)| !name.contains(['/', '\\']));
        match named {
            Some((name, path)) if name.is_empty() || path.is_empty() => {
                Err("expected PATH or NAME=PATH; write ./ before a path with `=` in it".into())
            }
            Some((name, path)) => Ok(Self { name: Some(name.into()), path: path.into() }),
            None => Ok(Self { name: None, path: text.into() }),
        }
    }
}

/// A share, written as `5%`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percent(
    /// The share: 0.05 for `5%`.
    pub f64,
);

impl std::str::FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').ok_or("write a percentage, as 5%")?;
        let value: f64 = number.trim().parse().map_err(|_| "write a percentage, as 5%")?;
        if value.is_finite() && value >= 0.0 {
            Ok(Self(value / 100.0))
        } else {
            Err("must be 0% or more".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn a_configuration_needs_no_subcommand() {
        let cli =
            parse("experiment configs/fig3.toml --quick --only paged/conversation --only naive").unwrap();
        assert!(cli.command.is_none() && cli.run.quick);
        assert_eq!(cli.run.only[0].panel.as_deref(), Some("conversation"));
        assert_eq!(cli.run.only[1], Only { system: "naive".into(), panel: None });
    }

    #[test]
    fn subcommands_are_subcommands() {
        let cli = parse("experiment compare a b --max-regression 2.5%").unwrap();
        let Some(Command::Compare(args)) = cli.command else { panic!("{cli:?}") };
        assert_eq!(args.max_regression, Percent(0.025));
        assert!(parse("experiment compare a b --max-regression 5").is_err());
    }

    #[test]
    fn a_trace_may_name_what_it_is_for() {
        let cli = parse("experiment c.toml --trace conv=a/b.csv --trace ./x=y.csv").unwrap();
        let [named, plain] = &cli.run.trace[..] else { panic!("{cli:?}") };
        assert_eq!((named.name.as_deref(), named.path.to_str()), (Some("conv"), Some("a/b.csv")));
        assert_eq!((plain.name.as_deref(), plain.path.to_str()), (None, Some("./x=y.csv")));
        assert!(parse("experiment c.toml --trace conv=").is_err());
    }

    #[test]
    fn a_mistyped_option_is_answered_with_the_right_one() {
        let error = parse("experiment configs/fig3.toml --qiuck").unwrap_err().to_string();
        assert!(error.contains("--quick"), "{error}");
        assert!(parse("experiment c.toml --quick --full").is_err());
    }

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
