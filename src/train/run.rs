//! A run from its first step to the weights that are scored: epochs, looks at the dev set, and which of them is left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::best_epoch::{Best, BestEpoch};
use super::control::{Control, Event, Progress};
use super::evaluate::{Evaluation, Scored, evaluate};
use super::hyperparameters::{Checkpoint, Hyperparameters};
use super::prepare::prepare;
use super::trainer::Trainer;
use crate::child::GradientMask;
use crate::data::EncodedDataset;
use crate::error::{Error, Result};
use crate::method::Method;
use crate::model::{Classifier, Parameter};

/// On a GPU the loss is looked at once in so many steps: each look waits for the device.
const STEPS_BETWEEN_LOOKS: u64 = 20;

/// What training left behind besides the weights.
pub struct Trained {
    /// The mask that was used.
    pub mask: Option<Arc<GradientMask>>,
    /// The epoch whose weights the model has now.
    pub epoch: f64,
    /// The optimizer steps behind these weights.
    pub step: u64,
    /// Time for what the method does before training.
    pub prepare_time: Duration,
    /// Time for the training steps, without evaluations.
    pub train_time: Duration,
    /// Examples that the steps went through.
    pub examples: u64,
    /// Tokens that the steps went through.
    pub tokens: u64,
    /// Bytes of optimizer state.
    pub optimizer_bytes: usize,
    /// Weights that the optimizer may change: those that train, without those outside a fixed child network.
    pub trainable: usize,
}

/// Trains a model, which was reset for the run's seed, and leaves the weights to be scored in it.
///
/// `dev` is only looked at to choose a checkpoint or to stop early. With a frozen encoder, both data sets hold its
/// features ([`frozen_features`](super::frozen_features)).
///
/// # Errors
/// [`Error::Diverged`] if the loss stops being a number, [`Error::Interrupted`] on request, or a libtorch error.
pub fn train(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    dev: Option<Scored>,
    method: &dyn Method,
    hyperparameters: &Hyperparameters,
    seed: u64,
    control: &mut Control,
) -> Result<Trained> {
    let started = Instant::now();
    let prepared = prepare(classifier, data, method, hyperparameters, seed, control)?;
    let prepare_time = started.elapsed();
    let run = Trainer::new(classifier, data, hyperparameters, prepared, seed)?;
    run.run(dev, prepare_time, control)
}

impl Trainer<'_> {
    /// Trains to the end, and leaves the weights to be scored in the model.
    ///
    /// # Errors
    /// As for [`train`].
    pub fn run(
        mut self,
        dev: Option<Scored>,
        prepare_time: Duration,
        control: &mut Control,
    ) -> Result<Trained> {
        let mut train_time = Duration::ZERO;
        let keeps_best = self.hyperparameters.checkpoint == Checkpoint::Best;
        let mut selection = BestEpoch::new(keeps_best);
        let epochs = self.hyperparameters.epochs.ceil() as usize;
        for epoch in 0..epochs {
            let started = Instant::now();
            self.epoch(epoch, control)?;
            train_time += started.elapsed();
            let Some(dev) = dev else { continue };
            let training =
                if self.settles() { Some(self.classifier.parameters.values_copy()?) } else { None };
            self.settle()?;
            let evaluation = self.score(dev, control)?;
            (control.report)(Event::Epoch { epoch: epoch + 1, headline: evaluation.headline });
            selection.consider(evaluation.headline, &self.classifier.parameters, self.step)?;
            if let Some(training) = training {
                self.classifier.parameters.restore(&training)?;
            }
            let patience = self.hyperparameters.early_stopping;
            if patience.is_some_and(|patience| selection.epochs_without_gain >= patience) {
                break;
            }
        }
        let mut step = self.step;
        match selection.into_best() {
            Some(Best { values: Some(values), step: best, .. }) => {
                self.classifier.parameters.restore(&values)?;
                step = best;
            }
            _ => self.settle()?,
        }
        let trainable = self.weights_that_train();
        // Without what the method has added to the model.
        self.classifier.shrink()?;
        let per_epoch = self.hyperparameters.steps_per_epoch(self.data.len());
        Ok(Trained {
            epoch: step as f64 / per_epoch as f64,
            step,
            prepare_time,
            train_time,
            examples: self.examples,
            tokens: self.tokens,
            optimizer_bytes: self.optimizer_bytes(),
            trainable,
            mask: self.prepared.mask,
        })
    }

    /// Counts the weights that train, without those outside a fixed child network.
    fn weights_that_train(&self) -> usize {
        let child = self.prepared.mask.as_ref().and_then(|mask| mask.child());
        let members = |parameter: &Parameter| {
            let tensors = child.map(|child| child.tensors()).unwrap_or_default();
            let tensor = tensors.iter().find(|tensor| tensor.name == parameter.name);
            tensor.map_or(parameter.count(), |tensor| tensor.kept)
        };
        let parameters = self.classifier.parameters.iter().map(|(_, parameter)| parameter);
        parameters.filter(|parameter| self.trainable.holds(parameter)).map(members).sum()
    }

    /// Trains one epoch, or what the schedule has left of it.
    fn epoch(&mut self, epoch: usize, control: &mut Control) -> Result<()> {
        let order = self.hyperparameters.order.of_epoch(self.data.len(), self.seed, epoch);
        let on_gpu = self.classifier.parameters.device().is_cuda();
        let mut last_loss = f64::NAN;
        for examples in order.chunks(self.hyperparameters.batch_size) {
            if self.step == self.schedule.total {
                break;
            }
            control.check()?;
            let micro_batch = self.micro_batch;
            let loss = self.step(examples)?;
            if self.micro_batch < micro_batch {
                (control.report)(Event::MicroBatch(self.micro_batch));
            }
            if !on_gpu || self.step.is_multiple_of(STEPS_BETWEEN_LOOKS) || self.step == self.schedule.total {
                last_loss = f64::try_from(&loss)?;
                if !last_loss.is_finite() {
                    return Err(Error::Diverged(format!(
                        "the loss became {last_loss} at step {}",
                        self.step
                    )));
                }
            }
            let progress = Progress { done: self.step, total: self.schedule.total };
            (control.report)(Event::Step { progress, loss: last_loss });
        }
        Ok(())
    }

    fn score(&self, dev: Scored, control: &mut Control) -> Result<Evaluation> {
        let mut done = 0;
        evaluate(self.classifier, dev, self.hyperparameters.precision, |examples| {
            done += examples;
            (control.report)(Event::Evaluated(Progress::new(done, dev.data.len())));
            control.check()
        })
    }

    /// Returns whether the model is scored and kept with other weights than those that train.
    fn settles(&self) -> bool {
        self.prepared.parts.weights.iter().any(|transform| transform.settles())
    }

    /// Writes the weights that the model is scored and kept with.
    fn settle(&mut self) -> Result<()> {
        let parameters = &self.classifier.parameters;
        let start = self.classifier.start().unwrap_or(parameters.values());
        self.prepared.parts.weights.iter().try_for_each(|transform| transform.settle(parameters, start))
    }
}
