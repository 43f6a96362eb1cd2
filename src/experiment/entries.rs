//! The models and data sets of an experiment, opened and checked, each of them once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::run::{Source, StartFolder};
use super::spec::TaskSpec;
use super::transfer::{EarlierRuns, EvaluationSpec, InitFrom};
use crate::data::{Dataset, LabelMap, Split, TaskCard, TokenEncoder, fetched_data_folder, read_split};
use crate::error::{Error, Result};
use crate::model::ModelFolder;
use crate::spelling::suggestion;
use crate::values::hexadecimal;

/// A pretrained model that runs start from.
pub struct ModelEntry {
    /// The name as typed.
    pub name: String,
    /// The opened folder.
    pub folder: ModelFolder,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// What makes tokens of texts.
    pub encoder: TokenEncoder,
    /// SHA-256 of the tokenizer's files.
    pub tokenizer_sha256: String,
    /// The keys of the config that the experiment overrides.
    pub overrides: Map<String, Value>,
}

impl ModelEntry {
    /// Opens the folder of a name, which may be in `models/`.
    ///
    /// # Errors
    /// Fails, naming the file, if something of it is missing or cannot be read.
    pub fn open(name: &str, overrides: &Map<String, Value>) -> Result<Self> {
        let beside = Path::new("models").join(name);
        let path = if !Path::new(name).exists() && beside.exists() { beside } else { PathBuf::from(name) };
        let folder = open_folder(&path, overrides)?;
        let encoder = TokenEncoder::from_folder(&path)?;
        let mut tokenizer = Sha256::new();
        for file in encoder.files() {
            tokenizer.update(std::fs::read(&file).map_err(Error::io("read", &file))?);
        }
        Ok(Self {
            name: name.to_owned(),
            sha256: folder.sha256(),
            folder,
            encoder,
            tokenizer_sha256: hexadecimal(&tokenizer.finalize()),
            overrides: overrides.clone(),
        })
    }
}

fn open_folder(path: &Path, overrides: &Map<String, Value>) -> Result<ModelFolder> {
    let mut folder = ModelFolder::open(path)?;
    folder.config = folder.config.with_overrides(overrides)?;
    folder.config.family()?;
    Ok(folder)
}

/// A task with the data that runs train on and are scored on.
pub struct TaskEntry {
    /// What the task is.
    pub card: Arc<TaskCard>,
    /// Training data.
    pub train: Arc<Dataset>,
    /// Data that runs are scored on.
    pub dev: Arc<Dataset>,
}

/// A data set that a run is scored on.
#[derive(Clone)]
pub struct Evaluated {
    /// Its task.
    pub card: Arc<TaskCard>,
    /// The part of it.
    pub split: Split,
    /// The examples.
    pub dataset: Arc<Dataset>,
    /// How the classes of the run's task compare with it.
    pub labels: LabelMap,
}

/// Finds tasks and reads their data, each split once.
pub struct Library {
    base: PathBuf,
    roots: Vec<PathBuf>,
    splits: Vec<(Arc<TaskCard>, Split, Arc<Dataset>)>,
}

impl Library {
    /// Makes a library that looks for card files in the folder `base` first, and for data sets in `roots`.
    pub fn new(base: &Path, roots: Vec<PathBuf>) -> Self {
        Self { base: base.to_owned(), roots, splits: Vec::new() }
    }

    /// Opens a task to train on.
    ///
    /// # Errors
    /// Fails, naming file and place, if the task is not known or its data cannot be read.
    pub fn task(&mut self, spec: &TaskSpec) -> Result<TaskEntry> {
        let card = self.card(spec)?;
        let (card, train) = self.split(card, Split::Train)?;
        let (card, dev) = self.split(card.as_ref().clone(), Split::Dev)?;
        Ok(TaskEntry { card, train, dev })
    }

    /// Opens what runs of a task are scored on: its own dev split, and what the experiment lists besides.
    ///
    /// # Errors
    /// Fails if data cannot be read or have no labels, or if the task's labels cannot be compared with theirs.
    pub fn evaluations(&mut self, task: &TaskEntry, further: &[EvaluationSpec]) -> Result<Arc<[Evaluated]>> {
        let own = Evaluated {
            card: task.card.clone(),
            split: Split::Dev,
            dataset: task.dev.clone(),
            labels: LabelMap::between(&task.card, &task.card)?,
        };
        let mut all = vec![own];
        for spec in further {
            let (card, dataset) = self.split(self.card(&spec.task)?, spec.split)?;
            if all.iter().any(|other| other.card.name == card.name && other.split == spec.split) {
                continue;
            }
            if dataset.examples.iter().any(|example| example.label.is_none()) {
                return Err(Error::configuration(format!(
                    "evaluate: the {} split of `{}` has no labels to score with; `child-tuning predict` writes predictions",
                    spec.split, card.name
                )));
            }
            let labels = LabelMap::between(&task.card, &card)?;
            all.push(Evaluated { card, split: spec.split, dataset, labels });
        }
        Ok(all.into())
    }

    fn card(&self, spec: &TaskSpec) -> Result<TaskCard> {
        match spec {
            TaskSpec::Custom(custom) => custom.as_ref().clone().into_card(&self.base),
            TaskSpec::Named(name) => named_card(name, &self.base),
        }
    }

    fn split(&mut self, card: TaskCard, split: Split) -> Result<(Arc<TaskCard>, Arc<Dataset>)> {
        let known = self.splits.iter().find(|(other, of, _)| **other == card && *of == split);
        if let Some((card, _, dataset)) = known {
            return Ok((card.clone(), dataset.clone()));
        }
        let dataset = Arc::new(read_split(&card, &self.roots, split)?);
        let card = Arc::new(card);
        self.splits.push((card.clone(), split, dataset.clone()));
        Ok((card, dataset))
    }
}

/// Returns where data sets are looked for, in order: the folders of the command line, those of the experiment, the
/// folder `data`, and what was downloaded.
pub fn data_roots(first: &[PathBuf], then: &[PathBuf]) -> Vec<PathBuf> {
    let own = first.iter().chain(then).cloned().chain([PathBuf::from("data")]);
    own.chain(fetched_data_folder()).collect()
}

/// Finds a task by its built-in name, or by its card file beside the experiment or in the working folder.
///
/// # Errors
/// Fails, with the nearest known name, if there is neither.
pub fn named_card(name: &str, base: &Path) -> Result<TaskCard> {
    if let Some(card) = TaskCard::builtin(name) {
        return Ok(card);
    }
    if name.ends_with(".yaml") || name.ends_with(".yml") {
        let beside = base.join(name);
        return TaskCard::load(if beside.exists() { &beside } else { Path::new(name) });
    }
    let known = TaskCard::builtin_names();
    Err(Error::configuration(format!(
        "unknown task `{name}`{}; known are {}, and files of your own that end in .yaml",
        suggestion(name, known.iter().copied()),
        known.join(", ")
    )))
}

/// Opens the weights that `init_from` names for runs of a model and seed.
///
/// # Errors
/// Fails, naming file and columns, if there is no such run or more than one, or its model was not kept.
pub fn start_folder(init_from: &InitFrom, model: &ModelEntry, seed: u64) -> Result<StartFolder> {
    let (path, source) = match init_from {
        InitFrom::Folder(path) => (path.clone(), Source::default()),
        InitFrom::Results(earlier) => earlier_run(earlier, model, seed)?,
    };
    let folder = open_folder(&path, &model.overrides).map_err(|error| match error {
        Error::Model { path, message } => Error::Model { path, message: format!("init_from: {message}") },
        other => other,
    })?;
    let sha256 = folder.sha256();
    let source = if source.run.is_empty() { Source { run: sha256[..16].to_owned(), ..source } } else { source };
    Ok(StartFolder { folder, sha256, source })
}

/// Finds the one run of another experiment that has this model and seed and the columns asked for.
fn earlier_run(earlier: &EarlierRuns, model: &ModelEntry, seed: u64) -> Result<(PathBuf, Source)> {
    let path = &earlier.results;
    let fault = |message: String| {
        let mut columns = earlier.columns.clone();
        columns.insert("seed".into(), seed.to_string());
        let columns: Vec<_> = columns.iter().map(|(column, value)| format!("{column}={value}")).collect();
        Error::configuration(format!(
            "init_from: {}: {message} with {}",
            path.display(),
            columns.join(", ")
        ))
    };
    let unreadable =
        |error: csv::Error| Error::configuration(format!("init_from: {}: {error}", path.display()));
    let mut reader = csv::Reader::from_path(path).map_err(unreadable)?;
    let header = reader.headers().map_err(unreadable)?.clone();
    if let Some(column) = earlier.columns.keys().find(|column| !header.iter().any(|name| name == *column)) {
        let hint = suggestion(column, header.iter());
        return Err(Error::configuration(format!("init_from: {} has no column `{column}`{hint}", path.display())));
    }
    let mut found: BTreeMap<String, Source> = BTreeMap::new();
    for row in reader.deserialize::<BTreeMap<String, String>>() {
        let row = row.map_err(unreadable)?;
        let get = |column: &str| row.get(column).map(String::as_str).unwrap_or_default();
        let wanted = earlier.columns.iter().all(|(column, value)| get(column) == value)
            && get("seed") == seed.to_string()
            && get("model_sha256") == model.sha256
            && get("status") == "ok";
        if wanted {
            let source = Source {
                run: get("run").to_owned(),
                task: get("task").to_owned(),
                method: get("method").to_owned(),
                method_config: get("method_config").to_owned(),
            };
            found.insert(source.run.clone(), source);
        }
    }
    match found.len() {
        0 => Err(fault(format!("no run of {} that ended ok", model.name))),
        1 => {
            let source = found.into_values().next().unwrap_or_default();
            Ok((earlier.models.join(&source.run), source))
        }
        count => Err(fault(format!(
            "{count} runs ({}); name further columns under `where:`",
            found.into_keys().collect::<Vec<_>>().join(", ")
        ))),
    }
}
