//! `report`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::analysis::report::report as report_on;
use child_tuning::error::Error;
use child_tuning::files::write_bytes;
use clap::Args;

use super::compare::read_rows;
use super::{check_output_folder, show};

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
    check_output_folder(&arguments.output)?;
    let report = report_on(&read_rows(&arguments.files)?);
    let folder = &arguments.output;
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let text = folder.join("report.md");
    let earlier = std::fs::read_to_string(&text).unwrap_or_default();
    for (name, figure) in &report.figures {
        write_bytes(&folder.join(name), figure.as_bytes())?;
    }
    write_bytes(&text, report.markdown.as_bytes())?;
    let is_left_over = |name: &&str| report.figures.iter().all(|(new, _)| new != name);
    for name in figures_of(&earlier).filter(is_left_over) {
        // What cannot be removed does no harm.
        let _ = std::fs::remove_file(folder.join(name));
    }
    show(text.display())?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the names of the figures that a report shows.
fn figures_of(markdown: &str) -> impl Iterator<Item = &str> {
    let linked = markdown.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    linked.filter(|name| name.ends_with(".svg") && !name.contains(['/', '\\']))
}
