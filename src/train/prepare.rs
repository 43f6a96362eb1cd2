//! What a method does before training.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use super::control::{Control, Event, Progress};
use super::hyperparameters::{Freeze, Hyperparameters};
use super::memory::micro_batch_of_preparation;
use super::trainer::Trainer;
use crate::data::EncodedDataset;
use crate::error::Result;
use crate::libtorch::release_freed_memory;
use crate::method::{Method, Preparation, PreparationHost, Prepared};
use crate::model::{Classifier, ParameterPlace, Trainable, Treatment};

/// Does what a method does before training, such as choosing a child network.
///
/// # Errors
/// [`Error::Interrupted`](crate::error::Error::Interrupted) on request, or a libtorch error.
pub fn prepare(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    method: &dyn Method,
    hyperparameters: &Hyperparameters,
    seed: u64,
    control: &mut Control,
) -> Result<Prepared> {
    method.begin(classifier, seed)?;
    let total = method.examples_passed(data.len());
    let micro_batch = match total {
        0 => hyperparameters.batch_size,
        _ => micro_batch_of_preparation(classifier, data, hyperparameters)?,
    };
    let prepared = method.prepare(&mut Preparation {
        classifier,
        data,
        seed,
        batch_size: hyperparameters.batch_size,
        micro_batch,
        precision: hyperparameters.precision,
        order: hyperparameters.order,
        steps: hyperparameters.total_steps(data.len()),
        host: &mut Host { method, data, hyperparameters, seed, control, done: 0, total },
    })?;
    if total > 0 || method.fine_tunes_first() {
        // Sums or moments as large as the model, just before others are allocated.
        release_freed_memory();
    }
    let plain = without_mask(method, classifier);
    Ok(Prepared { parts: plain.parts, frozen: plain.frozen, rates: plain.rates, ..prepared })
}

/// Returns what a method changes in a run besides masks.
fn without_mask(method: &dyn Method, classifier: &Classifier) -> Prepared {
    let layers = classifier.parameters.layers();
    let (mut frozen, mut rates) = (HashSet::new(), HashMap::new());
    for (_, parameter) in classifier.parameters.iter() {
        if !method.trains(parameter, layers) {
            frozen.insert(parameter.name.clone());
        }
        let rate = method.rate(parameter, layers);
        if rate != 1.0 {
            rates.insert(parameter.name.clone(), rate);
        }
    }
    Prepared { parts: method.parts(), frozen, rates, ..Prepared::default() }
}

/// Returns which parameters train on a data set, and how.
pub fn trainable(
    classifier: &Classifier,
    data: &EncodedDataset,
    hyperparameters: &Hyperparameters,
    prepared: &Prepared,
) -> Trainable {
    let frozen = hyperparameters.freeze == Freeze::Encoder;
    let parameters = &classifier.parameters;
    let new: Vec<&str> = match prepared.parts.pulls.is_empty() {
        true => Vec::new(),
        false => parameters
            .iter()
            .filter(|(id, _)| classifier.is_new(*id))
            .map(|(_, parameter)| parameter.name.as_str())
            .collect(),
    };
    let mut trainable = parameters.trainable_as(|parameter| {
        let trains = !prepared.frozen.contains(&parameter.name)
            && (!frozen || parameter.place == ParameterPlace::Head);
        trains.then(|| Treatment {
            rate: prepared.rates.get(&parameter.name).copied().unwrap_or(1.0),
            pretrained: !new.contains(&parameter.name.as_str()),
            ..Treatment::plain(parameter)
        })
    });
    if let Some(words) = classifier.words().filter(|_| !prepared.parts.reach_gradients()) {
        trainable.note_rows(words, &data.vocabulary());
    }
    trainable
}

/// What a method may ask for.
struct Host<'h, 'c> {
    method: &'h dyn Method,
    data: &'h EncodedDataset,
    hyperparameters: &'h Hyperparameters,
    seed: u64,
    control: &'h mut Control<'c>,
    done: usize,
    total: usize,
}

impl PreparationHost for Host<'_, '_> {
    fn progress(&mut self, examples: usize) -> Result<()> {
        self.done += examples;
        (self.control.report)(Event::Prepared(Progress::new(self.done, self.total)));
        self.control.check()
    }

    fn fine_tune(&mut self, classifier: &mut Classifier) -> Result<()> {
        // A child network is chosen as if nothing else decided what trains.
        let prepared = Prepared { frozen: HashSet::new(), ..without_mask(self.method, classifier) };
        let trainer = Trainer::new(classifier, self.data, self.hyperparameters, prepared, self.seed)?;
        let report = &mut self.control.report;
        let mut control = Control {
            interrupted: self.control.interrupted,
            report: &mut |event| {
                report(match event {
                    Event::Step { progress, .. } => Event::FirstTraining(progress),
                    other => other,
                });
            },
        };
        trainer.run(None, Duration::ZERO, &mut control).map(|_| ())
    }

    fn rewind(&mut self, classifier: &mut Classifier) -> Result<()> {
        classifier.reset(self.seed)?;
        self.method.begin(classifier, self.seed)
    }
}
