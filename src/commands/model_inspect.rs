//! `model inspect`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use child_tuning::child::{MaskScope, Part};
use child_tuning::data::{TaskCard, TokenEncoder};
use child_tuning::error::Error;
use child_tuning::hub::model_folder;
use child_tuning::model::{Classifier, HeadStart, Labels, LoadReport, ModelFolder, Parameter};
use child_tuning::spelling::visible;
use child_tuning::values::yaml_name;
use clap::Args;
use tch::Device;

use super::show;
use super::table::table;

#[derive(Args)]
pub struct InspectArguments {
    /// Model folder, or a model of the Hub that `model fetch` has fetched
    #[arg(value_name = "MODEL")]
    model: String,
    /// Task that the head is for; without it, the labels in the model's config.json, or else two
    #[arg(long, value_name = "NAME|CARD.yaml")]
    task: Option<String>,
    /// One line a tensor instead of one a part of the model
    #[arg(long)]
    tensors: bool,
}

/// The tokens of an example of one word.
const SHORTEST: usize = 3;

/// Loads a model as a run would, and shows what it is made of and what did not fit.
pub fn inspect(arguments: InspectArguments) -> Result<ExitCode> {
    let (path, commit) = model_folder(&arguments.model)?;
    let folder = ModelFolder::open(&path)?;
    let labels = head_labels(&folder, arguments.task.as_deref())?;
    let labels = labels.unwrap_or_else(|| Labels::Classes(vec!["LABEL_0".into(), "LABEL_1".into()]));
    let encoder = TokenEncoder::from_folder(&path)?;
    Classifier::check_inputs(&folder.config, &encoder, false, SHORTEST)?;
    let shape = Classifier::shape(&folder.config, &labels)?;
    let classifier = Classifier::load(&folder, labels, HeadStart::Keep, Device::Cpu)?;
    let (parameters, report) = (classifier.parameters.declared(), &classifier.report);

    let mut facts = vec![("folder", path.display().to_string())];
    facts.extend(commit.map(|commit| ("commit", commit)));
    facts.extend([
        ("family", folder.config.text_or("model_type", "bert")?.to_owned()),
        (
            "sizes",
            format!(
                "{} layers, hidden {}, feed-forward {}, {} heads",
                shape.layers, shape.hidden, shape.intermediate, shape.heads
            ),
        ),
        ("tokenizer", format!("{} tokens", encoder.vocabulary_size())),
        ("labels", described(classifier.labels())),
        ("sha256", folder.sha256()?),
    ]);
    for (name, value) in facts {
        show(format_args!("{name:13} {value}"))?;
    }
    for line in lines_of(report, "new") {
        show(line)?;
    }
    show(format_args!("\n{}\n\n{}", parts(parameters, arguments.tensors), scopes(parameters)))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns what the head of a model is for: a task's labels, or else those in its config, if it has any.
pub fn head_labels(folder: &ModelFolder, task: Option<&str>) -> Result<Option<Labels>, Error> {
    if let Some(task) = task {
        return Ok(Some(Labels::from(&TaskCard::named(task)?.objective)));
    }
    Ok(folder.config.labels()?.map(|names| match names.len() {
        0 | 1 => Labels::Score,
        _ => Labels::Classes(names),
    }))
}

/// Says what became of the tensors of a checkpoint, and what was assumed of its head: a line each; `new` is said of fresh ones.
pub fn lines_of(report: &LoadReport, new: &str) -> Vec<String> {
    let tensors = [
        (new, &report.fresh),
        ("left out, not used by the model", &report.unexpected),
        ("left out, of pretraining", &report.ignored),
    ];
    let tensors = tensors.into_iter().filter(|(_, names)| !names.is_empty());
    let tensors = tensors.map(|(what, names)| format!("{what}: {}", printable(names)));
    tensors.chain(report.assumption().map(|text| format!("note: the model {}", visible(&text)))).collect()
}

/// Joins names that a stranger's file may hold, which must not reach the terminal as they are.
fn printable(names: &[String]) -> String {
    visible(&names.join(", "))
}

fn described(labels: &Labels) -> String {
    match labels {
        Labels::Classes(names) => printable(names),
        Labels::Score => "one number".to_owned(),
    }
}

/// Shows the parts of the model, from the input to the output.
fn parts(parameters: &[Parameter], by_tensor: bool) -> String {
    let header = if by_tensor { ["tensor", "shape", "weights"] } else { ["part", "tensors", "weights"] };
    let mut table = table(&header, 1..3);
    if by_tensor {
        for parameter in parameters {
            let shape: Vec<String> = parameter.shape.iter().map(i64::to_string).collect();
            table.add_row([parameter.name.clone(), shape.join(" × "), parameter.count().to_string()]);
        }
    } else {
        let mut groups: BTreeMap<Part, (usize, usize)> = BTreeMap::new();
        for parameter in parameters {
            let group = groups.entry(Part::Place(parameter.place)).or_default();
            *group = (group.0 + 1, group.1 + parameter.count());
        }
        for (part, (tensors, weights)) in groups {
            table.add_row([part.to_string(), tensors.to_string(), weights.to_string()]);
        }
    }
    let all: usize = parameters.iter().map(Parameter::count).sum();
    let tensors = if by_tensor { String::new() } else { parameters.len().to_string() };
    table.add_row(["all".to_owned(), tensors, all.to_string()]);
    table.trim_fmt()
}

/// Shows how many weights each scope of a mask reaches: what the p of a child network is a share of.
fn scopes(parameters: &[Parameter]) -> String {
    let mut table = table(&["scope of a mask", "weights"], 1..2);
    for scope in MaskScope::ALL {
        let reached = parameters.iter().filter(|parameter| scope.covers(parameter));
        table.add_row([yaml_name(&scope), reached.map(Parameter::count).sum::<usize>().to_string()]);
    }
    table.trim_fmt()
}
