//! `compare`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::analysis::compare::compare as compare_rows;
use child_tuning::error::Error;
use child_tuning::experiment::results::{self, Row};
use clap::{Args, ValueEnum};

use super::{show, tell};

#[derive(Args)]
pub struct CompareArguments {
    /// Result files
    #[arg(required = true, value_name = "RESULTS.csv")]
    files: Vec<PathBuf>,
    /// Form of the comparison
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// Tables for the terminal
    Text,
    /// Markdown tables
    Markdown,
    /// CSV
    Csv,
}

/// Shows the comparison of all rows of the files.
pub fn compare(arguments: CompareArguments) -> Result<ExitCode> {
    let comparison = compare_rows(&read_rows(&arguments.files)?);
    match arguments.format {
        Format::Text => show(comparison.to_text())?,
        Format::Markdown => show(comparison.to_markdown())?,
        Format::Csv => {
            if comparison.repeated.contradictions > 0 {
                tell(format_args!("note: {}", comparison.repeated.warning()));
            }
            show(comparison.to_csv().trim_end())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the rows of result files.
pub fn read_rows(files: &[PathBuf]) -> Result<Vec<Row>, Error> {
    let mut rows = Vec::new();
    for file in files {
        rows.extend(results::read(file)?);
    }
    match rows.is_empty() {
        true => Err(Error::configuration("the result files hold no rows yet")),
        false => Ok(rows),
    }
}
