//! The subcommands: argument handling only; the work is the library's.

mod child;
mod compare;
mod costs;
mod data;
mod doctor;
mod evaluate;
mod experiment;
mod export;
mod gpu_check;
mod jobs;
mod model;
mod model_inspect;
mod predict;
mod progress;
mod report;
mod signals;
mod table;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use child_tuning::data::data_roots;
use child_tuning::error::Error;
use child_tuning::experiment::results::is_results_file;
use child_tuning::files::folder_of;
use child_tuning::libtorch::use_threads;
use child_tuning::model::LoadReport;
use clap::{Args, Parser, Subcommand};
use tch::{Cuda, Device};

/// Fine-tune pretrained text encoders by training only a child network, and compare methods over many seeds.
///
/// An experiment is a YAML file: models × tasks × methods × hyper-parameters × seeds. `run` trains what its results
/// file does not have yet, so a stopped experiment goes on with the same command; `compare` shows what came out.
#[derive(Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 done, 1 some runs failed, 2 usage or configuration, 3 environment, 130 interrupted.

Examples:
  child-tuning data fetch cola rte mrpc stsb
  child-tuning model fetch bert-large-cased
  child-tuning plan experiments/quickstart.yaml
  child-tuning run experiments/glue.yaml --device cuda --set train.learning_rate='[2e-5, 4e-5]'
  child-tuning run experiments/glue.yaml --only task=rte --only method=vanilla
  child-tuning compare results/glue.csv
  child-tuning report results/glue.csv --output report"
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train the runs that are missing from the experiments' results files.
    #[command(after_help = "\
Examples:
  child-tuning run experiments/quickstart.yaml --jobs auto
  child-tuning run experiments/glue.yaml --device cuda --only task=rte,seed=42
  child-tuning run experiments/glue.yaml --set model=models/minilm-l6 --set train.epochs=1")]
    Run(experiment::RunArguments),
    /// Show what `run` would do: runs, steps, what is finished. Trains nothing.
    #[command(after_help = "\
Examples:
  child-tuning plan experiments/quickstart.yaml
  child-tuning plan experiments/glue.yaml --device cuda --only task=rte --jobs 4")]
    Plan(experiment::PlanArguments),
    /// Show mean, spread, best and failures per task and method of result files.
    #[command(after_help = "\
Examples:
  child-tuning compare results/glue.csv
  child-tuning compare results/glue.csv results/prior_methods.csv --format markdown")]
    Compare(compare::CompareArguments),
    /// Write a report of result files: tables, figures, costs, failures and where the numbers come from.
    #[command(after_help = "\
Examples:
  child-tuning report results/glue.csv --output report")]
    Report(report::ReportArguments),
    /// Score a fine-tuned model, as it is, on data sets.
    #[command(after_help = "\
Prints a CSV: task,split,examples,metric,value.

Examples:
  child-tuning evaluate --model results/models/bb859e4112612e5a --task rte
  child-tuning evaluate --model MODEL --task snli,scitail,sick --data ~/data")]
    Evaluate(evaluate::EvaluateArguments),
    /// Predict the examples of a file with a fine-tuned model.
    #[command(after_help = "\
The columns are index and prediction, and with --logits one logit_<k> for each label.

Examples:
  child-tuning predict --model results/models/bb859e4112612e5a --task rte --input data/RTE/test.tsv --output predictions.csv
  child-tuning predict --model MODEL --task claims.yaml --input claims.csv --output predictions.csv --logits")]
    Predict(predict::PredictArguments),
    /// Compute, inspect and compare child networks (masks).
    Child(child::ChildArguments),
    /// List, fetch and check data sets.
    Data(data::DataCommandArguments),
    /// Fetch and list models of the Hugging Face Hub, and inspect model folders.
    Model(model::ModelArguments),
    /// Write a model folder, head included, in the form that transformers loads.
    #[command(after_help = "\
A model that is in the folder already is replaced.

Examples:
  child-tuning export --model bert-base-cased --task rte --output rte-start")]
    Export(export::ExportArguments),
    /// Show what is installed here (libtorch, CUDA, data, models) and what to do about what is not.
    Doctor(doctor::DoctorArguments),
    /// Compare a GPU with the CPU, measure its speed, and write a report.
    GpuCheck(gpu_check::GpuCheckArguments),
}

impl Arguments {
    /// Returns whether the command computes with libtorch, so that it is worth a second start of the program with another
    /// environment.
    pub fn computes(&self) -> bool {
        !matches!(
            self.command,
            Command::Compare(_)
                | Command::Report(_)
                | Command::Data(_)
                | Command::Model(_)
                | Command::Doctor(_)
        )
    }
}

/// Writes a line to standard output; an error instead of a panic where nobody reads it any more.
pub fn show(text: impl Display) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot write to standard output")
}

/// Writes a line to standard error. That nobody reads it, or a full disk takes no more of it, must not end what it tells of.
pub fn tell(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Tells what of a model folder's weights was left out, and what was assumed of its head.
fn tell_of_loading(model: &str, report: &LoadReport) {
    if let Some(summary) = report.summary() {
        tell(format_args!("note: {model}: {summary}"));
    }
}

/// Returns whether an error is that nobody reads the output any more.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Refuses, before anything is computed, to write over one of the inputs, over the results of runs, or into a folder that is not
/// there.
fn check_output<'p>(output: &Path, inputs: impl IntoIterator<Item = &'p Path>) -> Result<(), Error> {
    if output.as_os_str() == "-" {
        return Err(Error::configuration("--output -: standard output has the rest already; name a file"));
    }
    // A shell has led a stream to a file, which may hold more than what comes now.
    let is_stream = ["/dev/stdout", "/dev/stderr", "/dev/fd", "/proc/self/fd"]
        .iter()
        .any(|name| output.starts_with(name));
    if is_stream && output.is_file() {
        return Err(Error::configuration(format!(
            "--output {} leads to a file and would be written over it; name the file itself",
            output.display()
        )));
    }
    let real = |path: &Path| path.canonicalize().ok();
    if let Some(file) = real(output).filter(|output| output.is_file())
        && let Some(input) = inputs.into_iter().find(|input| real(input).as_ref() == Some(&file))
    {
        return Err(Error::configuration(format!(
            "--output {} is the input {}; name another file",
            output.display(),
            input.display()
        )));
    }
    if is_results_file(output) {
        return Err(Error::configuration(format!(
            "--output {} holds the results of runs; name another file",
            output.display()
        )));
    }
    let folder = folder_of(output);
    match folder.is_dir() {
        true => Ok(()),
        false => Err(Error::Environment(format!("there is no folder {} to write to", folder.display()))),
    }
}

/// Refuses, before anything is computed, what is no folder to write to.
fn check_output_folder(output: &Path) -> Result<(), Error> {
    match output.exists() && !output.is_dir() {
        true => Err(Error::configuration(format!("--output {} is a file; name a folder", output.display()))),
        false => Ok(()),
    }
}

/// Calls the command that was asked for.
pub fn call(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Run(arguments) => experiment::run(arguments),
        Command::Plan(arguments) => experiment::plan(arguments),
        Command::Compare(arguments) => compare::compare(arguments),
        Command::Report(arguments) => report::report(arguments),
        Command::Evaluate(arguments) => evaluate::evaluate(arguments),
        Command::Predict(arguments) => predict::predict(arguments),
        Command::Child(arguments) => child::child(arguments),
        Command::Data(arguments) => data::data(arguments),
        Command::Model(arguments) => model::model(arguments),
        Command::Export(arguments) => export::export(arguments),
        Command::Doctor(arguments) => doctor::doctor(arguments),
        Command::GpuCheck(arguments) => gpu_check::gpu_check(arguments),
    }
}

/// Where and with how many threads to compute.
#[derive(Args)]
pub struct ComputeArguments {
    /// Device: cpu, cuda, or cuda:1
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    device: String,
    /// Threads to compute with on the CPU [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ComputeArguments {
    /// Settles the device and sets up the thread pools.
    fn device(&self) -> Result<Device, Error> {
        let device = device_named(&self.device)?;
        use_threads(self.threads.map(usize::from), device);
        Ok(device)
    }
}

/// Settles which device a name means.
fn device_named(name: &str) -> Result<Device, Error> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|index| index.parse().ok()),
    };
    let index: usize = index
        .ok_or_else(|| Error::configuration(format!("unknown device `{name}`; use cpu, cuda, or cuda:1")))?;
    let devices = Cuda::device_count().max(0) as usize;
    if index < devices {
        return Ok(Device::Cuda(index));
    }
    Err(Error::Environment(match devices {
        0 => "no CUDA device is usable here; leave --device out to run on the CPU (`make experiment` does), and see \
              `child-tuning doctor` for what is missing"
            .into(),
        _ => format!("there is no cuda:{index}; the CUDA devices of this machine are 0 to {}", devices - 1),
    }))
}

/// Folders with data sets.
#[derive(Args)]
pub struct DataArguments {
    /// Folder with data sets, searched before those of an experiment, `data/` and what was fetched; may be repeated [env:
    /// DATA]
    #[arg(long = "data", value_name = "FOLDER")]
    data: Vec<PathBuf>,
}

impl DataArguments {
    /// Returns where data sets are looked for outside experiments.
    fn roots(&self) -> Result<Vec<PathBuf>, Error> {
        data_roots(&self.folders(), &[])
    }

    /// Returns the folders of the command line; without any, that of the environment, unless it is empty.
    fn folders(&self) -> Vec<PathBuf> {
        let of_environment = || std::env::var_os("DATA").filter(|folder| !folder.is_empty());
        match self.data.is_empty() {
            true => of_environment().map(PathBuf::from).into_iter().collect(),
            false => self.data.clone(),
        }
    }
}
