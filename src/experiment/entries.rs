//! The models and data sets of an experiment, opened and checked, each of them once.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::spec::TaskSpec;
use super::stage_spec::EvaluationSpec;
use crate::data::{Dataset, LabelMap, Split, TaskCard, TokenEncoder, read_split, roots_of_training, subset};
use crate::error::{Error, Result};
use crate::hub::model_folder;
use crate::model::ModelFolder;
use crate::random::{Key, Purpose};
use crate::values::hexadecimal;

/// A pretrained model that runs start from.
pub struct ModelEntry {
    /// The name as typed.
    pub name: String,
    /// The opened folder.
    pub folder: ModelFolder,
    /// SHA-256 of its weights.
    pub sha256: String,
    /// The commit that it is, if it is a model of the Hub.
    pub revision: Option<String>,
    /// What makes tokens of texts.
    pub encoder: TokenEncoder,
    /// SHA-256 of the tokenizer's files.
    pub tokenizer_sha256: String,
    /// The keys of the config that the experiment overrides.
    pub overrides: Map<String, Value>,
}

impl ModelEntry {
    /// Opens the folder of a name, which may be in `models/`, or a model of the Hub that is in its cache.
    ///
    /// # Errors
    /// Fails, naming the file, if something of it is missing or cannot be read.
    pub fn open(name: &str, overrides: &Map<String, Value>) -> Result<Self> {
        let (path, revision) = model_folder(name)?;
        let folder = open_folder(&path, overrides)?;
        let encoder = TokenEncoder::from_folder(&path)?;
        let mut tokenizer = Sha256::new();
        for file in encoder.files() {
            tokenizer.update(std::fs::read(&file).map_err(Error::io("read", &file))?);
        }
        Ok(Self {
            name: name.to_owned(),
            sha256: folder.sha256()?,
            revision,
            folder,
            encoder,
            tokenizer_sha256: hexadecimal(&tokenizer.finalize()),
            overrides: overrides.clone(),
        })
    }

    /// Says where the model comes from, if that is the Hub.
    pub fn note(&self) -> Option<String> {
        let commit = self.revision.as_ref()?;
        Some(format!("{} is commit {commit} in the Hugging Face cache", self.name))
    }
}

/// Opens a model folder of a family that runs here, with the experiment's overrides of its config.
pub(super) fn open_folder(path: &Path, overrides: &Map<String, Value>) -> Result<ModelFolder> {
    let mut folder = ModelFolder::open(path)?;
    folder.config = folder.config.with_overrides(overrides)?;
    folder.config.family()?;
    Ok(folder)
}

/// A part of a data set.
pub struct SplitEntry {
    /// Its task.
    pub card: Arc<TaskCard>,
    /// Which part.
    pub split: Split,
    /// The examples.
    pub dataset: Arc<Dataset>,
    /// SHA-256 of the examples, whatever files they come from.
    pub sha256: String,
}

impl SplitEntry {
    fn new(card: Arc<TaskCard>, split: Split, dataset: Dataset) -> Arc<Self> {
        let sha256 = dataset.examples_sha256();
        Arc::new(Self { card, split, dataset: Arc::new(dataset), sha256 })
    }

    /// Returns some of the examples, in their order.
    fn part(&self, kept: impl Fn(usize) -> bool) -> Arc<Self> {
        let examples = self.dataset.examples.iter().enumerate();
        let examples =
            examples.filter(|(number, _)| kept(*number)).map(|(_, example)| example.clone()).collect();
        let dataset = Dataset { examples, dropped: 0, path: self.dataset.path.clone() };
        Self::new(self.card.clone(), self.split, dataset)
    }
}

/// A task with the data that runs train on and are scored on.
pub struct TaskEntry {
    /// What the task is.
    pub card: Arc<TaskCard>,
    /// Training data.
    pub train: Arc<SplitEntry>,
    /// Data that runs are scored on.
    pub dev: Arc<SplitEntry>,
}

impl TaskEntry {
    /// Returns the task with a share of the training data in the place of dev, and the rest to train on. The share is random,
    /// with each class in its proportion, and the same for all runs.
    ///
    /// # Errors
    /// Fails if there are fewer than two training examples.
    pub fn with_held_out(&self, share: f64) -> Result<Self> {
        let examples = &self.train.dataset.examples;
        let most = examples.len().saturating_sub(1);
        if most == 0 {
            return Err(Error::configuration(format!(
                "select: `{}` has too few training examples to hold some out",
                self.card.name
            )));
        }
        let count = ((share * examples.len() as f64).round() as usize).clamp(1, most);
        let held_out = subset(examples, count, Key::derive(0, Purpose::HeldOut, 0));
        let is_held_out = |number: usize| held_out.binary_search(&number).is_ok();
        let (train, dev) = (self.train.part(|number| !is_held_out(number)), self.train.part(is_held_out));
        Ok(Self { card: self.card.clone(), train, dev })
    }

    /// Returns its own dev data, as a run is scored on them.
    ///
    /// # Errors
    /// Fails if the labels of the task cannot be compared with themselves.
    pub fn own_evaluation(&self) -> Result<Evaluated> {
        Ok(Evaluated::new(self.dev.clone(), LabelMap::between(&self.card, &self.card)?))
    }
}

/// A data set that a run is scored on.
#[derive(Clone)]
pub struct Evaluated {
    /// The examples and their task.
    pub on: Arc<SplitEntry>,
    /// How the classes of the run's task compare with it.
    pub labels: LabelMap,
    /// SHA-256 of the examples; with it of what else decides the scores, where they are not those that the program's own card of
    /// the data gives to a model of the same labels.
    pub sha256: String,
}

impl Evaluated {
    fn new(on: Arc<SplitEntry>, labels: LabelMap) -> Self {
        let card = &on.card;
        let scores = (&card.headline, &card.metrics);
        let is_usual =
            TaskCard::builtin(&card.name).is_none_or(|own| (&own.headline, &own.metrics) == scores);
        let sha256 = match labels.is_identity() && is_usual {
            true => on.sha256.clone(),
            false => hexadecimal(&Sha256::digest(format!("{} {labels:?} {scores:?}", on.sha256))),
        };
        Self { on, labels, sha256 }
    }
}

/// A task, and what its runs are scored on.
pub type OpenTask = (Arc<TaskEntry>, Arc<[Evaluated]>);

/// Finds tasks and reads their data, each split once.
pub struct Catalogue {
    base: PathBuf,
    roots: Vec<PathBuf>,
    /// What was read, and the roots that it was looked for in.
    splits: Vec<(Arc<SplitEntry>, Vec<PathBuf>)>,
}

impl Catalogue {
    /// Makes a catalogue that looks for card files in the folder `base` first, and for data sets in `roots`.
    pub fn new(base: &Path, roots: Vec<PathBuf>) -> Self {
        Self { base: base.to_owned(), roots, splits: Vec::new() }
    }

    /// Opens a task to train on. Its train and dev data come from one place: parts of different copies do not belong
    /// together.
    ///
    /// # Errors
    /// Fails, naming file and place, if the task is not known or its data cannot be read.
    pub fn task(&mut self, spec: &TaskSpec) -> Result<TaskEntry> {
        let card = self.card(spec)?;
        let roots = roots_of_training(&card, &self.roots)?;
        let [train, dev] = [Split::Train, Split::Dev].map(|split| self.split(&card, split, &roots));
        let (train, dev) = (train?, dev?);
        Ok(TaskEntry { card: dev.card.clone(), train, dev })
    }

    /// Opens what runs of a task are scored on: its own dev split, and what the experiment lists besides.
    ///
    /// # Errors
    /// Fails if data cannot be read or have no labels, or if the task's labels cannot be compared with theirs.
    pub fn evaluations(&mut self, task: &TaskEntry, further: &[EvaluationSpec]) -> Result<Arc<[Evaluated]>> {
        let mut all = vec![task.own_evaluation()?];
        for spec in further {
            let card = self.card(&spec.task)?;
            let split = spec.split.unwrap_or(card.scored_split());
            let namesake =
                all.iter().find(|other| other.on.card.name == card.name && other.on.split == split);
            match namesake {
                Some(other) if *other.on.card == card => continue,
                Some(_) => {
                    return Err(Error::configuration(format!(
                        "evaluate: two data sets are called `{}`; give one of them another `name`",
                        card.name
                    )));
                }
                None => {}
            }
            // What is trained on in this experiment is scored in the same copy.
            let known = self.splits.iter().find(|(entry, _)| *entry.card == card && entry.split == split);
            let on = match known {
                Some((entry, _)) => entry.clone(),
                None => self.split(&card, split, &self.roots.clone())?,
            };
            if on.dataset.examples.iter().any(|example| example.label.is_none()) {
                return Err(Error::configuration(format!(
                    "evaluate: the {} split of `{}` has no labels to score with; `child-tuning predict` writes predictions",
                    split, card.name
                )));
            }
            let labels = LabelMap::between(&task.card, &card)?;
            all.push(Evaluated::new(on, labels));
        }
        Ok(all.into())
    }

    /// Says in sentences what was read that is not the whole published data, what was left out of it, and what is there twice.
    pub fn notes(&self) -> Vec<String> {
        let differing = self.splits.iter().filter_map(|(entry, _)| {
            let published = entry.card.published.get(&entry.split)?;
            let found = entry.dataset.examples.len();
            (found != *published)
                .then(|| format!("{} {} {found} of {published}", entry.card.name, entry.split))
        });
        let differing: Vec<String> = differing.collect();
        let mut notes = Vec::new();
        if !differing.is_empty() {
            notes.push(format!("not the published number of examples: {}", differing.join(", ")));
        }
        for (entry, _) in self.splits.iter().filter(|(entry, _)| entry.dataset.dropped > 0) {
            let (count, name, split) = (entry.dataset.dropped, &entry.card.name, entry.split);
            notes.push(format!(
                "{name} {split}: {count} rows without an agreed label or with missing cells left out"
            ));
        }
        let entries: Vec<&SplitEntry> = self.splits.iter().map(|(entry, _)| entry.as_ref()).collect();
        for (place, entry) in entries.iter().enumerate() {
            let same =
                |other: &&&SplitEntry| other.card.name == entry.card.name && other.sha256 == entry.sha256;
            if let Some(other) = entries[..place].iter().find(same) {
                let (name, one, split) = (&entry.card.name, other.split, entry.split);
                notes.push(format!("{name}: {one} and {split} are the same examples"));
            }
        }
        notes
    }

    fn card(&self, spec: &TaskSpec) -> Result<TaskCard> {
        match spec {
            TaskSpec::Custom(custom) => custom.as_ref().clone().into_card(&self.base),
            TaskSpec::Named(name) => TaskCard::named_beside(&self.base, name),
        }
    }

    fn split(&mut self, card: &TaskCard, split: Split, roots: &[PathBuf]) -> Result<Arc<SplitEntry>> {
        let is_it = |(entry, from): &&(Arc<SplitEntry>, Vec<PathBuf>)| {
            *entry.card == *card && entry.split == split && from == roots
        };
        if let Some((entry, _)) = self.splits.iter().find(is_it) {
            return Ok(entry.clone());
        }
        let entry = SplitEntry::new(Arc::new(card.clone()), split, read_split(card, roots, split)?);
        self.splits.push((entry.clone(), roots.to_vec()));
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Example, Label, Metric};

    fn task(count: usize) -> TaskEntry {
        let card = Arc::new(TaskCard::builtin("rte").unwrap());
        let example = |number: usize| Example {
            first: number.to_string(),
            second: Some("b".into()),
            label: Some(Label::Class(usize::from(number.is_multiple_of(4)))),
        };
        let dataset = |count| Dataset {
            examples: (0..count).map(example).collect(),
            dropped: 3,
            path: "rte.tsv".into(),
        };
        TaskEntry {
            train: SplitEntry::new(card.clone(), Split::Train, dataset(count)),
            dev: SplitEntry::new(card.clone(), Split::Dev, dataset(5)),
            card,
        }
    }

    #[test]
    fn what_else_decides_the_scores_names_them_too() {
        let task = task(5);
        let own = task.own_evaluation().unwrap();
        assert_eq!(own.sha256, task.dev.sha256);
        let labels = |labels: LabelMap| Evaluated::new(task.dev.clone(), labels).sha256;
        assert_eq!(labels(LabelMap::identity(2)), own.sha256);
        let turned = LabelMap::to_labels_of(&["not_entailment".into(), "entailment".into()], &task.card);
        assert_ne!(labels(turned.unwrap()), own.sha256);
        let card = TaskCard { headline: Metric::F1, ..TaskCard::builtin("rte").unwrap() };
        let dataset =
            Dataset { examples: task.dev.dataset.examples.clone(), dropped: 0, path: "rte.tsv".into() };
        let other = SplitEntry::new(Arc::new(card), Split::Dev, dataset);
        assert_eq!(other.sha256, own.on.sha256);
        assert_ne!(Evaluated::new(other, LabelMap::identity(2)).sha256, own.sha256);
    }

    #[test]
    fn what_is_held_out_is_stratified_and_not_trained_on() {
        let whole = task(100);
        let own = whole.with_held_out(0.2).unwrap();
        let (train, dev) = (&own.train.dataset.examples, &own.dev.dataset.examples);
        assert_eq!((train.len(), dev.len(), own.dev.dataset.dropped), (80, 20, 0));
        assert!(dev.iter().all(|example| !train.contains(example)));
        assert_eq!(dev.iter().filter(|example| example.label == Some(Label::Class(1))).count(), 5);
        // Where this changes, so do the ids of trials, and worker processes choose for themselves.
        let first: Vec<&str> = dev[..5].iter().map(|example| example.first.as_str()).collect();
        assert_eq!(first, ["2", "8", "9", "13", "15"]);
        assert_eq!(task(2).with_held_out(0.9).unwrap().train.dataset.examples.len(), 1);
        assert!(task(1).with_held_out(0.5).is_err());
    }
}
