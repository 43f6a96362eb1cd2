//! The command line: parse, call a command, map errors to exit codes.

mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = commands::Arguments::parse();
    commands::sleep_while_waiting();
    child_tuning::libtorch::keep_freed_memory();
    match commands::call(arguments) {
        Ok(code) => code,
        // Whoever read our output has seen enough, as in `plan … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let known = error.downcast_ref::<child_tuning::error::Error>();
            ExitCode::from(known.map_or(3, |error| error.exit_code()))
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
