//! `report`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::analysis::report::report as report_on;
use child_tuning::error::Error;
use child_tuning::files::write_bytes;
use clap::Args;

use super::compare::read_rows;
use super::show;

#[derive(Args)]
pub struct ReportArguments {
    /// Result files
    #[arg(required = true, value_name = "RESULTS.csv")]
    files: Vec<PathBuf>,
    /// Folder for `report.md` and its figures; what it has of these is replaced
    #[arg(long, value_name = "FOLDER", default_value = "report")]
    output: PathBuf,
}

/// Writes the report and says where.
pub fn report(arguments: ReportArguments) -> Result<ExitCode> {
    let report = report_on(&read_rows(&arguments.files)?);
    let folder = &arguments.output;
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for (name, figure) in &report.figures {
        write_bytes(&folder.join(name), figure.as_bytes())?;
    }
    let text = folder.join("report.md");
    write_bytes(&text, report.markdown.as_bytes())?;
    show(text.display())?;
    Ok(ExitCode::SUCCESS)
}
