//! `export`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::data::TokenEncoder;
use child_tuning::error::Error;
use child_tuning::hub::model_folder;
use child_tuning::model::{Classifier, HeadStart, ModelFolder};
use clap::Args;
use tch::Device;

use super::model_inspect::{head_labels, lines_of};
use super::{check_output_folder, tell};

#[derive(Args)]
pub struct ExportArguments {
    /// Model folder, in any form that this program reads, or a model of the Hub that `model fetch` has fetched
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Folder to write
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
    /// Task that the head is for; without it, the labels in the model's config.json
    #[arg(long, value_name = "NAME|CARD.yaml")]
    task: Option<String>,
    /// Seed of the parts that the model folder lacks, such as a new head
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Reads a model and writes it as transformers would.
pub fn export(arguments: ExportArguments) -> Result<ExitCode> {
    check_output_folder(&arguments.output)?;
    let (model, _) = model_folder(&arguments.model)?;
    if arguments.output.exists() && same_folder(&model, &arguments.output) {
        return Err(Error::configuration("--output is the folder of --model; name another one").into());
    }
    let folder = ModelFolder::open(&model)?;
    let labels = head_labels(&folder, arguments.task.as_deref())?.ok_or_else(|| {
        Error::model(&model, "has no labels in config.json; name the task of the head with --task")
    })?;
    let encoder = TokenEncoder::from_folder(&model)?;
    let mut classifier = Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu)?;
    classifier.reset(arguments.seed)?;
    let replaces = ModelFolder::open(&arguments.output).is_ok();
    classifier.save(&arguments.output, &encoder)?;
    for line in lines_of(&classifier.report, "new, from the seed") {
        tell(line);
    }
    let replaced = if replaces { ", in place of the model that was there" } else { "" };
    tell(format_args!("{} written{replaced}", arguments.output.display()));
    Ok(ExitCode::SUCCESS)
}

fn same_folder(left: &Path, right: &Path) -> bool {
    matches!((left.canonicalize(), right.canonicalize()), (Ok(left), Ok(right)) if left == right)
}
