//! A run in progress: its optimizer steps, one at a time.

use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Tensor};

use super::hyperparameters::Hyperparameters;
use super::memory::micro_batch_of_training;
use super::optimizer::{Clip, Optimizer};
use super::prepare::trainable;
use super::pull::Pulls;
use super::schedule::Schedule;
use super::step_graphs::{self, StepGraphs};
use super::step_weights::{StepWeights, plain_weights};
use crate::child::{GradientHooks, norm_of_spans, squares_of_spans};
use crate::data::EncodedDataset;
use crate::error::Result;
use crate::libtorch::release_cached_memory;
use crate::locking::locked;
use crate::method::{ClipOrder, Outside, PassSettings, Passes, Prepared, PullStrength, TrainingPoint};
use crate::model::{Classifier, Dropout, Parameter, Parameters, Precision, Trainable, loss, span};
use crate::random::Purpose;

/// A run in progress: a model, its data, and what the next step needs.
pub struct Trainer<'a> {
    pub(super) classifier: &'a mut Classifier,
    pub(super) data: &'a EncodedDataset,
    pub(super) hyperparameters: &'a Hyperparameters,
    pub(super) prepared: Prepared,
    pub(super) trainable: Trainable,
    pulls: Pulls,
    masking: Masking,
    /// Shared with the hooks of a run that updates each parameter in backward.
    optimizer: Arc<Mutex<Optimizer>>,
    pub(super) schedule: Schedule,
    /// Examples of one pass; halved when memory runs out.
    pub(super) micro_batch: usize,
    /// Whether batches have few numbers of tokens: for each, oneDNN compiles kernels for its products in bfloat16.
    rounds_batches: bool,
    pub(super) seed: u64,
    pub(super) step: u64,
    pub(super) tokens: u64,
    pub(super) examples: u64,
    /// Removed when the run ends, so that the next run's gradients are its own.
    hooks: GradientHooks,
    /// The last to go: what is above was made on its stream.
    graphs: Option<StepGraphs>,
}

/// Where gradients meet the mask.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Masking {
    /// In the hooks that collect them.
    Hooks,
    /// In the buffer, before or after the norm is taken of it.
    Buffer,
    /// In the optimizer, which reads gradients through it.
    Optimizer,
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
        Self::with_warm_up(classifier, data, hyperparameters, prepared, seed, step_graphs::WARM_UP)
    }

    /// Starts a run as [`Trainer::new`] does, with passes that are recorded after `warm_up` passes of their shape, where the
    /// hyperparameters ask for it.
    ///
    /// # Errors
    /// As for [`Trainer::new`].
    pub fn with_warm_up(
        classifier: &'a mut Classifier,
        data: &'a EncodedDataset,
        hyperparameters: &'a Hyperparameters,
        mut prepared: Prepared,
        seed: u64,
        warm_up: usize,
    ) -> Result<Self> {
        // First, since autograd notes on which stream a leaf is used at first.
        let graphs = match prepared.parts.has_plain_passes() {
            true => StepGraphs::prepare(hyperparameters, warm_up, classifier)?,
            false => None,
        };
        classifier.keep_start()?;
        let child = prepared.mask.as_ref().and_then(|mask| mask.child());
        if let (Outside::Prune, Some(child)) = (prepared.outside, child) {
            child.prune(&classifier.parameters)?;
        }
        let trainable = trainable(classifier, data, hyperparameters, &prepared);
        let pulls = std::mem::take(&mut prepared.parts.pulls);
        let (pulls, weight_decay) = Pulls::new(pulls, hyperparameters.weight_decay, prepared.decayed());
        let parameters = &mut classifier.parameters;
        let settings = Hyperparameters { weight_decay, ..hyperparameters.clone() };
        let weights = parameters.compute_weights(hyperparameters.pass_precision().kind())?;
        let mask = prepared.mask.as_ref();
        let optimizer = Optimizer::new(parameters, &trainable, &settings, mask, prepared.decay)?;
        let optimizer = Arc::new(Mutex::new(optimizer));
        let trains = |parameter: &Parameter| trainable.holds(parameter);
        // A replay does not mask, since a record would repeat one step's mask; and the mask is on what pulls add, too.
        let late = graphs.is_some() || pulls.reach_gradients() || prepared.clip == ClipOrder::BeforeMask;
        let masking = match locked(&optimizer).masks() {
            true => Masking::Optimizer,
            false if late => Masking::Buffer,
            false => Masking::Hooks,
        };
        let hooks = if hyperparameters.release_gradients {
            parameters.free_gradients();
            // `data` has a version counter of its own: autograd would take an update in place for a change of a weight that it
            // has saved for backward, though this one has been used for the last time.
            let (optimizer, values) = (optimizer.clone(), parameters.values_to_change().f_data()?);
            let mask = prepared.mask.as_ref().filter(|_| masking != Masking::Optimizer);
            GradientHooks::hand_on(parameters, &weights, trains, mask, move |parameter, gradient| {
                let mut values = span(&values, &parameter.range)?;
                locked(&optimizer).apply(&mut values, gradient, parameter.range.start, &Clip::Factor(1.0))
            })?
        } else {
            let mask = prepared.mask.as_ref().filter(|_| masking == Masking::Hooks);
            GradientHooks::collect(parameters, &weights, trains, mask)?
        };
        let total = hyperparameters.total_steps(data.len());
        let warmup = hyperparameters.warmup.steps(total);
        let learning_rate = hyperparameters.learning_rate;
        let passes_held = prepared.parts.passes_held();
        let state = locked(&optimizer).state_bytes();
        let micro_batch = micro_batch_of_training(classifier, data, hyperparameters, passes_held, state)?;
        let rounds_batches = classifier.parameters.device() == Device::Cpu
            && hyperparameters.pass_precision() == Precision::Bf16
            && prepared.parts.has_plain_passes()
            && classifier.own_shape()?.reads_packed_tokens;
        Ok(Self {
            optimizer,
            trainable,
            pulls,
            masking,
            schedule: Schedule { learning_rate, warmup, total },
            micro_batch,
            rounds_batches,
            classifier,
            data,
            hyperparameters,
            prepared,
            seed,
            step: 0,
            tokens: 0,
            examples: 0,
            hooks,
            graphs,
        })
    }

    /// Takes one optimizer step over the examples with the given numbers. Returns their mean loss, on the device.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn step(&mut self, examples: &[usize]) -> Result<Tensor> {
        let device = self.classifier.parameters.device();
        let _products = self.hyperparameters.pass_precision().matrix_products(device)?;
        if let Some(mask) = &self.prepared.mask {
            mask.begin_step(self.step)?;
        }
        let (learning_rate, pull) = (self.schedule.at(self.step), self.pulls.at(self.step));
        locked(&self.optimizer).begin_step(learning_rate, pull.update_factor);
        let mean_loss = loop {
            self.hooks.begin_step();
            match self.accumulate(examples) {
                Err(error) if error.is_out_of_memory() && self.halve_micro_batch() => {}
                outcome => break outcome?,
            }
        };
        if self.hyperparameters.release_gradients {
            // In backward, through a view.
            self.classifier.parameters.note_changed();
        } else {
            self.hooks.end_step()?;
            self.update(learning_rate, &pull)?;
        }
        self.step += 1;
        self.examples += examples.len() as u64;
        self.tokens += self.data.tokens_of(examples) as u64;
        Ok(mean_loss)
    }

    /// Updates the weights with the gradients that the hooks have collected.
    fn update(&mut self, learning_rate: f64, pull: &PullStrength) -> Result<()> {
        let (parameters, trainable) = (&self.classifier.parameters, &self.trainable);
        let mut values = parameters.values_to_change();
        let start = self.classifier.start().unwrap_or(&values).shallow_clone();
        let gradients = parameters.gradients()?;
        let mask = self.prepared.mask.as_ref();
        if let Some(mask) = mask {
            mask.observe(parameters, |parameter| trainable.holds(parameter))?;
        }
        if self.pulls.reach_gradients() {
            self.pulls.on_gradients(pull, trainable, [gradients, &values, &start])?;
            self.hooks.note_changed();
        }
        let masks_now = |order| self.masking == Masking::Buffer && self.prepared.clip == order;
        if let Some(mask) = mask.filter(|_| masks_now(ClipOrder::AfterMask)) {
            mask.apply_to_all(parameters)?;
        }
        let clip = self.clip()?;
        if let Some(mask) = mask.filter(|_| masks_now(ClipOrder::BeforeMask)) {
            mask.apply_to_all(parameters)?;
        }
        self.pulls.before_update(pull, learning_rate, trainable, [&values, &start])?;
        let mut optimizer = locked(&self.optimizer);
        optimizer.apply(&mut values, gradients, 0, &clip)?;
        self.pulls.after_update(pull, learning_rate, trainable, [&values, &start])?;
        if let Some(copy) = parameters.half_copy()
            && optimizer.keeps_copy()
            && self.pulls.is_empty()
        {
            copy.mark_fresh();
        }
        Ok(())
    }

    /// Returns the parameters as they are now.
    pub fn parameters(&self) -> &Parameters {
        &self.classifier.parameters
    }

    /// Returns the bytes of the optimizer's state.
    pub fn optimizer_bytes(&self) -> usize {
        locked(&self.optimizer).state_bytes()
    }

    /// Runs examples forward and backward, micro-batch by micro-batch; the hooks collect what comes out. Returns their mean
    /// loss, on the device.
    fn accumulate(&mut self, examples: &[usize]) -> Result<Tensor> {
        let device = self.classifier.parameters.device();
        if let Some(graphs) = self.graphs.as_mut().filter(|_| examples.len() <= self.micro_batch) {
            let precision = self.hyperparameters.pass_precision();
            let weights = plain_weights(&self.classifier.parameters, &self.trainable, precision)?;
            let dropout = Dropout::new(self.seed, Purpose::Dropout, self.step, 0, device)?;
            return graphs.run(self.classifier, &weights, &self.hooks, (self.data, examples), dropout);
        }
        let mut mean_loss = Tensor::f_zeros([], (Kind::Float, device))?;
        for (part, micro_batch) in examples.chunks(self.micro_batch).enumerate() {
            let loss = self.backward(micro_batch, part * self.micro_batch, examples.len())?;
            mean_loss = mean_loss.f_add(&loss)?;
        }
        Ok(mean_loss)
    }

    /// Runs a micro-batch forward and backward, of a step over so many examples, of which it begins with number `first_slot`.
    /// Returns its part of the step's mean loss, on the device.
    fn backward(&self, micro_batch: &[usize], first_slot: usize, examples: usize) -> Result<Tensor> {
        let device = self.classifier.parameters.device();
        let (batch, targets) = match self.rounds_batches {
            true => self.data.rounded_batch(micro_batch, first_slot, device)?,
            false => self.data.batch(micro_batch, first_slot, device)?,
        };
        let weights = self.weights()?;
        let parts = &self.prepared.parts;
        let settings = PassSettings {
            seed: self.seed,
            step: self.step,
            first_slot,
            dropout: parts.dropout,
            hidden_noise: parts.hidden_noise,
            checkpointing: self.hyperparameters.gradient_checkpointing,
            places: if parts.weights.is_empty() { self.hooks.places() } else { &[] },
        };
        let passes = Passes::new(self.classifier, &weights.used, (&batch, &targets), examples, settings);
        let logits = passes.logits()?;
        let mut total = loss(&logits, &targets, examples)?;
        for penalty in &parts.penalties {
            total = total.f_add(&penalty.term(&passes, &logits)?)?;
        }
        passes.backward(&total)?;
        weights.backward()?;
        Ok(total.f_detach()?)
    }

    /// Returns the weights of the passes over a micro-batch, as the method's transforms make them.
    fn weights(&self) -> Result<StepWeights> {
        let mut used = plain_weights(
            &self.classifier.parameters,
            &self.trainable,
            self.hyperparameters.pass_precision(),
        )?;
        let transforms = &self.prepared.parts.weights;
        if transforms.is_empty() {
            return Ok(StepWeights::plain(used));
        }
        let parameters = &self.classifier.parameters;
        let start = self.classifier.start().unwrap_or(parameters.values());
        let output = self.classifier.output_weight();
        let mask = self.prepared.mask.as_deref();
        let at = TrainingPoint { parameters, start, output, seed: self.seed, step: self.step, mask };
        let leaves: Vec<Tensor> = used.iter().map(Tensor::shallow_clone).collect();
        for transform in transforms {
            transform.apply(&mut used, &at)?;
        }
        StepWeights::new(used, &leaves)
    }

    /// Returns how many examples a pass has at most; fewer than at the start once memory has run out.
    pub fn micro_batch(&self) -> usize {
        self.micro_batch
    }

    /// Returns how many shapes of batches have a record that stands for their passes; none but with `cuda_graphs` on a GPU.
    pub fn recorded_shapes(&self) -> usize {
        self.graphs.as_ref().map_or(0, StepGraphs::shapes)
    }

    /// Halves the micro-batch, if a step can be taken again with smaller ones.
    fn halve_micro_batch(&mut self) -> bool {
        let again = self.micro_batch > 1 && !self.hyperparameters.release_gradients;
        if again {
            self.micro_batch = self.micro_batch.div_ceil(2);
            if let Some(graphs) = &mut self.graphs {
                graphs.forget();
            }
            // What cannot be given back stays for the next try.
            let _ = release_cached_memory(self.classifier.parameters.device());
        }
        again
    }

    /// Returns how to scale all gradients so that their global norm is at most the limit
    /// (`torch.nn.utils.clip_grad_norm_`), without waiting for a GPU.
    fn clip(&self) -> Result<Clip> {
        let Some(limit) = self.hyperparameters.max_gradient_norm else { return Ok(Clip::Factor(1.0)) };
        let parameters = &self.classifier.parameters;
        let gradients = parameters.gradients()?;
        if !parameters.device().is_cuda() {
            let norm = match self.pulls.reach_gradients() {
                true => norm_of_spans(gradients, &self.trainable.spans)?,
                false => self.hooks.norm(),
            };
            return Ok(Clip::to(limit, norm));
        }
        let squares = match (self.masking, self.prepared.clip) {
            (Masking::Optimizer, ClipOrder::AfterMask) => locked(&self.optimizer).squares(gradients)?,
            _ => squares_of_spans(gradients, &self.trainable.spans)?,
        };
        Clip::on_device(limit, &squares)
    }
}
