//! One run with no options left, and the identity that it has by its contents.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::entries::{Evaluated, ModelEntry, TaskEntry};
use super::run_rows::settled;
use super::start::{Source, Start};
use crate::data::Split;
use crate::error::{Error, Result};
use crate::method::Method;
use crate::model::{HeadStart, Labels, ModelConfig, ParameterTable};
use crate::train::{Freeze, Hyperparameters};
use crate::values::hexadecimal;

/// One run: a model, a task, a method, hyper-parameters and a seed.
#[derive(Clone)]
pub struct Run {
    /// 16 hexadecimal characters over everything that decides the outcome.
    pub id: String,
    /// The pretrained model.
    pub model: Arc<ModelEntry>,
    /// The weights it starts from.
    pub start: Start,
    /// What happens to a head that those weights bring.
    pub head: HeadStart,
    /// The task it trains on.
    pub task: Arc<TaskEntry>,
    /// The fine-tuning method.
    pub method: Arc<dyn Method>,
    /// Everything else that decides how it trains.
    pub hyperparameters: Hyperparameters,
    /// Size of the subset of the training data; `None` trains on all of it.
    pub examples: Option<usize>,
    /// Share of the training labels that are replaced by wrong ones.
    pub label_noise: f64,
    /// The seed of head, order, dropout and masks.
    pub seed: u64,
    /// What it is scored on, its task's own dev split first.
    pub evaluations: Arc<[Evaluated]>,
    /// What it is for.
    pub purpose: RunPurpose,
    /// What sets it apart from other runs of its plan that are called the same otherwise, once the plan is there.
    pub distinction: OnceLock<String>,
}

/// What a run is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunPurpose {
    /// Its score is a result.
    #[default]
    Report,
    /// Its score is a result, and trials chose its hyper-parameters.
    Tuned,
    /// Its score chooses hyper-parameters.
    Selection,
}

impl Run {
    /// Returns the run in a few words, for progress and messages.
    pub fn label(&self) -> String {
        let source = match self.source() {
            Source { task, method, .. } if !task.is_empty() => format!("{method} {task} > "),
            Source { run, .. } if !run.is_empty() => format!("{run} > "),
            _ => String::new(),
        };
        let trial = if self.purpose == RunPurpose::Selection { "trial " } else { "" };
        let (task, method) = (&self.task.card.name, self.method.name());
        let distinction = self.distinction.get().cloned().unwrap_or_default();
        let words = [format!("{trial}{source}{task}"), method.into(), self.method.options(), distinction];
        let words: Vec<String> = words.into_iter().filter(|word| !word.is_empty()).collect();
        format!("{} seed {}", words.join(" "), self.seed)
    }

    /// Returns the settings that a label leaves out, by name.
    pub(super) fn further_settings(&self) -> Map<String, Value> {
        let mut settings = match serde_json::to_value(&self.hyperparameters) {
            Ok(Value::Object(settings)) => settings,
            _ => Map::new(),
        };
        settings.insert("model".into(), self.model.name.clone().into());
        settings.insert("examples".into(), self.examples.into());
        settings.insert("label_noise".into(), self.label_noise.into());
        settings
    }

    /// Returns the number of training examples.
    pub fn training_examples(&self) -> usize {
        let all = self.task.train.dataset.examples.len();
        self.examples.map_or(all, |examples| examples.min(all))
    }

    /// Returns the number of optimizer steps.
    pub fn total_steps(&self) -> u64 {
        self.hyperparameters.total_steps(self.training_examples())
    }

    /// Returns the run whose weights this one starts from, if it is one of the same experiment.
    pub fn source_run(&self) -> Option<&Arc<Run>> {
        match &self.start {
            Start::Run(run) => Some(run),
            _ => None,
        }
    }

    /// Returns the run that the chain of stages up to this one begins with, which may be this one.
    pub fn first_stage(&self) -> &Run {
        self.source_run().map_or(self, |source| source.first_stage())
    }

    /// Returns where the weights that this run starts from come from.
    pub fn source(&self) -> Source {
        match &self.start {
            Start::Pretrained => Source::default(),
            Start::Folder(folder) => folder.source.clone(),
            Start::Run(run) => run.source().then(&settled(run)),
        }
    }

    /// Returns the config of the model that trains.
    pub fn config(&self) -> &ModelConfig {
        match &self.start {
            Start::Folder(start) => &start.folder.config,
            // A model that a run has kept has the config that it trained with.
            Start::Pretrained | Start::Run(_) => &self.model.folder.config,
        }
    }

    /// Returns the rows that the run is to have: task, split and what names the scoring ([`Evaluated::sha256`]).
    pub fn rows(&self) -> impl Iterator<Item = (&str, Split, &str)> {
        let evaluated = self.evaluations.iter();
        evaluated.map(|own| (own.on.card.name.as_str(), own.on.split, own.sha256.as_str()))
    }

    /// Returns what names the weights that the run starts from: equal for runs that start alike.
    pub fn start_id(&self) -> &str {
        match &self.start {
            Start::Pretrained => &self.model.sha256,
            Start::Folder(start) => &start.sha256,
            Start::Run(run) => &run.id,
        }
    }

    /// Hashes everything that decides the outcome; names and places of files are not part of it, their contents are, and
    /// neither is what the run is scored on besides its own task.
    pub fn identity(&self) -> String {
        let card = &self.task.card;
        let mut content = json!({
            "model": self.model.sha256,
            "config": self.config().values(),
            "tokenizer": self.model.tokenizer_sha256,
            "head": self.head,
            "task": card.name,
            "labels": card.labels(),
            "headline": card.headline,
            "train": self.task.train.sha256,
            "dev": self.task.dev.sha256,
            "examples": self.examples,
            "method": self.method.name(),
            "options": self.method.options(),
            "hyperparameters": self.hyperparameters,
            "seed": self.seed,
        });
        let mut add = |key: &str, value: Value| {
            content.as_object_mut().map(|content: &mut Map<String, Value>| content.insert(key.into(), value))
        };
        if !matches!(self.start, Start::Pretrained) {
            add("start", json!(self.start_id()));
        }
        if self.label_noise > 0.0 {
            add("label_noise", json!(self.label_noise));
        }
        if self.purpose != RunPurpose::Report {
            add("purpose", json!(self.purpose));
        }
        let digest = Sha256::digest(content.to_string());
        hexadecimal(&digest[..8])
    }

    /// Returns the parameters of the model as training will start from them, without places in a buffer.
    ///
    /// # Errors
    /// Fails if the family does not run here or the config is incomplete.
    pub fn declared(&self) -> Result<ParameterTable> {
        let labels = Labels::from(&self.task.card.objective);
        let folder = match &self.start {
            Start::Pretrained => &self.model.folder,
            Start::Folder(start) => &start.folder,
            // A model that a run has kept lacks nothing.
            Start::Run(_) => return Ok(self.model.folder.config.declare(labels.outputs())?.1),
        };
        Ok(folder.declare(&labels)?.1)
    }

    /// Returns whether only the head trains.
    pub fn is_frozen(&self) -> bool {
        self.hyperparameters.freeze == Freeze::Encoder
    }
}

/// The ids of the runs of a plan.
#[derive(Default)]
pub struct RunIds(HashSet<String>);

impl RunIds {
    /// Takes in a run, of which the experiment asks for so many training examples, if it says so.
    ///
    /// # Errors
    /// Fails, naming the run, if it is there already: two of one id would be one row.
    pub fn add(&mut self, run: &Run, examples: Option<usize>) -> Result<()> {
        if self.0.insert(run.id.clone()) {
            return Ok(());
        }
        let all = run.task.train.dataset.examples.len();
        let mend = match examples.filter(|&examples| examples >= all) {
            Some(examples) => format!(
                "`train.examples: {examples}` is all of the {all} that there are, as another entry is; keep one of them"
            ),
            None => "remove the repeated entry".to_owned(),
        };
        Err(Error::configuration(format!(
            "the experiment contains the same run twice: {}; {mend}",
            run.label()
        )))
    }
}
