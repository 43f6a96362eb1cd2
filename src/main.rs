//! The command line: parse, call a command, map errors to exit codes.

mod commands;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    child_tuning::libtorch::keep_freed_memory();
    let arguments = commands::Arguments::parse();
    match commands::call(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            let known = error.downcast_ref::<child_tuning::error::Error>();
            ExitCode::from(known.map_or(3, |error| error.exit_code()))
        }
    }
}
