//! `predict`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use child_tuning::data::{LabelMap, Objective, TaskCard, TokenEncoder, read_file};
use child_tuning::error::Error;
use child_tuning::files::write_bytes;
use child_tuning::hub::model_folder;
use child_tuning::model::{Classifier, Labels, ModelFolder, Precision};
use child_tuning::train::{first_not_finite, predict as predict_logits};
use clap::Args;
use tch::Tensor;

use super::{ComputeArguments, check_output, show, tell, tell_of_loading};

#[derive(Args)]
pub struct PredictArguments {
    /// Fine-tuned model folder, such as one kept with `save:`, or a model of the Hub that `model fetch` has fetched
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Task that the file belongs to: a name or a card file
    #[arg(long, value_name = "NAME|CARD.yaml")]
    task: String,
    /// File with examples, in any layout of the task; labels are not needed
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// CSV to write: one row an example, in the order of the input; `-` is standard output
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Longest example in tokens; longer ones are truncated
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_length: usize,
    /// Add the logits, one column a label in the task's order
    #[arg(long)]
    logits: bool,
    #[command(flatten)]
    compute: ComputeArguments,
}

/// Predicts and writes the CSV.
pub fn predict(arguments: PredictArguments) -> Result<ExitCode> {
    let device = arguments.compute.device()?;
    let (model, _) = model_folder(&arguments.model)?;
    let files = std::fs::read_dir(&model).into_iter().flatten().flatten().map(|entry| entry.path());
    let inputs: Vec<PathBuf> =
        [arguments.input.clone(), arguments.task.clone().into()].into_iter().chain(files).collect();
    if !is_standard_output(&arguments.output) {
        check_output(&arguments.output, inputs.iter().map(PathBuf::as_path))?;
    }
    let card = TaskCard::named(&arguments.task)?;
    // Every row of the input is to have an answer.
    let dataset = read_file(&TaskCard { allow_empty_text: true, ..card.clone() }, &arguments.input)?;
    let folder = ModelFolder::open(&model)?;
    let (classifier, labels) = Classifier::load_fine_tuned(&folder, &card, device)?;
    tell_of_loading(&arguments.model, &classifier.report);
    let encoder = TokenEncoder::from_folder(&model)?;
    Classifier::check_inputs(&folder.config, &encoder, card.is_pair(), arguments.max_length)?;
    let inputs = encoder.encode_dataset(&dataset.examples, arguments.max_length)?;
    let logits = predict_logits(&classifier, &inputs, Precision::Float32, |_| Ok(()))?;
    if let Some(example) = first_not_finite(&logits)? {
        return Err(Error::Diverged(format!(
            "{}: the model's outputs for example {example} are no finite numbers; its weights or config are at fault",
            arguments.model
        ))
        .into());
    }
    let logits = in_terms_of(&card, &labels, &logits)?;
    write(&arguments, &Labels::from(&card.objective), &logits)?;
    if !is_standard_output(&arguments.output) {
        tell(format_args!("{} predictions written to {}", inputs.len(), arguments.output.display()));
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns one column a label of the task; where several of the model's labels count as one, that of the likeliest.
fn in_terms_of(card: &TaskCard, labels: &LabelMap, logits: &Tensor) -> Result<Vec<Vec<f32>>, Error> {
    let rows: Vec<Vec<f32>> = Vec::try_from(logits)?;
    if card.objective == Objective::Regression {
        return Ok(rows);
    }
    let merged = |row: Vec<f32>| {
        let mut columns = vec![f32::NEG_INFINITY; labels.classes()];
        for (class, logit) in row.into_iter().enumerate() {
            let column = &mut columns[labels.predicted(class)];
            *column = column.max(logit);
        }
        columns
    };
    Ok(rows.into_iter().map(merged).collect())
}

fn is_standard_output(output: &Path) -> bool {
    ["-", "/dev/stdout"].iter().any(|name| output.as_os_str() == *name)
}

fn write(arguments: &PredictArguments, labels: &Labels, logits: &[Vec<f32>]) -> Result<()> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut header = vec!["index".to_owned(), "prediction".to_owned()];
    if arguments.logits {
        header.extend((0..labels.outputs()).map(|label| format!("logit_{label}")));
    }
    writer.write_record(&header)?;
    for (index, row) in logits.iter().enumerate() {
        let prediction = match labels {
            Labels::Classes(names) => names[highest(row)].clone(),
            Labels::Score => row[0].to_string(),
        };
        let mut record = vec![index.to_string(), prediction];
        if arguments.logits {
            record.extend(row.iter().map(f32::to_string));
        }
        writer.write_record(&record)?;
    }
    let text = writer.into_inner().context("cannot finish the CSV")?;
    match is_standard_output(&arguments.output) {
        true => show(String::from_utf8(text)?.trim_end()),
        false => Ok(write_bytes(&arguments.output, &text)?),
    }
}

/// The place of the highest value; among equals the first.
fn highest(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, column| if row[column] > row[best] { column } else { best })
}
