//! The experiment file as typed.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::overrides::{self, Override};
use super::profile::Profile;
use super::stage_spec::{EvaluationSpec, InitFrom, SelectSpec, ThenSpec};
use crate::data::{CustomTask, Order};
use crate::error::{Error, Result};
use crate::files::is_pipe;
use crate::method::{MethodSpec, Preset};
use crate::model::{HeadStart, Precision};
use crate::train::{AdamWForm, Checkpoint, Freeze, MicroBatch, OptimizerRule, Warmup};
use crate::values::{Count, Limit, NonNegative, OneOrMany, PartialShare, Positive, keys_once, typed};
use crate::yaml;

/// The seeds of the paper's runs (alibaba/AliceMind, issue 24).
pub const PAPER_SEEDS: [u64; 10] = [42, 52, 57, 63, 78, 96, 127, 140, 298, 375];

/// An experiment as typed in YAML; what is left out is filled in by the plan.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExperimentSpec {
    /// Name in the results; the file's name if left out.
    pub name: Option<String>,
    /// Hugging Face folders, or models of the Hub.
    pub model: OneOrMany<String>,
    /// Tasks by name, card file, or columns.
    pub task: OneOrMany<TaskSpec>,
    /// Fine-tuning methods.
    pub method: OneOrMany<MethodSpec>,
    /// Seeds of the runs.
    pub seeds: Option<Seeds>,
    /// Hyper-parameters.
    pub train: Option<TrainSpec>,
    /// Part of the model that does not train.
    pub freeze: Option<Freeze>,
    /// Further data to score every run on.
    pub evaluate: Option<OneOrMany<EvaluationSpec>>,
    /// Stages that go on from every run.
    pub then: Option<OneOrMany<ThenSpec>>,
    /// Weights to start from instead of the pretrained ones.
    pub init_from: Option<InitFrom>,
    /// How hyper-parameters are tuned before the runs that are reported.
    pub select: Option<SelectSpec>,
    /// A smaller version of the experiment.
    pub profile: Option<Profile>,
    /// Which description of Child-Tuning fills in the rest.
    pub preset: Option<Preset>,
    /// Overrides of keys in the model's `config.json`.
    #[serde(default, deserialize_with = "keys_once")]
    pub model_config: Option<Map<String, Value>>,
    /// Whether a head in the model folder is used.
    pub head: Option<HeadStart>,
    /// Folders with data sets, before the usual ones.
    pub data: Option<OneOrMany<PathBuf>>,
    /// The CSV that results are appended to.
    pub results: Option<PathBuf>,
    /// Folder that keeps each finished run's model.
    pub save: Option<PathBuf>,
    /// Folder that keeps each finished run's mask.
    pub masks: Option<PathBuf>,
}

/// Hyper-parameters as typed; each may be a list, which makes an axis of the grid.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// Passes over the training data.
    pub epochs: Option<OneOrMany<Positive>>,
    /// Examples of one optimizer step.
    pub batch_size: Option<OneOrMany<Count>>,
    /// Examples of one forward and backward pass.
    pub micro_batch: Option<OneOrMany<MicroBatch>>,
    /// Longest example in tokens.
    pub max_length: Option<OneOrMany<Count>>,
    /// Highest learning rate.
    pub learning_rate: Option<OneOrMany<Positive>>,
    /// Share or number of warm-up steps.
    pub warmup: Option<OneOrMany<Warmup>>,
    /// Decoupled weight decay.
    pub weight_decay: Option<OneOrMany<NonNegative>>,
    /// Largest global gradient norm; 0 and null do not clip.
    #[serde(default, deserialize_with = "typed")]
    pub max_gradient_norm: Option<OneOrMany<Limit>>,
    /// How gradients become steps.
    pub optimizer: Option<OneOrMany<OptimizerRule>>,
    /// Decay rates of Adam's moments.
    pub betas: Option<[PartialShare; 2]>,
    /// Adam's epsilon.
    pub epsilon: Option<OneOrMany<Positive>>,
    /// Form of AdamW.
    pub adamw: Option<OneOrMany<AdamWForm>>,
    /// Number type of the passes.
    pub precision: Option<OneOrMany<Precision>>,
    /// Order of the examples.
    pub order: Option<OneOrMany<Order>>,
    /// Size of a random, stratified subset of the training data.
    pub examples: Option<OneOrMany<Count>>,
    /// Share of the training labels that are replaced by wrong ones.
    pub label_noise: Option<OneOrMany<PartialShare>>,
    /// Weights that are scored.
    pub checkpoint: Option<OneOrMany<Checkpoint>>,
    /// When to stop early; null never does.
    #[serde(default, deserialize_with = "typed")]
    pub early_stopping: Option<Option<EarlyStopping>>,
    /// Whether backward computes each layer again, to save memory.
    pub gradient_checkpointing: Option<bool>,
    /// Whether passes on a GPU are recorded and replayed.
    pub cuda_graphs: Option<bool>,
    /// Whether each parameter is updated as soon as its gradient is there, to save memory.
    pub release_gradients: Option<bool>,
}

/// When training stops early.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlyStopping {
    /// Epochs without a better dev score.
    pub patience: Count,
}

/// A task as typed.
#[derive(Clone, Debug)]
pub enum TaskSpec {
    /// A built-in task, or a card file (a name that ends in `.yaml` or `.yml`).
    Named(String),
    /// `custom: {...}`
    Custom(Box<CustomTask>),
}

impl<'de> Deserialize<'de> for TaskSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TaskVisitor)
    }
}

struct TaskVisitor;

impl<'de> Visitor<'de> for TaskVisitor {
    type Value = TaskSpec;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a task's name, a card file, or `custom: {...}`")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<TaskSpec, E> {
        Ok(TaskSpec::Named(name.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TaskSpec, A::Error> {
        match map.next_key::<String>()?.as_deref() {
            Some("custom") => Ok(TaskSpec::Custom(Box::new(map.next_value()?))),
            _ => Err(A::Error::custom("a task with options is written `custom: {...}`")),
        }
    }
}

/// Seeds as typed: a number, a list, or `paper`.
#[derive(Clone, Debug)]
pub struct Seeds(pub Vec<u64>);

impl<'de> Deserialize<'de> for Seeds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SeedsVisitor)
    }
}

struct SeedsVisitor;

impl<'de> Visitor<'de> for SeedsVisitor {
    type Value = Seeds;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a seed, a list of seeds, or `paper`")
    }

    fn visit_u64<E: serde::de::Error>(self, seed: u64) -> Result<Seeds, E> {
        Ok(Seeds(vec![seed]))
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Seeds, E> {
        match name {
            "paper" => Ok(Seeds(PAPER_SEEDS.to_vec())),
            _ => Err(E::custom(format!("unknown seed set `{name}`; known is `paper`"))),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Seeds, A::Error> {
        let (mut seeds, mut known) = (Vec::new(), HashSet::new());
        while let Some(seed) = sequence.next_element::<u64>()? {
            if !known.insert(seed) {
                return Err(A::Error::custom(format!("seed {seed} is listed twice")));
            }
            seeds.push(seed);
        }
        if seeds.is_empty() { Err(A::Error::custom("the list of seeds is empty")) } else { Ok(Seeds(seeds)) }
    }
}

impl ExperimentSpec {
    /// Reads an experiment file and applies `--set path=value` overrides to it.
    ///
    /// # Errors
    /// Fails, naming file, line, column, key and the nearest valid spelling, if the file is not a valid experiment.
    pub fn read(path: &Path, overrides: &[Override]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::configuration(format!("cannot read the experiment {}: {error}", path.display()))
        })?;
        let mut spec = Self::parse(&text, path, overrides)?;
        if spec.name.is_none() && !is_pipe(path) {
            spec.name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        }
        if let Some(profile) = spec.profile {
            let is_typed = |key: &str| overrides.iter().any(|change| change.concerns(key));
            profile.apply(&mut spec, &is_typed);
        }
        Ok(spec)
    }

    fn parse(text: &str, path: &Path, overrides: &[Override]) -> Result<Self> {
        let typed = yaml::parse::<Self>(text, path);
        if overrides.is_empty() {
            return typed;
        }
        let mut tree = yaml::parse(text, path)?;
        for change in overrides {
            overrides::apply(&mut tree, change)?;
        }
        serde_yaml::from_value(tree).map_err(|error| match typed {
            // The file itself is at fault, and its error knows the line.
            Err(in_file) => in_file,
            Ok(_) => {
                let changes: Vec<_> = overrides.iter().map(|change| format!("--set {change}")).collect();
                Error::configuration(format!(
                    "{}: {}",
                    changes.join(" "),
                    yaml::described(&error.to_string())
                ))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str, sets: &[&str]) -> String {
        let overrides: Vec<_> = sets.iter().map(|set| set.parse().unwrap()).collect();
        ExperimentSpec::parse(text, Path::new("x.yaml"), &overrides).unwrap_err().to_string()
    }

    const START: &str = "model: m\ntask: rte\n";

    #[test]
    fn a_whole_experiment_is_read() {
        let text = "name: small\nmodel: [a, b]\ntask: [rte, {custom: {name: mine, train: t.csv, dev: d.csv, text: [a], label: b}}]\n\
            method:\n  - vanilla\n  - child_tuning_f: {p: [0.2, 0.3]}\n  - child_tuning_d\nseeds: paper\n\
            train: {epochs: 3, learning_rate: [1e-5, 2e-5], precision: bf16, warmup: 200, early_stopping: {patience: 2}}\n";
        let spec = ExperimentSpec::parse(text, Path::new("x.yaml"), &[]).unwrap();
        assert_eq!(spec.model.0, ["a", "b"]);
        assert_eq!((spec.task.0.len(), spec.method.0.len()), (2, 3));
        assert_eq!(spec.seeds.unwrap().0, PAPER_SEEDS);
        assert_eq!(spec.train.unwrap().learning_rate.unwrap().0, [Positive(1e-5), Positive(2e-5)]);
    }

    #[test]
    fn errors_name_the_place_the_key_and_the_mend() {
        let cases = [
            (
                format!("{START}method: vanilla\ntrain:\n  batch_size: 4\n  epoch: 3\n"),
                "x.yaml:6:3: train: unknown field `epoch`",
                "did you mean `epochs`?",
            ),
            (format!("{START}methods: vanilla\n"), "x.yaml:3:1: ", "did you mean `method`?"),
            (
                format!("{START}method: vanilla\nhead: [keep]\n"),
                "x.yaml:4:7: head: ",
                "expected one word here",
            ),
            (
                format!("{START}method:\n  - child_tuning_f: {{p: 0}}\n"),
                "x.yaml:4:25: method[0].child_tuning_f.p: ",
                "above 0 and at most 1, not 0",
            ),
            (format!("{START}method:\n  - child_tuning_f: {{p: 1.5}}\n"), "x.yaml:4:25: ", "not 1.5"),
            (
                format!("{START}method:\n  - child_tuning_e\n"),
                "x.yaml:4:5: method[0]: ",
                "did you mean `child_tuning_d`?",
            ),
            (
                format!("{START}method:\n  - child_tuning_d: {{fisher: {{estimator: per_exmple}}}}\n"),
                "x.yaml:4:",
                "did you mean `per_example`?",
            ),
            (
                format!("{START}method: vanilla\ntrain: {{epochs: three}}\n"),
                "x.yaml:4:17: train.epochs: ",
                "three",
            ),
            (
                format!("{START}method: vanilla\ntrain: {{learning_rate: []}}\n"),
                "x.yaml:4:",
                "the list is empty",
            ),
            (format!("{START}method: vanilla\nseeds: [1, 1]\n"), "x.yaml:4:", "twice"),
            (format!("{START}method: vanilla\ntask: cola\n"), "x.yaml", "duplicate"),
            ("model: m\nmethod: vanilla\n".to_owned(), "x.yaml", "missing field `task`"),
            ("model: [m\n".to_owned(), "x.yaml:", ""),
        ];
        for (text, place, mend) in cases {
            let message = message(&text, &[]);
            assert!(message.starts_with(place) && message.contains(mend), "{text}\n-> {message}");
        }
    }

    #[test]
    fn overrides_reach_any_key_and_are_checked_as_well() {
        let text = format!("{START}method:\n  - child_tuning_f: {{p: 0.3}}\n");
        let overrides: Vec<_> = ["train.epochs=2", "method.0.child_tuning_f.p=[0.1, 0.2]", "seeds=[7]"]
            .iter()
            .map(|set| set.parse().unwrap())
            .collect();
        let spec = ExperimentSpec::parse(&text, Path::new("x.yaml"), &overrides).unwrap();
        assert_eq!(spec.train.unwrap().epochs.unwrap().0, [Positive(2.0)]);
        assert_eq!(spec.seeds.unwrap().0, [7]);

        let message = message(&text, &["train.epoch=2"]);
        assert!(
            message.starts_with("--set train.epoch=2: ") && message.contains("did you mean `epochs`?"),
            "{message}"
        );
    }
}
