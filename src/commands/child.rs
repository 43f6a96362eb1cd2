//! `child`: compute, inspect, overlap, variance.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use child_tuning::child::{Granularity, MaskFile, Overlap, Part, Uncertainty, overlaps, read_mask};
use child_tuning::error::Error;
use child_tuning::experiment::Runner;
use child_tuning::files::write_bytes;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use super::experiment::ExperimentArguments;
use super::progress::Display;
use super::table::table;
use super::{ComputeArguments, check_output, check_output_folder, show, tell};

#[derive(Args)]
pub struct ChildArguments {
    #[command(subcommand)]
    command: ChildCommand,
}

#[derive(Subcommand)]
enum ChildCommand {
    /// Compute the masks of an experiment's runs without training.
    #[command(after_help = "\
Examples:
  child-tuning child compute experiments/child_overlap.yaml --output masks")]
    Compute {
        #[command(flatten)]
        experiment: ExperimentArguments,
        #[command(flatten)]
        compute: ComputeArguments,
        /// Folder to write the masks to, as <run>.safetensors
        #[arg(long, value_name = "FOLDER")]
        output: PathBuf,
    },
    /// Show a mask: where it comes from, and how much of each layer it keeps.
    #[command(after_help = "\
Examples:
  child-tuning child inspect masks/5f6e94a1a1d8ba97.safetensors --tensors")]
    Inspect {
        /// Mask file
        #[arg(value_name = "MASK.safetensors")]
        mask: PathBuf,
        /// One line a tensor instead of one a layer
        #[arg(long)]
        tensors: bool,
    },
    /// Show how much masks have in common: |A ∩ B| / |A ∪ B|, |A ∩ B| / |A|, and what chance would give.
    #[command(after_help = "\
Examples:
  child-tuning child overlap masks/*.safetensors --output overlap.csv --by layer")]
    Overlap {
        /// Mask files of one model and scope
        #[arg(required = true, num_args = 2.., value_name = "MASK.safetensors")]
        masks: Vec<PathBuf>,
        /// CSV to write, one row for each ordered pair and part of the model
        #[arg(long, value_name = "FILE.csv")]
        output: Option<PathBuf>,
        /// Parts of the model in the CSV, besides the whole [default: layer]
        #[arg(long, value_name = "PARTS", requires = "output")]
        by: Option<By>,
    },
    /// Measure mean and variance of a step of SGD against Theorem 1, for vanilla and child_tuning_f. Trains nothing.
    ///
    /// Each draw is another batch and mask at the weights that a run starts from. Dropout, clipping, warm-up and weight
    /// decay are off for it, and passes are in float32.
    #[command(after_help = "\
Examples:
  child-tuning child variance experiments/theorem1.yaml --output theorem1.csv")]
    Variance {
        #[command(flatten)]
        experiment: ExperimentArguments,
        #[command(flatten)]
        compute: ComputeArguments,
        /// Steps to draw for each run
        #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(2..))]
        draws: u64,
        /// CSV to write, one row a run
        #[arg(long, value_name = "FILE.csv")]
        output: PathBuf,
    },
}

/// How finely overlaps are told apart.
#[derive(Clone, Copy, ValueEnum)]
enum By {
    /// Embeddings, encoder layers, pooler and head
    Layer,
    /// Tensors
    Tensor,
    /// The whole only
    All,
}

impl From<By> for Granularity {
    fn from(by: By) -> Self {
        match by {
            By::Layer => Granularity::Layer,
            By::Tensor => Granularity::Tensor,
            By::All => Granularity::All,
        }
    }
}

/// What tells the rows of measured steps apart.
#[derive(Serialize)]
struct MeasuredRun {
    run: String,
    task: String,
    method: String,
    method_config: String,
    seed: u64,
}

/// Calls the subcommand.
pub fn child(arguments: ChildArguments) -> Result<ExitCode> {
    match arguments.command {
        ChildCommand::Compute { experiment, compute, output } => {
            check_output_folder(&output)?;
            let device = compute.device()?;
            let never = AtomicBool::new(false);
            let mut shown = Ok(());
            for plan in experiment.plans_with_models()? {
                let mut display = Display::new();
                let masks = Runner::new(&plan, device, &never, &mut |event| display.show(event))
                    .compute_masks(&output)?;
                display.finish();
                for (mask, uncertainty) in &masks {
                    shown = shown.and_then(|()| show(mask.display()));
                    if let Some(uncertainty) = uncertainty {
                        let line = format!("  {}", uncertainty_line(uncertainty));
                        shown = shown.and_then(|()| show(line));
                    }
                }
                if masks.is_empty() {
                    tell(format_args!("{}: no method of this experiment has a fixed mask", plan.name));
                }
            }
            // That nobody reads any more must not keep the masks from being computed.
            shown?;
        }
        ChildCommand::Inspect { mask, tensors } => show(inspection(&read_mask(&mask)?, tensors))?,
        ChildCommand::Overlap { masks, output, by } => {
            if let Some(output) = &output {
                check_output(output, masks.iter().map(PathBuf::as_path))?;
            }
            let masks = masks.iter().map(|mask| read_mask(mask)).collect::<Result<Vec<_>, Error>>()?;
            let pairs = overlaps(&masks, by.unwrap_or(By::Layer).into())?;
            if let Some(output) = output {
                write_rows(&output, &pairs)?;
            }
            show(matrices(&pairs))?;
        }
        ChildCommand::Variance { experiment, compute, draws, output } => {
            check_output(&output, experiment.files())?;
            let device = compute.device()?;
            let never = AtomicBool::new(false);
            let plans = experiment.plans_with_models()?;
            let (mut rows, mut shown) = (Vec::new(), Ok(()));
            for plan in &plans {
                let mut display = Display::new();
                let measured = Runner::new(plan, device, &never, &mut |event| display.show(event))
                    .step_variances(draws)?;
                display.finish();
                for (run, variance) in measured {
                    let about = MeasuredRun {
                        run: run.id.clone(),
                        task: run.task.card.name.clone(),
                        method: run.method.name().to_owned(),
                        method_config: run.method.options(),
                        seed: run.seed,
                    };
                    let label = run.label();
                    let line = match (variance.ratio, variance.standard_error_of_ratio) {
                        (Some(ratio), Some(error)) => {
                            format!("{label}: variance {ratio:.4} ± {error:.4} of the predicted one")
                        }
                        _ if variance.predicted_variance > 0.0 => format!(
                            "{label}: the masks of {draws} draws keep too few weights to tell; take a larger p, or more --draws"
                        ),
                        _ => format!(
                            "{label}: no variance is predicted, since every step has all {} examples and no mask",
                            variance.examples
                        ),
                    };
                    shown = shown.and_then(|()| show(line));
                    rows.push((about, variance));
                }
            }
            write_rows(&output, &rows)?;
            shown?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a CSV with a row for each value.
fn write_rows<T: Serialize>(target: &Path, rows: &[T]) -> Result<()> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.iter().try_for_each(|row| writer.serialize(row))?;
    Ok(write_bytes(target, &writer.into_inner().context("cannot finish the CSV")?)?)
}

fn uncertainty_line(uncertainty: &Uncertainty) -> String {
    format!(
        "from {} of {} examples: total information ± {:.2} %, {:.2} % of the weights within a standard error of the \
         threshold",
        uncertainty.examples,
        uncertainty.available,
        100.0 * uncertainty.relative_standard_error,
        100.0 * uncertainty.undecided
    )
}

fn percent(part: usize, whole: usize) -> String {
    format!("{:.2} %", 100.0 * part as f64 / whole.max(1) as f64)
}

fn inspection(mask: &MaskFile, by_tensor: bool) -> String {
    let mut groups: BTreeMap<Part, (usize, usize)> = BTreeMap::new();
    let (mut kept, mut all) = (0, 0);
    for tensor in &mask.tensors {
        let part = if by_tensor { Part::Tensor(tensor.name.clone()) } else { Part::Place(tensor.place) };
        let group = groups.entry(part).or_default();
        let members = tensor.kept();
        *group = (group.0 + members, group.1 + tensor.count);
        (kept, all) = (kept + members, all + tensor.count);
    }
    let mut lines = Vec::new();
    for key in ["experiment", "run", "task", "method", "seed", "model_sha256", "sha256"] {
        if let Some(value) = mask.about.get(key) {
            lines.push(format!("{key:13} {value}"));
        }
    }
    let mut table = table(&["part", "weights", "in the child", "share"], 1..4);
    for (part, (members, size)) in groups {
        table.add_row([part.to_string(), size.to_string(), members.to_string(), percent(members, size)]);
    }
    table.add_row(["all".to_owned(), all.to_string(), kept.to_string(), percent(kept, all)]);
    lines.push(String::new());
    lines.push(table.trim_fmt());
    lines.join("\n")
}

/// Shows a matrix for each ratio of whole masks.
fn matrices(pairs: &[Overlap]) -> String {
    let whole: Vec<&Overlap> = pairs.iter().filter(|pair| pair.part == Part::All.to_string()).collect();
    // The pairs of the first mask come first, one with each mask.
    let names: Vec<&str> = whole
        .iter()
        .take_while(|pair| pair.first == whole[0].first)
        .map(|pair| pair.second.as_str())
        .collect();
    let matrix = |title: &str, value: fn(&Overlap) -> Option<f64>| {
        let header = [&[title], &names[..]].concat();
        let mut table = table(&header, 1..header.len());
        for row in whole.chunks(names.len()) {
            let cells = row.iter().map(|pair| match value(pair) {
                Some(ratio) => format!("{:.2} %", 100.0 * ratio),
                None => "-".into(),
            });
            table.add_row(std::iter::once(row[0].first.clone()).chain(cells));
        }
        table.trim_fmt()
    };
    [
        matrix("overlap: both / either", |pair| pair.overlap),
        matrix("by chance", |pair| pair.chance),
        matrix("both / row's", |pair| pair.intersection_share),
    ]
    .join("\n\n")
}
