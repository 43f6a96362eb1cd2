//! `run` and `plan`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use child_tuning::analysis::compare;
use child_tuning::error::Error;
use child_tuning::experiment::results::{self, ResultsFile};
use child_tuning::experiment::{ExperimentSpec, Override, Plan, PlanOptions, Runner, Summary};
use clap::Args;

use super::progress::Display;
use super::{ComputeArguments, DataArguments, show};

/// What to do with which experiments.
#[derive(Args)]
pub struct ExperimentArguments {
    /// Experiment files
    #[arg(required = true, value_name = "EXPERIMENT.yaml")]
    experiments: Vec<PathBuf>,
    /// Change a key of the experiment: a dotted path and a YAML value; may be repeated
    #[arg(long = "set", value_name = "PATH=VALUE")]
    overrides: Vec<Override>,
    /// Only the runs with this model, task, method or seed, such as task=rte; may be repeated or joined by commas
    #[arg(long, value_name = "COLUMN=VALUE", value_delimiter = ',', value_parser = column_and_value)]
    only: Vec<(String, String)>,
    #[command(flatten)]
    data: DataArguments,
}

#[derive(Args)]
pub struct RunArguments {
    #[command(flatten)]
    experiment: ExperimentArguments,
    #[command(flatten)]
    compute: ComputeArguments,
}

#[derive(Args)]
pub struct PlanArguments {
    #[command(flatten)]
    experiment: ExperimentArguments,
}

fn column_and_value(text: &str) -> Result<(String, String), String> {
    let (column, value) =
        text.split_once('=').ok_or_else(|| format!("`{text}` has no `=`; write it as task=rte"))?;
    Ok((column.to_owned(), value.to_owned()))
}

impl ExperimentArguments {
    /// Reads and resolves all experiments before anything runs.
    pub(super) fn plans(&self) -> Result<Vec<Plan>, Error> {
        let options = PlanOptions { data: self.data.data.clone(), only: self.only.clone() };
        let plan = |path: &PathBuf| {
            let spec = ExperimentSpec::read(path, &self.overrides)?;
            Plan::resolve(&spec, path, &options).map_err(|error| match error {
                Error::Configuration(message) => {
                    Error::configuration(format!("{}: {message}", path.display()))
                }
                other => other,
            })
        };
        self.experiments.iter().map(plan).collect()
    }
}

/// Trains what is missing, then shows the comparison.
pub fn run(arguments: RunArguments) -> Result<ExitCode> {
    let device = arguments.compute.device()?;
    let plans = arguments.experiment.plans()?;
    let interrupted = stop_on_signals()?;
    let mut failed = false;
    for plan in &plans {
        let mut display = Display::new();
        let summary = Runner::new(plan, device, &interrupted, &mut |event| display.show(event)).run()?;
        display.finish();
        show_comparison(&plan.results)?;
        show(sentence(plan, &summary))?;
        failed |= summary.failed > 0;
        if summary.interrupted {
            return Ok(ExitCode::from(130));
        }
    }
    Ok(ExitCode::from(u8::from(failed)))
}

/// Shows what would run.
pub fn plan(arguments: PlanArguments) -> Result<ExitCode> {
    for plan in arguments.experiment.plans()? {
        let finished = match plan.results.exists() {
            true => ResultsFile::open(&plan.results)?.finished()?,
            false => Default::default(),
        };
        let to_do: Vec<_> = plan.runs.iter().filter(|run| !finished.contains(&run.id)).collect();
        for run in &to_do {
            show(format_args!(
                "{}  {}  {} steps  {}",
                run.id,
                run.model.name,
                run.total_steps(),
                run.label()
            ))?;
        }
        let steps: u64 = to_do.iter().map(|run| run.total_steps()).sum();
        show(format_args!(
            "{}: {} runs, {} finished, {} to do, {steps} optimizer steps; results in {}",
            plan.name,
            plan.runs.len(),
            plan.runs.len() - to_do.len(),
            to_do.len(),
            plan.results.display()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes Ctrl-C and a polite kill end the current run between two batches; a second Ctrl-C ends at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(interrupted)
}

fn show_comparison(path: &Path) -> Result<()> {
    let rows = results::read(path)?;
    if !rows.is_empty() {
        show(format_args!("\n{}", compare::compare(&rows).to_text()))?;
    }
    Ok(())
}

fn sentence(plan: &Plan, summary: &Summary) -> String {
    let mut parts = vec![format!("{} runs done", summary.ok)];
    for (count, what) in [
        (summary.failed, "diverged or failed (their rows say why)"),
        (summary.skipped, "were there already"),
        (summary.elsewhere, "left to another process at work on them"),
    ] {
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    }
    let again = if summary.interrupted { "; interrupted: the same command goes on from here" } else { "" };
    format!("{}: {}{again}\nresults: {}", plan.name, parts.join(", "), plan.results.display())
}
