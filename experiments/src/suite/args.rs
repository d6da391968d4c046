//! Arguments of a suite.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// A part of a suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Ratios between systems inside a run, against those of a committed run
    Ratios,
    /// Counts of scripted workloads, exactly
    Counts,
    /// Instructions of host paths, by callgrind
    Instructions,
    /// Time of fixed work, in turns with a base revision
    Base,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: [Part; 4] = [Part::Counts, Part::Instructions, Part::Base, Part::Ratios];

    /// Name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Part::Ratios => "ratios",
            Part::Counts => "counts",
            Part::Instructions => "instructions",
            Part::Base => "base",
        }
    }
}

/// Arguments of `experiment suite`.
#[derive(Debug, Args)]
pub struct SuiteArgs {
    /// The suite: NAME stands for configs/suites/NAME.toml
    pub suite: String,
    /// Only this part; may be repeated
    #[arg(long, value_enum, value_name = "PART")]
    pub only: Vec<Part>,
    /// The revision to build and run in turns with this one; without it that part is skipped
    #[arg(long, value_name = "REV")]
    pub base: Option<String>,
    /// Where the summary and what ran go; a new folder under results/ when left out
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Make the counts of this run those to compare with, and add a row to the history; refused when a part was skipped
    #[arg(long, conflicts_with = "inject_slow_gemm")]
    pub accept: bool,
    /// Build this revision with a slowed matrix product (feature quire-kernels/slow-gemm), to see that the suite turns red
    #[arg(long, requires = "base")]
    pub inject_slow_gemm: bool,
}

/// Arguments of the program that callgrind runs.
#[derive(Debug, Args)]
pub struct HostPathArgs {
    /// The suite's file
    pub suite: PathBuf,
    /// The path's name
    pub path: String,
    /// Steps to make
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=512))]
    pub steps: u32,
}
