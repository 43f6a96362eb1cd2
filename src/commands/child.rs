//! `child`: compute, inspect, overlap.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use child_tuning::child::{MaskFile, read_mask};
use child_tuning::error::Error;
use child_tuning::experiment::Runner;
use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};

use super::experiment::ExperimentArguments;
use super::progress::Display;
use super::{ComputeArguments, show};

#[derive(Args)]
pub struct ChildArguments {
    #[command(subcommand)]
    command: ChildCommand,
}

#[derive(Subcommand)]
enum ChildCommand {
    /// Compute the masks of an experiment's runs without training.
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
    Inspect {
        /// Mask file
        #[arg(value_name = "MASK.safetensors")]
        mask: PathBuf,
        /// One line a tensor instead of one a layer
        #[arg(long)]
        tensors: bool,
    },
    /// Show how much masks have in common: |A ∩ B| / |A ∪ B|, and what chance would give.
    Overlap {
        /// Mask files of one model and scope
        #[arg(required = true, num_args = 2.., value_name = "MASK.safetensors")]
        masks: Vec<PathBuf>,
    },
}

/// Calls the subcommand.
pub fn child(arguments: ChildArguments) -> Result<ExitCode> {
    match arguments.command {
        ChildCommand::Compute { experiment, compute, output } => {
            let device = compute.device()?;
            let never = AtomicBool::new(false);
            for plan in experiment.plans()? {
                let mut display = Display::new();
                let masks = Runner::new(&plan, device, &never, &mut |event| display.show(event))
                    .compute_masks(&output)?;
                display.finish();
                for mask in &masks {
                    show(mask.display())?;
                }
                if masks.is_empty() {
                    eprintln!("{}: no method of this experiment has a fixed mask", plan.name);
                }
            }
        }
        ChildCommand::Inspect { mask, tensors } => show(inspection(&read_mask(&mask)?, tensors))?,
        ChildCommand::Overlap { masks } => {
            let files = masks.iter().map(|mask| read_mask(mask)).collect::<Result<Vec<_>, Error>>()?;
            show(overlaps(&masks, &files)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(header: Vec<String>) -> Table {
    let mut table = Table::new();
    let columns = header.len();
    table.load_style(presets::NOTHING).set_header(header);
    for column in 1..columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn percent(part: usize, whole: usize) -> String {
    format!("{:.2} %", 100.0 * part as f64 / whole.max(1) as f64)
}

fn inspection(mask: &MaskFile, by_tensor: bool) -> String {
    let mut groups: BTreeMap<(usize, String), (usize, usize)> = BTreeMap::new();
    let (mut kept, mut all) = (0, 0);
    for (name, shape, bits) in &mask.tensors {
        let key = if by_tensor { (0, name.clone()) } else { layer_of(name) };
        let group = groups.entry(key).or_default();
        let (members, size) = (MaskFile::kept(bits), shape.iter().product::<i64>() as usize);
        *group = (group.0 + members, group.1 + size);
        (kept, all) = (kept + members, all + size);
    }
    let mut lines = Vec::new();
    for key in ["experiment", "run", "task", "method", "seed", "model_sha256", "sha256"] {
        if let Some(value) = mask.about.get(key) {
            lines.push(format!("{key:13} {value}"));
        }
    }
    let mut table = table(["part", "weights", "in the child", "share"].map(str::to_owned).to_vec());
    for ((_, name), (members, size)) in groups {
        table.add_row([name, size.to_string(), members.to_string(), percent(members, size)]);
    }
    table.add_row(["all".to_owned(), all.to_string(), kept.to_string(), percent(kept, all)]);
    lines.push(String::new());
    lines.push(table.to_string());
    lines.join("\n")
}

/// Names the part of the model that a tensor belongs to, with a number to sort by.
fn layer_of(name: &str) -> (usize, String) {
    let number: Option<usize> =
        name.split('.').skip_while(|part| *part != "layer").nth(1).and_then(|part| part.parse().ok());
    match number {
        Some(number) => (number + 1, format!("layer {number}")),
        None if name.contains("embeddings") => (0, "embeddings".into()),
        None => (usize::MAX, "pooler and head".into()),
    }
}

fn overlaps(paths: &[PathBuf], files: &[MaskFile]) -> Result<String, Error> {
    let names: Vec<String> = paths
        .iter()
        .zip(files)
        .map(|(path, file)| {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            file.about.get("task").map_or(stem.clone(), |task| format!("{task} {stem}"))
        })
        .collect();
    let mut table = table(["first", "second", "overlap", "by chance"].map(str::to_owned).to_vec());
    for left in 0..files.len() {
        for right in left + 1..files.len() {
            let (both, either, all) = common(&files[left], &files[right]).ok_or_else(|| {
                Error::configuration(format!(
                    "{} and {} belong to different models or scopes",
                    paths[left].display(),
                    paths[right].display()
                ))
            })?;
            let share = |file: &MaskFile| {
                file.tensors.iter().map(|(_, _, bits)| MaskFile::kept(bits)).sum::<usize>() as f64
                    / all as f64
            };
            let (a, b) = (share(&files[left]), share(&files[right]));
            let chance = format!("{:.2} %", 100.0 * a * b / (a + b - a * b));
            table.add_row([names[left].clone(), names[right].clone(), percent(both, either), chance]);
        }
    }
    Ok(table.to_string())
}

/// Counts the weights in both masks, in either, and in all; `None` if the masks do not match.
fn common(left: &MaskFile, right: &MaskFile) -> Option<(usize, usize, usize)> {
    if left.tensors.len() != right.tensors.len() {
        return None;
    }
    let (mut both, mut either, mut all) = (0, 0, 0);
    for ((name, shape, bits), (other_name, other_shape, other_bits)) in
        left.tensors.iter().zip(&right.tensors)
    {
        if name != other_name || shape != other_shape {
            return None;
        }
        for (left, right) in bits.iter().zip(other_bits) {
            both += (left & right).count_ones() as usize;
            either += (left | right).count_ones() as usize;
        }
        all += shape.iter().product::<i64>() as usize;
    }
    Some((both, either, all))
}
