//! The `quire` command: text from a model, its speed and its perplexity.

mod bench;
mod draft_args;
mod generate;
#[cfg(feature = "hub")]
mod get_model;
mod gpu;
mod interrupt;
mod make_dummy;
mod model_args;
mod offline;
mod outputs;
mod perplexity;
mod stop_text;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run language models with Quire's engine.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write text that follows a prompt, as it is generated.
    Generate(generate::GenerateArgs),
    /// Measure tokens per second of prefill and decode.
    Bench(bench::BenchArgs),
    /// Measure how fast an engine works off the requests of a trace that are all there at the start.
    Offline(offline::OfflineArgs),
    /// Measure how well a model predicts a text.
    Perplexity(perplexity::PerplexityArgs),
    /// Write a folder with random weights in a known shape.
    MakeDummy(make_dummy::MakeDummyArgs),
    /// Fetch a model from the Hugging Face hub into models/.
    #[cfg(feature = "hub")]
    GetModel(get_model::GetModelArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(args),
        Command::Bench(args) => bench::run(&args),
        Command::Offline(args) => offline::run(&args),
        Command::MakeDummy(args) => make_dummy::run(&args),
        Command::Perplexity(args) => perplexity::run(&args),
        #[cfg(feature = "hub")]
        Command::GetModel(args) => get_model::run(&args),
    };
    match result {
        Ok(()) if interrupt::requested() => ExitCode::from(130),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quire: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the reader of our output went away (`quire generate ... | head`): no failure of ours.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
