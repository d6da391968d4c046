//! The `experiment` command. All of it is in the library, so that a program with systems of its own is as short.

use std::process::ExitCode;

use clap::Parser;
use quire_experiments::{cli::Cli, commands};

fn main() -> ExitCode {
    match commands::run_with(Cli::parse(), |experiment| experiment) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            // 1 is a comparison's regression.
            ExitCode::from(2)
        }
    }
}
