//! Smaller versions of an experiment: every stage, task, method and axis of it, in seconds.

use std::path::PathBuf;

use serde::Deserialize;

use super::spec::{ExperimentSpec, Seeds, TrainSpec};
use super::stage_spec::ThenSpec;
use crate::model::Precision;
use crate::train::MicroBatch;
use crate::values::{Count, OneOrMany, Positive};

/// A smaller version of an experiment, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// A random encoder of 30,000 weights (`models/tiny`), the miniature data, two seeds, one short epoch. For seeing that
    /// an experiment works and what its results look like; its scores mean nothing.
    Tiny,
}

/// Sizes of the tiny profile.
const MODEL: &str = "models/tiny";
const DATA: &str = "data";
const SEEDS: usize = 2;
const EXAMPLES: usize = 32;
const LENGTH: usize = 32;
/// An experiment's own number of examples is divided by this, so that several of them stay several.
const SHRINK: usize = 25;

impl Profile {
    /// Changes an experiment into its smaller version. What it compares stays as it is: tasks, methods, stages, and all
    /// axes but model and data; and so do the keys that `is_typed` says the command line sets. (Methods of the first
    /// stage that need more layers than the model has are left out where the plan is made.)
    pub fn apply(self, spec: &mut ExperimentSpec, is_typed: &dyn Fn(&str) -> bool) {
        let Profile::Tiny = self;
        if !is_typed("model") {
            spec.model = MODEL.to_owned().into();
        }
        if !is_typed("model_config") {
            spec.model_config = None;
        }
        if !is_typed("data") {
            spec.data = Some(PathBuf::from(DATA).into());
        }
        let trials = spec.select.as_mut().map(|select| ("select.on_seeds", &mut select.on_seeds));
        for (key, seeds) in spec.seeds.as_mut().map(|seeds| ("seeds", seeds)).into_iter().chain(trials) {
            if !is_typed(key) {
                seeds.0.truncate(SEEDS);
            }
        }
        spec.seeds.get_or_insert(Seeds(vec![42]));
        shrink(spec.train.get_or_insert_default(), true, &|key| is_typed(&format!("train.{key}")));
        if !is_typed("then") {
            spec.then.iter_mut().flat_map(|then| &mut then.0).for_each(shrink_stage);
        }
        let name = spec.name.as_deref().unwrap_or("experiment");
        if !is_typed("results") {
            spec.results = Some(PathBuf::from(format!("results/tiny/{name}.csv")));
        }
        for (key, folder, what) in [("save", &mut spec.save, "models"), ("masks", &mut spec.masks, "masks")] {
            if !is_typed(key) && folder.is_some() {
                *folder = Some(PathBuf::from(format!("results/tiny/{name}-{what}")));
            }
        }
    }
}

fn shrink_stage(stage: &mut ThenSpec) {
    if let Some(train) = &mut stage.train {
        shrink(train, false, &|_| false);
    }
    stage.then.iter_mut().flat_map(|then| &mut then.0).for_each(shrink_stage);
}

/// Makes training short, but for the keys that are typed. Only the first stage sets what later ones take over.
fn shrink(train: &mut TrainSpec, first: bool, is_typed: &dyn Fn(&str) -> bool) {
    if (first || train.epochs.is_some()) && !is_typed("epochs") {
        train.epochs = Some(Positive(1.0).into());
    }
    if (first || train.max_length.is_some()) && !is_typed("max_length") {
        train.max_length = Some(Count(LENGTH).into());
    }
    if !is_typed("batch_size") {
        train.batch_size =
            train.batch_size.take().map(|sizes| each(sizes, |size: Count| Count(size.0.min(16))));
    }
    if !is_typed("micro_batch") {
        train.micro_batch = train.micro_batch.take().map(|sizes| {
            each(sizes, |size| match size {
                MicroBatch::Examples(examples) => MicroBatch::Examples(examples.min(16)),
                MicroBatch::Auto => MicroBatch::Auto,
            })
        });
    }
    if train.precision.is_some() && !is_typed("precision") {
        train.precision = Some(Precision::Float32.into());
    }
    if !is_typed("examples") {
        let sizes = train.examples.take().unwrap_or_else(|| Count(EXAMPLES * SHRINK).into());
        train.examples = Some(each(sizes, |size| Count((size.0 / SHRINK).clamp(1, 10 * EXAMPLES))));
    }
}

/// Changes every value of a list, keeping each that comes out once.
fn each<T: PartialEq>(OneOrMany(values): OneOrMany<T>, change: impl Fn(T) -> T) -> OneOrMany<T> {
    let mut changed = Vec::new();
    for value in values.into_iter().map(change) {
        if !changed.contains(&value) {
            changed.push(value);
        }
    }
    OneOrMany(changed)
}
