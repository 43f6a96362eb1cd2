//! `evaluate`.

use std::collections::HashSet;
use std::process::ExitCode;

use anyhow::{Context, Result};
use child_tuning::data::{EncodedDataset, Split, TaskCard, TokenEncoder, read_split};
use child_tuning::error::Error;
use child_tuning::hub::model_folder;
use child_tuning::model::{Classifier, ModelFolder, Precision};
use child_tuning::train::{Scored, evaluate as score};
use clap::Args;

use super::{ComputeArguments, DataArguments, show, tell_of_loading};

#[derive(Args)]
pub struct EvaluateArguments {
    /// Fine-tuned model folder, of this program or of transformers, or a model of the Hub that `model fetch` has fetched
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Tasks to score on: names or card files; labels are matched by name
    #[arg(long = "task", required = true, value_name = "NAME|CARD.yaml", value_delimiter = ',')]
    tasks: Vec<String>,
    /// Part of the data: train, dev or test; without it dev, or test where a task has no dev
    #[arg(long)]
    split: Option<Split>,
    /// Longest example in tokens; longer ones are truncated
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_length: usize,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    compute: ComputeArguments,
}

/// Scores a model as it is, and prints a CSV: one line a task and metric, those of a task as soon as it is scored.
pub fn evaluate(arguments: EvaluateArguments) -> Result<ExitCode> {
    let device = arguments.compute.device()?;
    let (model, _) = model_folder(&arguments.model)?;
    let folder = ModelFolder::open(&model)?;
    let encoder = TokenEncoder::from_folder(&model)?;
    let roots = arguments.data.roots()?;
    let mut notes = HashSet::new();
    let mut header = Some(["task", "split", "examples", "metric", "value"].map(str::to_owned));
    let cards = arguments.tasks.iter().map(|task| TaskCard::named(task)).collect::<Result<Vec<_>, _>>()?;
    // What is refused is refused before the first task is scored.
    for card in &cards {
        Classifier::labels_to_score(&folder, card)?;
    }
    for card in cards {
        let split = arguments.split.unwrap_or(card.scored_split());
        let dataset = read_split(&card, &roots, split)?;
        let (classifier, labels) = Classifier::load_fine_tuned(&folder, &card, device)?;
        if notes.insert(classifier.report.summary()) {
            tell_of_loading(&arguments.model, &classifier.report);
        }
        Classifier::check_inputs(&folder.config, &encoder, card.is_pair(), arguments.max_length)?;
        let inputs = encoder.encode_dataset(&dataset.examples, arguments.max_length)?;
        let data = EncodedDataset::new(inputs, &dataset.examples).map_err(|_| {
            Error::data(
                &dataset.path,
                0,
                "has no labels to score with; `child-tuning predict` writes predictions",
            )
        })?;
        let scored = Scored { data: &data, card: &card, labels: &labels };
        let evaluation = score(&classifier, scored, Precision::Float32, |_| Ok(()))?;
        if !evaluation.loss.is_finite() {
            return Err(Error::Diverged(format!(
                "{}: its loss on {} is no finite number, and so its scores would say nothing; its weights or config are at fault",
                arguments.model, card.name
            ))
            .into());
        }
        let scores = evaluation.scores.iter().map(|(metric, value)| (metric.to_string(), *value));
        let rows = scores.chain([("loss".to_owned(), evaluation.loss)]).map(|(measure, value)| {
            // As in the results file, what is undefined is an empty field.
            let value = if value.is_nan() { String::new() } else { value.to_string() };
            [card.name.clone(), split.to_string(), data.len().to_string(), measure, value]
        });
        show(csv_text(header.take().into_iter().chain(rows))?.trim_end())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn csv_text(records: impl Iterator<Item = [String; 5]>) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for record in records {
        writer.write_record(record)?;
    }
    Ok(String::from_utf8(writer.into_inner().context("cannot finish the CSV")?)?)
}
