//! What a method changes in a training step besides masks: terms of the loss, the weights that passes use, noise, and what
//! holds weights near to their start.

use tch::Tensor;

use super::passes::Passes;
use crate::child::GradientMask;
use crate::error::Result;
use crate::model::{Noise, ParameterId, Parameters};

/// The parts that a method adds to the training step. Each is made for one run and may keep state from step to step.
///
/// A step uses them in this order: `weights` make what the passes use out of what trains; `penalties` add to the loss, and
/// `hidden_noise` is in all passes; `pulls` add to gradients before masks and clipping, and move weights before and after the
/// optimizer's update.
pub struct Parts {
    /// Terms that are added to the loss.
    pub penalties: Vec<Box<dyn Penalty>>,
    /// What the passes of training use in place of the weights, in the order in which they apply.
    pub weights: Vec<Box<dyn WeightTransform>>,
    /// What holds weights near to those that training started from.
    pub pulls: Vec<Box<dyn Pull>>,
    /// Noise on the hidden states that enter each layer.
    pub hidden_noise: Option<Noise>,
    /// Whether the model's dropout is on in training.
    pub dropout: bool,
}

impl Default for Parts {
    /// Plain fine-tuning.
    fn default() -> Self {
        Self {
            penalties: Vec::new(),
            weights: Vec::new(),
            pulls: Vec::new(),
            hidden_noise: None,
            dropout: true,
        }
    }
}

impl Parts {
    /// Returns the parts of two methods together, those of `self` first.
    pub fn and(mut self, other: Self) -> Self {
        self.penalties.extend(other.penalties);
        self.weights.extend(other.weights);
        self.pulls.extend(other.pulls);
        self.hidden_noise = self.hidden_noise.or(other.hidden_noise);
        self.dropout &= other.dropout;
        self
    }

    /// Returns whether pulls make gradients more than those of the loss.
    pub fn reach_gradients(&self) -> bool {
        self.pulls.iter().any(|pull| pull.reaches_gradients())
    }

    /// Returns the number of forward passes over each example of a step, of a regression or a classification.
    pub fn passes(&self, regression: bool) -> usize {
        1 + self.penalties.iter().map(|penalty| penalty.further_passes(regression)).sum::<usize>()
    }

    /// Returns the number of passes that backward goes through at once.
    pub fn passes_held(&self) -> usize {
        1 + self.penalties.len()
    }

    /// Returns whether a step runs as in plain fine-tuning up to its gradients.
    pub fn has_plain_passes(&self) -> bool {
        self.penalties.is_empty() && self.weights.is_empty() && self.hidden_noise.is_none() && self.dropout
    }
}

/// A term that is added to the loss.
pub trait Penalty: Send {
    /// Returns the number of forward passes that it needs besides the first, of a regression or a classification.
    fn further_passes(&self, regression: bool) -> usize;

    /// Computes the term for the examples of a micro-batch, divided by the number of examples of the step: a float32 scalar.
    /// `logits` are those of the first pass, `[examples, outputs]` in float32; as all of [`Passes`] they are leaves of the loss's
    /// graph.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn term(&self, passes: &Passes, logits: &Tensor) -> Result<Tensor>;
}

/// What the passes of training use in place of weights.
pub trait WeightTransform: Send {
    /// Replaces some of the weights of a pass, given in the order of declaration and in the type that the pass computes in,
    /// by differentiable functions of them. All micro-batches of a step get the same.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()>;

    /// Returns whether a model is scored with other weights than those that train, which [`WeightTransform::settle`] writes.
    fn settles(&self) -> bool {
        false
    }

    /// Writes the weights that the model is scored and kept with.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn settle(&self, _parameters: &Parameters, _start: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Where training stands when weights are transformed.
pub struct TrainingPoint<'a> {
    /// The parameters of the model.
    pub parameters: &'a Parameters,
    /// The values of all parameters that the checkpoint brought, `[total]` in float32.
    pub start: &'a Tensor,
    /// The matrix of the head's last layer.
    pub output: ParameterId,
    /// The run's seed.
    pub seed: u64,
    /// The number of the optimizer step, from 0.
    pub step: u64,
    /// The mask on the gradients of the step.
    pub mask: Option<&'a GradientMask>,
}

/// What holds weights near to those that training started from.
pub trait Pull: Send {
    /// Returns the strengths of a step, numbered from 0.
    fn at(&self, step: u64) -> PullStrength;

    /// Returns whether it has [`PullStrength::on_gradients`] in any step, so that gradients are more than those of the loss.
    fn reaches_gradients(&self) -> bool {
        false
    }

    /// Returns what becomes of weight decay towards zero.
    fn decay(&self) -> DecayOrder {
        DecayOrder::WithUpdate
    }
}

/// When weights decay towards zero; where pulls differ, the later of these variants counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DecayOrder {
    /// Where the optimizer has it.
    WithUpdate,
    /// After [`PullStrength::after_update`].
    AfterPull,
    /// Nowhere: [`PullStrength::before_update`] takes its place.
    Replaced,
}

/// How strong pulls are in one step. Weights that training started from are w₀; new ones are pulled towards 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PullStrength {
    /// g ← g + α (w − w₀), or g + β w for new weights: (α, β).
    pub on_gradients: (f64, f64),
    /// w ← w − η λ (w − w₀) before the update for weights that decay, or w − η λ w for new ones among them: λ.
    pub before_update: f64,
    /// Factor on the optimizer's update of weights that training started from.
    pub update_factor: f64,
    /// w ← w − η γ (w − w₀) after the update; nothing for new weights: γ.
    pub after_update: f64,
}

impl Default for PullStrength {
    /// None.
    fn default() -> Self {
        Self { on_gradients: (0.0, 0.0), before_update: 0.0, update_factor: 1.0, after_update: 0.0 }
    }
}

impl PullStrength {
    /// Returns the strengths of two pulls together.
    pub fn and(self, other: Self) -> Self {
        let (pretrained, new) = self.on_gradients;
        Self {
            on_gradients: (pretrained + other.on_gradients.0, new + other.on_gradients.1),
            before_update: self.before_update + other.before_update,
            update_factor: self.update_factor * other.update_factor,
            after_update: self.after_update + other.after_update,
        }
    }
}
