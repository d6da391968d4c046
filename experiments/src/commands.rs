//! What the `experiment` command does, as functions.

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, anyhow, bail};
use signal_hook::consts::SIGINT;

use crate::claims::{judge, write_claims};
use crate::cli::{Cli, Command, CompareArgs, RunArgs};
use crate::compare::{CompareOptions, compare};
use crate::config::{FigureKind, Head, Source};
use crate::experiment::{Experiment, Target};
use crate::micro;
use crate::numbers::write_numbers;
use crate::plot::{micro_figure, run_figure, save, traces_figure, with_extension};
use crate::ratios::write_ratios;
use crate::run_data::{RunData, claims_in};
use crate::settings::Settings;
use crate::store::{self, PACKED_LIMIT_BYTES};
use crate::suite;
use crate::summary::write_summary;
use crate::table::table;
use crate::trace_events::write_trace;
use crate::traces;

/// Does what the command line says. `extend` may add systems to an experiment before it runs.
///
/// # Errors
/// When it cannot be done; the message is for a person.
pub fn run_with(cli: Cli, extend: impl FnOnce(Experiment) -> Experiment) -> Result<ExitCode> {
    match cli.command {
        Some(Command::Plot { run, claims }) => {
            draw_against(&run, claims.as_deref()).map(|()| ExitCode::SUCCESS)
        }
        Some(Command::Compare(args)) => run_compare(&args),
        Some(Command::Join { parts, out }) => {
            store::join(&parts, &out)?;
            draw(&out).map(|()| ExitCode::SUCCESS)
        }
        Some(Command::Pack { run, dest }) => run_pack(&run, &dest),
        Some(Command::Numbers { list, out }) => run_numbers(&list, &out),
        Some(Command::Suite(args)) => run_suite(&args),
        Some(Command::HostPath(args)) => suite::host_path(&args).map(|()| ExitCode::SUCCESS),
        None => run_experiment(&cli.run, extend),
    }
}

fn run_experiment(args: &RunArgs, extend: impl FnOnce(Experiment) -> Experiment) -> Result<ExitCode> {
    let Some(path) = &args.config else {
        bail!("name a configuration, as `experiment configs/fig3.toml`; --help tells more");
    };
    let source = Source::read(path).map_err(|error| {
        let commands =
            "commands are `plot`, `compare`, `join`, `pack`, `numbers` and `suite`; anything else is a configuration's path";
        if path.exists() { anyhow!("{error}") } else { anyhow!("{error}\n{commands}") }
    })?;
    let source = args.with.iter().try_fold(source, |source, path| {
        Source::read(path).and_then(|more| source.and(more)).map_err(|error| anyhow!("{error}"))
    })?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let head: Head = source.parse().map_err(|error| anyhow!("{error}"))?;
    if head.kind() == FigureKind::Traces {
        let folder = traces::run(&source, args, &arguments)?;
        return draw(&folder).map(|()| ExitCode::SUCCESS);
    }
    if head.kind() == FigureKind::Micro {
        if let Some(folder) = micro::run(&source, args, &arguments, print)? {
            draw(&folder)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::resolve(&source, args).map_err(|error| anyhow!("{error}"))?;
    let mut experiment = extend(Experiment::new(source, settings, arguments));
    if args.dry_run {
        experiment.check()?;
        // What the run would refuse, this does.
        args.out.as_deref().map_or(Ok(()), store::refuse_a_run)?;
        print(&experiment.plan())?;
        return Ok(ExitCode::SUCCESS);
    }
    let target = match (&args.out, &args.resume) {
        (Some(out), Some(packed)) => Target::ResumePacked { packed: packed.clone(), out: out.clone() },
        (None, Some(run)) => Target::Resume(run.clone()),
        (Some(out), None) => Target::New(out.clone()),
        (None, None) => Target::Default,
    };
    let interrupt = interrupt_flag()?;
    let folder = experiment.run(&target, &interrupt)?;
    // Weights are no longer needed.
    drop(experiment);
    if args.trace_steps {
        let trace = folder.join("trace.json");
        write_trace(&store::read(&folder)?, &trace)?;
        print(&format!("Trace for Perfetto or chrome://tracing: {}\n", trace.display()))?;
    }
    let run = draw_run(&folder, None)?;
    if let Some(others) = run.describe_others() {
        eprintln!("warning: {others} Orderings of systems may be noise: run again on an idle machine");
    }
    match run.unusable() {
        None => Ok(ExitCode::SUCCESS),
        Some(why) => bail!("{why}"),
    }
}

/// Set by Ctrl-C; a second Ctrl-C ends the program at once.
fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    // The order matters: the second signal finds the flag set by the first.
    signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&flag))
        .and_then(|_| signal_hook::flag::register(SIGINT, Arc::clone(&flag)))
        .context("cannot listen for Ctrl-C")?;
    Ok(flag)
}

/// Draws the run in `folder`: figure, summary and judged claims beside its records, the table to standard output.
fn draw(folder: &Path) -> Result<()> {
    draw_against(folder, None)
}

/// The same, against the claims of another configuration where one is given.
fn draw_against(folder: &Path, claims: Option<&Path>) -> Result<()> {
    let (of_traces, of_micro) = (traces::is_record(folder), micro::is_record(folder));
    if of_traces || of_micro {
        return match claims {
            None if of_traces => draw_traces(folder),
            None => draw_micro(folder),
            Some(_) => {
                bail!("--claims: a figure of traces or of one operation is held against its own claims only")
            }
        };
    }
    draw_run(folder, claims).map(|_| ())
}

fn draw_run(folder: &Path, claims: Option<&Path>) -> Result<RunData> {
    let mut run = RunData::load(folder)?;
    if let Some(path) = claims {
        let source = Source::read(path).map_err(|error| anyhow!("{error}"))?;
        run.claims = Ok(claims_in(&source, &run.manifest.settings).map_err(|error| anyhow!("{error}"))?);
        print(&format!("Claims are those of {}, not those that the run was made with.\n", path.display()))?;
    }
    write_summary(&run, folder)?;
    write_claims(&judge(&run), folder)?;
    write_ratios(&run, folder)?;
    let stem = folder.join(&run.manifest.settings.name);
    save(&run_figure(&run), &stem)?;
    print(&format!("{}\nFigure: {}\n", table(&run), with_extension(&stem, "png").display()))?;
    Ok(run)
}

fn draw_traces(folder: &Path) -> Result<()> {
    let record = traces::read(folder)?;
    write_claims(&traces::judge(&record).unwrap_or_default(), folder)?;
    let stem = folder.join(&record.name);
    save(&traces_figure(&record), &stem)?;
    print(&format!("{}\nFigure: {}\n", traces::text(&record), with_extension(&stem, "png").display()))
}

fn draw_micro(folder: &Path) -> Result<()> {
    let record = micro::read(folder)?;
    write_claims(&micro::judge(&record).unwrap_or_default(), folder)?;
    let stem = folder.join(&record.name);
    save(&micro_figure(&record), &stem)?;
    print(&format!("{}\nFigure: {}\n", micro::text(&record), with_extension(&stem, "png").display()))
}

fn run_compare(args: &CompareArgs) -> Result<ExitCode> {
    let load = |path: &Path| RunData::load(path).with_context(|| format!("cannot read {}", path.display()));
    let (old, new) = (load(&args.old)?, load(&args.new)?);
    let options = CompareOptions { max_regression: args.max_regression.0, absolute: args.absolute };
    let comparison = compare(&old, &new, options).map_err(|what| anyhow!(what))?;
    print(&comparison.to_string())?;
    Ok(if comparison.regressed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn run_suite(args: &suite::SuiteArgs) -> Result<ExitCode> {
    let (report, folder) = suite::run(args, &*interrupt_flag()?)?;
    print(&format!("{report}\nSummary: {}\n", folder.join("summary.md").display()))?;
    Ok(if report.is_red() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn run_pack(run: &Path, dest: &Path) -> Result<ExitCode> {
    if traces::is_record(run) {
        traces::pack(run, dest)?;
    } else if micro::is_record(run) {
        micro::pack(run, dest)?;
    } else {
        store::pack(run, dest)?;
    }
    // The packed form must be enough: draw it from what it holds.
    draw(dest)?;
    // What it says is in summary.parquet, in two thirds of the space, and `plot` writes both.
    let csv = dest.join("summary.csv");
    if csv.exists() {
        std::fs::remove_file(&csv).with_context(|| format!("cannot remove {}", csv.display()))?;
    }
    let bytes = store::size(dest)?;
    print(&format!("{}: {:.2} MB\n", dest.display(), bytes as f64 / 1e6))?;
    if bytes > PACKED_LIMIT_BYTES {
        let limit = PACKED_LIMIT_BYTES as f64 / 1e6;
        bail!(
            "that is more than the {limit:.0} MB that a committed figure may have: run fewer requests or rates"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn run_numbers(list: &Path, out: &Path) -> Result<ExitCode> {
    let written = write_numbers(list, out)?;
    print(&format!("{}: {}\n", written.file.display(), written.shown.join(", ")))?;
    for (name, folder) in &written.left_out {
        print(&format!("Left out: {name}, since {} is not there\n", folder.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes to standard output; a reader that went away is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
