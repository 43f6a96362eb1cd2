//! The command line: parse, call a command, map errors to exit codes.

mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = commands::Arguments::parse();
    if arguments.computes() {
        child_tuning::libtorch::with_a_considerate_environment();
        child_tuning::libtorch::keep_freed_memory();
        child_tuning::libtorch::keep_the_order_of_sums();
    }
    match commands::call(arguments) {
        Ok(code) => code,
        // Whoever read our output has seen enough, as in `plan … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let known = error.downcast_ref::<child_tuning::error::Error>();
            // The library's messages hold their causes; other errors have them in a chain.
            eprintln!("error: {}", known.map_or_else(|| format!("{error:#}"), ToString::to_string));
            ExitCode::from(known.map_or(3, |error| error.exit_code()))
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
