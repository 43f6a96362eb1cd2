//! The weights that runs start from: pretrained ones, those of another run, those in a folder.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::entries::{ModelEntry, open_folder};
use super::results::{Row, Status, read};
use super::run::Run;
use super::stage_spec::{EarlierRuns, InitFrom};
use crate::error::{Error, Result};
use crate::model::{Labels, ModelFolder, ParameterPlace};
use crate::spelling::suggestion;
use crate::values::hexadecimal;

/// The weights that a run starts from.
#[derive(Clone)]
pub enum Start {
    /// Those of the pretrained model.
    Pretrained,
    /// Those that another run of the experiment ended with.
    Run(Arc<Run>),
    /// Those of a folder: of a model, or of a run of another experiment.
    Folder(Arc<StartFolder>),
}

/// A folder with weights to start from.
pub struct StartFolder {
    /// The opened folder.
    pub folder: ModelFolder,
    /// SHA-256 of its weights and its config.
    pub sha256: String,
    /// What made them, where that is known.
    pub source: Source,
}

/// Where the weights that a run starts from come from, as the results file names it; empty for pretrained ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The run that made them, or the first 16 characters of their SHA-256.
    pub run: String,
    /// The tasks they were trained on, in order, between `>`.
    pub task: String,
    /// The methods of those stages.
    pub method: String,
    /// The settings of the methods.
    pub method_config: String,
    /// The further settings of these stages ([`Row::settings`]), and how many examples they trained on.
    pub settings: String,
}

impl Source {
    /// Returns where weights come from that a further stage has trained, whose row tells of it. A stage without settings of
    /// its method keeps its place between the `>`.
    pub fn then(self, stage: &Row) -> Self {
        let is_first = self.method.is_empty();
        let joined = |earlier: &str, own: &str| match is_first {
            true => own.to_owned(),
            false => format!("{earlier}>{own}"),
        };
        // Of a folder of unknown making only its weights are known.
        let start = (is_first && !self.run.is_empty()).then(|| format!("start={}", self.run));
        let settings: Vec<&str> = start
            .as_deref()
            .into_iter()
            .chain([&*stage.method_config])
            .filter(|words| !words.is_empty())
            .collect();
        let examples = ("examples_train", stage.examples_train.to_string());
        let shared = stage.settings().into_iter().chain([examples]);
        let shared: Vec<String> = shared.map(|(name, value)| format!("{name}={value}")).collect();
        Self {
            run: stage.run.clone(),
            task: joined(&self.task, &stage.task),
            method: joined(&self.method, &stage.method),
            method_config: joined(&self.method_config, &settings.join(" ")),
            settings: joined(&self.settings, &shared.join(" ")),
        }
    }
}

/// What the runs of one model start from, each folder opened once.
pub struct Starts<'a> {
    init_from: Option<&'a InitFrom>,
    model: &'a ModelEntry,
    /// By seed, or by none where it is one folder for all.
    opened: HashMap<Option<u64>, Arc<StartFolder>>,
}

impl<'a> Starts<'a> {
    /// Makes the starts of a model's runs.
    pub fn new(init_from: Option<&'a InitFrom>, model: &'a ModelEntry) -> Self {
        Self { init_from, model, opened: HashMap::new() }
    }

    /// Returns what a run of a seed starts from.
    ///
    /// # Errors
    /// Fails, naming file and columns, if there is no such run or more than one, or its model was not kept.
    pub fn of(&mut self, seed: u64) -> Result<Start> {
        let Some(init_from) = self.init_from else { return Ok(Start::Pretrained) };
        let key = matches!(init_from, InitFrom::Results(_)).then_some(seed);
        if let Some(folder) = self.opened.get(&key) {
            return Ok(Start::Folder(folder.clone()));
        }
        let folder = Arc::new(start_folder(init_from, self.model, seed)?);
        self.opened.insert(key, folder.clone());
        Ok(Start::Folder(folder))
    }
}

fn start_folder(init_from: &InitFrom, model: &ModelEntry, seed: u64) -> Result<StartFolder> {
    let (path, source) = match init_from {
        InitFrom::Folder(path) => (path.clone(), Source::default()),
        InitFrom::Results(earlier) => earlier_run(earlier, model, seed)?,
    };
    let folder = open_folder(&path, &model.overrides).map_err(|error| match error {
        Error::Model { path, message } => Error::Model { path, message: format!("init_from: {message}") },
        other => other,
    })?;
    same_architecture(&folder, model)?;
    let weights = folder.sha256()?;
    let config = folder.config.to_json();
    let sha256 = hexadecimal(&Sha256::digest(format!("{weights} {config}")));
    let source = match source.run.is_empty() {
        true => Source { run: weights[..16].to_owned(), ..source },
        false => source,
    };
    Ok(StartFolder { folder, sha256, source })
}

/// Refuses to start from a model whose encoder has other parameters than the one that the experiment names.
fn same_architecture(folder: &ModelFolder, model: &ModelEntry) -> Result<()> {
    let encoder = |folder: &ModelFolder| -> Result<Vec<(String, Vec<i64>)>> {
        // By the config alone: one of them may lack the pooler.
        let table = folder.config.declare(Labels::Score.outputs())?.1;
        let encoder = table.iter().filter(|own| own.place != ParameterPlace::Head);
        Ok(encoder.map(|own| (own.name.clone(), own.shape.clone())).collect())
    };
    let (own, other) = (encoder(&model.folder)?, encoder(folder)?);
    let Some(foreign) = (0..own.len().max(other.len())).find(|&place| own.get(place) != other.get(place))
    else {
        return Ok(());
    };
    let words = |of: &[(String, Vec<i64>)]| {
        of.get(foreign).map_or("nothing".into(), |(name, shape)| format!("{name} {shape:?}"))
    };
    Err(Error::model(
        &folder.path,
        format!(
            "init_from: has another architecture than {}: {} where that has {}",
            model.name,
            words(&other),
            words(&own)
        ),
    ))
}

/// Finds the one run of another experiment that has this model and seed and the columns asked for.
fn earlier_run(earlier: &EarlierRuns, model: &ModelEntry, seed: u64) -> Result<(PathBuf, Source)> {
    let path = &earlier.results;
    let fault = |found: String, mend: &str| {
        let named = earlier.columns.iter().map(|(column, value)| format!("{column}={value}"));
        let columns: Vec<_> = named.chain([format!("seed={seed}")]).collect();
        Error::configuration(format!(
            "init_from: {}: {found} with {}{mend}",
            path.display(),
            columns.join(", ")
        ))
    };
    let of_file = |error: &dyn Display| Error::configuration(format!("init_from: {error}"));
    let rows = read(path).map_err(|error| of_file(&error))?;
    let unreadable = |error: csv::Error| of_file(&format!("{}: {error}", path.display()));
    let mut reader = csv::Reader::from_path(path).map_err(unreadable)?;
    let header = reader.headers().map_err(unreadable)?.clone();
    if let Some(column) = earlier.columns.keys().find(|column| !header.iter().any(|name| name == *column)) {
        let hint = suggestion(column, header.iter());
        return Err(of_file(&format!("{} has no column `{column}`{hint}", path.display())));
    }
    let mut found: BTreeMap<String, Source> = BTreeMap::new();
    for (row, fields) in rows.iter().zip(reader.deserialize::<BTreeMap<String, String>>()) {
        let fields = fields.map_err(unreadable)?;
        let get = |column: &str| fields.get(column).map(String::as_str).unwrap_or_default();
        let wanted = earlier.columns.iter().all(|(column, value)| value.is(get(column)))
            && (row.seed, &row.model_sha256) == (seed, &model.sha256)
            && row.status == Status::Ok;
        if wanted {
            let earlier = Source {
                run: row.source_run.clone(),
                task: row.source_task.clone(),
                method: row.source_method.clone(),
                method_config: row.source_config.clone(),
                settings: row.source_settings.clone(),
            };
            found.insert(row.run.clone(), earlier.then(row));
        }
    }
    match found.len() {
        0 => Err(fault(format!("no run of {} that ended ok", model.name), "")),
        1 => {
            let source = found.into_values().next().unwrap_or_default();
            Ok((earlier.models.join(&source.run), source))
        }
        count => {
            let runs: Vec<String> = found.into_keys().collect();
            Err(fault(format!("{count} runs ({})", runs.join(", ")), "; name further columns under `where:`"))
        }
    }
}
