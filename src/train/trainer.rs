//! The training loop of one run.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::evaluate::{Evaluation, Scored, evaluate};
use super::hyperparameters::{Checkpoint, Freeze, Hyperparameters, Order};
use super::rule::Optimizer;
use super::schedule::Schedule;
use crate::child::{GradientMask, install_hooks};
use crate::data::EncodedDataset;
use crate::error::{Error, Result};
use crate::libtorch::GradientHook;
use crate::method::{ClipOrder, DecayScope, Method, Outside, Preparation, Prepared};
use crate::model::{Classifier, Dropout, ParameterPlace, Pass, Trainable, loss};
use crate::random::{self, Key, Purpose};
use crate::values::nan_as_null;

/// On a GPU the loss is looked at once in so many steps: each look waits for the device.
const STEPS_BETWEEN_LOOKS: u64 = 20;

/// Something that happened in a run, for whoever shows or logs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Event {
    /// A frozen encoder passed over examples.
    Encoded(Progress),
    /// A method passed over examples before training.
    Prepared(Progress),
    /// An optimizer step ended.
    Step {
        /// Steps done, of all steps.
        progress: Progress,
        /// The loss at the last look.
        #[serde(with = "nan_as_null")]
        loss: f64,
    },
    /// Examples were evaluated.
    Evaluated(Progress),
    /// An epoch was scored on the dev set.
    Epoch {
        /// The epoch, from 1.
        epoch: usize,
        /// Its headline metric.
        #[serde(with = "nan_as_null")]
        headline: f64,
    },
}

/// So many of so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How many are done.
    pub done: u64,
    /// How many there are.
    pub total: u64,
}

impl Progress {
    /// Makes the progress of a count.
    pub fn new(done: usize, total: usize) -> Self {
        Self { done: done as u64, total: total as u64 }
    }
}

/// How a run is watched and stopped.
pub struct Control<'a> {
    /// Set to ask the run to stop.
    pub interrupted: &'a AtomicBool,
    /// Told what happens.
    pub report: &'a mut dyn FnMut(Event),
}

impl Control<'_> {
    /// Returns an error if the run was asked to stop.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn check(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

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
    /// Examples and tokens that the steps went through.
    pub examples: u64,
    /// Tokens that the steps went through.
    pub tokens: u64,
    /// Bytes of optimizer state.
    pub optimizer_bytes: usize,
    /// Weights that the optimizer may change, those outside a fixed child network among them.
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

/// Does what a method does before training, such as choosing a child network.
///
/// # Errors
/// [`Error::Interrupted`] on request, or a libtorch error.
pub fn prepare(
    classifier: &mut Classifier,
    data: &EncodedDataset,
    method: &dyn Method,
    hyperparameters: &Hyperparameters,
    seed: u64,
    control: &mut Control,
) -> Result<Prepared> {
    let mut done = 0;
    method.prepare(&mut Preparation {
        classifier,
        data,
        seed,
        batch_size: hyperparameters.batch_size,
        shuffled: hyperparameters.order == Order::Shuffled,
        progress: &mut |examples| {
            done += examples;
            (control.report)(Event::Prepared(Progress::new(done, data.len())));
            control.check()
        },
    })
}

/// A run in progress: a model, its data, and what the next step needs.
pub struct Trainer<'a> {
    classifier: &'a mut Classifier,
    data: &'a EncodedDataset,
    hyperparameters: &'a Hyperparameters,
    prepared: Prepared,
    trainable: Trainable,
    optimizer: Optimizer,
    schedule: Schedule,
    seed: u64,
    step: u64,
    tokens: u64,
    examples: u64,
    /// Removed when the run ends, so that the next run's gradients are its own.
    _hooks: Vec<GradientHook>,
}

impl<'a> Trainer<'a> {
    /// Starts a run: prunes the model if the method asks for it, registers the mask and makes the optimizer.
    ///
    /// # Errors
    /// Fails if libtorch refuses a hook or cannot allocate.
    pub fn new(
        classifier: &'a mut Classifier,
        data: &'a EncodedDataset,
        hyperparameters: &'a Hyperparameters,
        prepared: Prepared,
        seed: u64,
    ) -> Result<Self> {
        let hooks = match (&prepared.mask, prepared.clip) {
            (Some(mask), ClipOrder::AfterMask) => install_hooks(&classifier.parameters, mask)?,
            _ => Vec::new(),
        };
        if let (Outside::Prune, Some(child)) =
            (prepared.outside, prepared.mask.as_ref().and_then(|mask| mask.child()))
        {
            child.prune(&classifier.parameters)?;
        }
        let frozen = hyperparameters.freeze == Freeze::Encoder;
        let trainable =
            classifier.parameters.trainable(|parameter| !frozen || parameter.place == ParameterPlace::Head);
        let total = hyperparameters.total_steps(data.len());
        let warmup = hyperparameters.warmup.steps(total);
        let learning_rate = hyperparameters.learning_rate * prepared.learning_rate_factor;
        Ok(Self {
            optimizer: Optimizer::new(&classifier.parameters, &trainable, hyperparameters)?,
            trainable,
            schedule: Schedule { learning_rate, warmup, total },
            classifier,
            data,
            hyperparameters,
            prepared,
            seed,
            step: 0,
            tokens: 0,
            examples: 0,
            _hooks: hooks,
        })
    }

    /// Takes one optimizer step over the examples with the given numbers. Returns their mean loss, on the device.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn step(&mut self, examples: &[usize]) -> Result<Tensor> {
        let device = self.classifier.parameters.device();
        self.classifier.parameters.zero_gradients_in(&self.trainable.spans)?;
        if let Some(mask) = &self.prepared.mask {
            mask.begin_step(self.step);
        }
        let dropout = Dropout::new(self.seed, Purpose::Dropout, self.step, device);
        let mut mean_loss = Tensor::f_zeros([], (Kind::Float, device))?;
        for (part, micro_batch) in examples.chunks(self.hyperparameters.micro_batch).enumerate() {
            let first_slot = part * self.hyperparameters.micro_batch;
            let (batch, targets) = self.data.batch(micro_batch, first_slot, device)?;
            let weights = self.classifier.parameters.compute_weights(self.compute_kind())?;
            let logits = self.classifier.logits(&Pass::new(&weights, &batch, Some(dropout)))?;
            let loss = loss(&logits, &targets, examples.len())?;
            loss.f_backward()?;
            mean_loss = mean_loss.f_add(&loss.f_detach()?)?;
            self.tokens += batch.tokens() as u64;
        }
        self.clip_gradients()?;
        if let (Some(mask), ClipOrder::BeforeMask) = (&self.prepared.mask, self.prepared.clip) {
            mask.apply_to_all(&self.classifier.parameters)?;
        }
        let decayed = match self.prepared.decay {
            DecayScope::Child => self.prepared.mask.as_ref().and_then(|mask| mask.child()),
            DecayScope::All => None,
        };
        self.optimizer.step(&self.classifier.parameters, self.schedule.at(self.step), decayed)?;
        self.step += 1;
        self.examples += examples.len() as u64;
        Ok(mean_loss)
    }

    /// The number type of the passes; the head alone is float32 always.
    fn compute_kind(&self) -> Kind {
        match self.hyperparameters.freeze {
            Freeze::Nothing => self.hyperparameters.precision.kind(),
            Freeze::Encoder => Kind::Float,
        }
    }

    /// Scales all gradients so that their global norm is at most the limit (`torch.nn.utils.clip_grad_norm_`), without
    /// waiting for a GPU.
    fn clip_gradients(&self) -> Result<()> {
        let Some(limit) = self.hyperparameters.max_gradient_norm else { return Ok(()) };
        let gradients = self.classifier.parameters.gradients();
        let span = |span: &Range<usize>| gradients.f_narrow(0, span.start as i64, span.len() as i64);
        let mut spans = self.trainable.spans.iter().map(span).collect::<Result<Vec<_>, _>>()?;
        let norms = spans.iter().map(Tensor::f_norm).collect::<Result<Vec<_>, _>>()?;
        // Of a single span, which is the rule, the norm of the norm is the norm itself.
        let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;
        let factor = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(limit)?.f_clamp_max(1.0)?;
        if !factor.device().is_cuda() && f64::try_from(&factor)? == 1.0 {
            return Ok(());
        }
        for span in &mut spans {
            let _ = span.f_mul_(&factor)?;
        }
        Ok(())
    }

    fn run(mut self, dev: Option<Scored>, prepare_time: Duration, control: &mut Control) -> Result<Trained> {
        let mut train_time = Duration::ZERO;
        let mut selection = Selection::default();
        let epochs = self.hyperparameters.epochs.ceil() as usize;
        for epoch in 0..epochs {
            let started = Instant::now();
            self.epoch(epoch, control)?;
            train_time += started.elapsed();
            let Some(dev) = dev else { continue };
            let evaluation = self.score(dev, control)?;
            (control.report)(Event::Epoch { epoch: epoch + 1, headline: evaluation.headline });
            selection.consider(&self, evaluation.headline)?;
            if self
                .hyperparameters
                .early_stopping
                .is_some_and(|patience| selection.epochs_without_gain >= patience)
            {
                break;
            }
        }
        let mut step = self.step;
        if let (Checkpoint::Best, Some(best)) = (self.hyperparameters.checkpoint, selection.best) {
            self.classifier.parameters.restore(&best.values)?;
            step = best.step;
        }
        let per_epoch = self.hyperparameters.steps_per_epoch(self.data.len());
        Ok(Trained {
            epoch: step as f64 / per_epoch as f64,
            step,
            prepare_time,
            train_time,
            examples: self.examples,
            tokens: self.tokens,
            optimizer_bytes: self.optimizer.state_bytes(),
            trainable: self.trainable.count,
            mask: self.prepared.mask,
        })
    }

    /// Trains one epoch, or what the schedule has left of it.
    fn epoch(&mut self, epoch: usize, control: &mut Control) -> Result<()> {
        let order = match self.hyperparameters.order {
            Order::Shuffled => {
                random::permutation(self.data.len(), Key::derive(self.seed, Purpose::Order, epoch as u64))
            }
            Order::Sequential => (0..self.data.len()).collect(),
        };
        let on_gpu = self.classifier.parameters.device().is_cuda();
        let mut last_loss = f64::NAN;
        for examples in order.chunks(self.hyperparameters.batch_size) {
            if self.step == self.schedule.total {
                break;
            }
            control.check()?;
            let loss = self.step(examples)?;
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
}

/// The best epoch so far.
#[derive(Default)]
struct Selection {
    best: Option<Best>,
    epochs_without_gain: usize,
}

struct Best {
    headline: f64,
    values: Tensor,
    step: u64,
}

impl Selection {
    /// Takes an epoch's score in; among equals the earlier epoch stays the best, and a score that is no number never is
    /// better than one that is.
    fn consider(&mut self, trainer: &Trainer, headline: f64) -> Result<()> {
        let worse = |best: &Best| !(headline > best.headline || best.headline.is_nan() && !headline.is_nan());
        if self.best.as_ref().is_some_and(worse) {
            self.epochs_without_gain += 1;
            return Ok(());
        }
        let values = trainer.classifier.parameters.values_copy()?;
        self.best = Some(Best { headline, values, step: trainer.step });
        self.epochs_without_gain = 0;
        Ok(())
    }
}
