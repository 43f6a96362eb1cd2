//! The command line: parse, call a command, map errors to exit codes.

mod commands;

use std::process::ExitCode;

use clap::Parser;

/// The allocator of the whole process, libtorch's tensors on the CPU included: every batch has its own number of tokens, and
/// blocks whose sizes change all the time fragment the memory of glibc's by hundreds of megabytes.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = commands::Arguments::parse();
    if arguments.computes() {
        child_tuning::libtorch::with_a_considerate_environment();
        child_tuning::libtorch::keep_the_order_of_sums();
    }
    child_tuning::libtorch::survive_file_size_limits();
    match commands::call(arguments) {
        Ok(code) => code,
        // Whoever read our output has seen enough, as in `plan … | head`.
        Err(error) if commands::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let known = error.downcast_ref::<child_tuning::error::Error>();
            // The library's messages hold their causes; other errors have them in a chain.
            commands::tell(format_args!(
                "error: {}",
                known.map_or_else(|| format!("{error:#}"), ToString::to_string)
            ));
            ExitCode::from(known.map_or(3, |error| error.exit_code()))
        }
    }
}
