//! What an experiment does beyond training on a task and scoring it there, as typed: other data to score on, stages that
//! follow, and runs to start from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::spec::{Seeds, TaskSpec, TrainSpec};
use crate::data::Split;
use crate::method::MethodSpec;
use crate::model::HeadStart;
use crate::train::Freeze;
use crate::values::{Cell, OneOrMany, ProperShare};

/// A data set to score on without training on it: a task's name, or `{task: snli, split: test}`.
#[derive(Clone, Debug)]
pub struct EvaluationSpec {
    /// The task.
    pub task: TaskSpec,
    /// The split; dev if left out, or test where a task has no dev.
    pub split: Option<Split>,
}

impl<'de> Deserialize<'de> for EvaluationSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EvaluationVisitor)
    }
}

struct EvaluationVisitor;

impl<'de> Visitor<'de> for EvaluationVisitor {
    type Value = EvaluationSpec;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a task's name, or `{task: ..., split: dev}`")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<EvaluationSpec, E> {
        Ok(EvaluationSpec { task: TaskSpec::Named(name.to_owned()), split: None })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<EvaluationSpec, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Typed {
            task: TaskSpec,
            split: Option<Split>,
        }
        let typed = Typed::deserialize(MapAccessDeserializer::new(map))?;
        Ok(EvaluationSpec { task: typed.task, split: typed.split })
    }
}

/// A further stage: every run of the stage before is the source of one run for each task, method and grid point.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThenSpec {
    /// Tasks to go on with.
    pub task: OneOrMany<TaskSpec>,
    /// Part of the model that keeps the source's weights.
    pub freeze: Option<Freeze>,
    /// Fine-tuning methods; vanilla if left out.
    pub method: Option<OneOrMany<MethodSpec>>,
    /// Hyper-parameters; what is left out is as in the stage before.
    pub train: Option<TrainSpec>,
    /// Whether the source's head is used where it has the task's labels; a fresh one if left out.
    pub head: Option<HeadStart>,
    /// Further data to score on.
    pub evaluate: Option<OneOrMany<EvaluationSpec>>,
    /// What follows this stage.
    pub then: Option<OneOrMany<ThenSpec>>,
}

/// The weights that runs start from instead of the pretrained ones.
#[derive(Clone, Debug)]
pub enum InitFrom {
    /// One model folder for all runs.
    Folder(PathBuf),
    /// For each run the one of another experiment with the same model and seed.
    Results(EarlierRuns),
}

/// Runs of another experiment whose models were kept.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EarlierRuns {
    /// Its results file.
    pub results: PathBuf,
    /// The folder that it kept its models in (`save:`).
    pub models: PathBuf,
    /// Columns of the results and the values that tell which run of a seed is meant.
    #[serde(default, rename = "where")]
    pub columns: BTreeMap<String, Cell>,
}

impl<'de> Deserialize<'de> for InitFrom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InitFromVisitor)
    }
}

struct InitFromVisitor;

impl<'de> Visitor<'de> for InitFromVisitor {
    type Value = InitFrom;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a model folder, or `{results: ..., models: ..., where: {...}}`")
    }

    fn visit_str<E: serde::de::Error>(self, folder: &str) -> Result<InitFrom, E> {
        Ok(InitFrom::Folder(PathBuf::from(folder)))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<InitFrom, A::Error> {
        EarlierRuns::deserialize(MapAccessDeserializer::new(map)).map(InitFrom::Results)
    }
}

/// How hyper-parameters are tuned before the runs that are reported.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelectSpec {
    /// What a candidate is judged by.
    pub by: SelectBy,
    /// Seeds of the trials.
    pub on_seeds: Seeds,
    /// Share of the training data that is held out, with [`SelectBy::HeldOut`].
    pub share: Option<ProperShare>,
    /// Allows seeds that are reported as well, which flatters the report.
    #[serde(default)]
    pub share_seeds: bool,
}

/// What candidates are judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectBy {
    /// The mean over seeds of the headline metric on the dev split, where the reports are scored, too.
    Dev,
    /// The same on a part of the training data that the trials do not train on, so that dev has no say.
    HeldOut,
}
