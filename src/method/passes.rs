//! The passes over one micro-batch that make up one loss.

use std::cell::{Cell, RefCell};

use tch::Tensor;

use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::GradientPlace;
use crate::model::{Classifier, Dropout, Noise, Pass, Shift};
use crate::random::{Key, Purpose};

/// How the passes of a step run.
#[derive(Clone, Copy)]
pub struct PassSettings<'a> {
    /// The run's seed.
    pub seed: u64,
    /// The number of the optimizer step, from 0.
    pub step: u64,
    /// The number of the micro-batch's first example in its step.
    pub first_slot: usize,
    /// Whether the model's dropout is on.
    pub dropout: bool,
    /// Noise on what enters each layer.
    pub hidden_noise: Option<Noise>,
    /// Whether backward computes the layers again.
    pub checkpointing: bool,
    /// Where gradients are wanted, by parameter, if the weights are the leaves ([`Pass::collecting`]).
    pub places: &'a [Option<GradientPlace>],
}

/// The passes over one micro-batch: the first, and those that penalties ask for, each with dropout and noise of its own.
pub struct Passes<'a> {
    /// The right answers.
    pub targets: &'a Tensor,
    /// The number of examples of the optimizer step.
    pub examples: usize,
    classifier: &'a Classifier,
    weights: &'a [Tensor],
    batch: &'a PackedBatch,
    settings: PassSettings<'a>,
    begun: Cell<u64>,
    run: RefCell<Vec<Run<'a>>>,
}

/// A pass that was run.
struct Run<'a> {
    pass: Pass<'a>,
    logits: Tensor,
    /// The logits as a leaf, which losses are made of.
    leaf: Tensor,
}

impl<'a> Passes<'a> {
    /// Makes the passes over a micro-batch of a step of so many `examples`.
    pub fn new(
        classifier: &'a Classifier,
        weights: &'a [Tensor],
        (batch, targets): (&'a PackedBatch, &'a Tensor),
        examples: usize,
        settings: PassSettings<'a>,
    ) -> Self {
        let (begun, run) = (Cell::new(0), RefCell::default());
        Self { targets, examples, classifier, weights, batch, settings, begun, run }
    }

    /// Runs a pass: `[examples, outputs]` in float32.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn logits(&self) -> Result<Tensor> {
        self.run(self.begin(self.weights)?)
    }

    /// Runs a pass with shifted embeddings of words: `[examples, outputs]` in float32.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn shifted_logits(&self, shift: Shift) -> Result<Tensor> {
        self.run(self.begin(self.weights)?.shifted(shift))
    }

    /// Runs a pass with `shift` added to the embeddings of words, `[tokens, width]`, whose weights are constants, to learn what
    /// the shift does. [`Passes::backward`] does not go through it.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn logits_of_shift(&self, shift: &Tensor) -> Result<Tensor> {
        let weights: Vec<Tensor> = self.weights.iter().map(Tensor::f_detach).collect::<Result<_, _>>()?;
        let settings = PassSettings { checkpointing: false, places: &[], ..self.settings };
        let pass = begin(&weights, self.batch, settings, self.number())?;
        self.classifier.logits(&pass.shifted(Shift { by: shift.shallow_clone(), of_constants: true }))
    }

    /// Draws noise for the embeddings of words, `[tokens, width]`. Noises of the same `site` are the same within a step.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn embedding_noise(&self, noise: Noise, site: u32) -> Result<Tensor> {
        let key = Key::derive(self.settings.seed, Purpose::Noise, self.settings.step);
        noise.tokens(key, site, self.classifier.embedding_width(), self.batch)
    }

    /// Computes the gradients of a loss that came out of these passes, of one after the other: so they add up to the same bits
    /// with and without checkpointing, and each graph goes when it is used.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        loss.f_backward()?;
        for Run { pass, logits, leaf } in self.run.take() {
            // The derivative of Σ logits · gradient.
            pass.backward(&logits.f_mul(&leaf.f_grad()?)?.f_sum(logits.kind())?)?;
        }
        Ok(())
    }

    fn run(&self, pass: Pass<'a>) -> Result<Tensor> {
        let logits = self.classifier.logits(&pass)?;
        let leaf = logits.f_detach()?.f_set_requires_grad(true)?;
        self.run.borrow_mut().push(Run { pass, logits, leaf: leaf.shallow_clone() });
        Ok(leaf)
    }

    fn begin(&self, weights: &'a [Tensor]) -> Result<Pass<'a>> {
        begin(weights, self.batch, self.settings, self.number())
    }

    /// Numbers the passes.
    fn number(&self) -> u64 {
        self.begun.replace(self.begun.get() + 1)
    }
}

/// Starts a pass; the first is that of plain fine-tuning.
fn begin<'a>(
    weights: &'a [Tensor],
    batch: &'a PackedBatch,
    settings: PassSettings<'a>,
    number: u64,
) -> Result<Pass<'a>> {
    let PassSettings { seed, step, first_slot, places, .. } = settings;
    let key = |first: Purpose, further: Purpose| match number {
        0 => Key::derive(seed, first, step),
        1 => Key::derive(seed, further, step),
        _ => Key::derive(seed, further, step).of_part(number),
    };
    let device = batch.input_ids.device();
    let dropout = || Dropout::of_key(key(Purpose::Dropout, Purpose::SecondDropout), first_slot, device);
    let mut pass = Pass::new(weights, batch, settings.dropout.then(dropout).transpose()?).collecting(places);
    if let Some(noise) = settings.hidden_noise {
        pass = pass.with_noise(noise, key(Purpose::Noise, Purpose::SecondNoise));
    }
    Ok(if settings.checkpointing { pass.checkpointed() } else { pass })
}
