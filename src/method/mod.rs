//! Fine-tuning methods: what is done otherwise than in plain fine-tuning.
//!
//! A method is one file and one name in `registry.rs`. It reads its options from YAML, says which parameters train and how fast,
//! which [`Parts`] it adds to the training step, and before training turns its options into a [`Prepared`] plan: the gradient
//! mask, where it meets clipping, and what weight decay may touch. A list of methods is one method, composed of them.

mod bitfit;
mod child_tuning_d;
mod child_tuning_f;
mod composed;
mod criterion;
mod divergence;
mod dps;
mod fish_mask;
mod hype;
mod l2_sp;
mod layer_wise_rates;
mod lora;
mod lt_sft;
mod magnitude_mask;
mod mixed_weights;
mod mixout;
mod parts;
mod passes;
mod prior_weight_decay;
mod r3f;
mod r4f;
mod r_drop;
mod recadam;
mod registry;
mod reinitialised_layers;
// The example of docs/methods.md.
#[cfg(test)]
mod saliency_mask;
mod sift;
mod smart;
mod sparse_mask;
mod top_layers;
mod vanilla;

pub use composed::option_list;
pub use parts::{DecayOrder, Parts, Penalty, Pull, PullStrength, TrainingPoint, WeightTransform};
pub use passes::{PassSettings, Passes};
pub use registry::{METHODS, MethodSpec};

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::child::{ChildNetwork, GradientMask, MaskScope, Uncertainty};
use crate::data::{EncodedDataset, Order};
use crate::error::{Error, Result};
use crate::model::{Classifier, Parameter, ParameterTable, Precision, layers_of};

/// Which description of Child-Tuning fills in what the experiment leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// The paper's text.
    #[default]
    Paper,
    /// The code released with it.
    Official,
}

/// Whether the gradient norm is clipped before or after the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipOrder {
    /// The mask acts in the backward pass; the norm of what is left is clipped.
    AfterMask,
    /// The full gradient is clipped, then masked, as in the released code.
    BeforeMask,
}

/// The weights that weight decay touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayScope {
    /// The child network's only: all others keep every bit of the checkpoint.
    Child,
    /// All weights, as in the released code.
    All,
}

/// What becomes of the weights outside a fixed child network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outside {
    /// They keep the checkpoint's values.
    #[default]
    Freeze,
    /// They are set to zero before training and stay so.
    Prune,
}

/// What becomes of a mask on the gradients in the course of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskKind {
    /// It is drawn anew at every step.
    Bernoulli,
    /// The gradients of the steps before choose it.
    Adaptive,
    /// It stays the same.
    Fixed,
}

/// A fine-tuning method with all its options settled.
pub trait Method: Send + Sync {
    /// Returns its name in YAML and results.
    fn name(&self) -> &str;

    /// Returns its options as canonical text, such as `p=0.3 scope=backbone`; equal texts are equal methods.
    fn options(&self) -> String;

    /// Returns whether it is plain fine-tuning, be it at another learning rate.
    fn is_vanilla(&self) -> bool {
        false
    }

    /// Returns whether it is one of the paper's; the released code trains those without warm-up.
    fn is_child_tuning(&self) -> bool {
        false
    }

    /// Returns how many of the training examples [`Method::prepare`] passes over.
    fn examples_passed(&self, _available: usize) -> usize {
        0
    }

    /// Returns whether [`Method::prepare`] fine-tunes the model once before.
    fn fine_tunes_first(&self) -> bool {
        false
    }

    /// Returns what kind of mask on the gradients [`Method::prepare`] gives, if it gives one.
    fn mask(&self) -> Option<MaskKind> {
        None
    }

    /// Returns whether a parameter trains, in a model with so many encoder layers; the others keep every bit.
    fn trains(&self, _parameter: &Parameter, _layers: usize) -> bool {
        true
    }

    /// Returns the factor on the learning rate of a parameter that trains, in a model with so many encoder layers.
    fn rate(&self, _parameter: &Parameter, _layers: usize) -> f64 {
        1.0
    }

    /// Returns whether it adds weights to a model ([`Method::further_weights`]).
    fn adds_weights(&self) -> bool {
        false
    }

    /// Returns the weights that it adds to a model that declares the given ones, for the time of a run.
    fn further_weights(&self, _declared: &[Parameter]) -> ParameterTable {
        ParameterTable::default()
    }

    /// Returns what it adds to the training step of one run.
    fn parts(&self) -> Parts {
        Parts::default()
    }

    /// Returns why it does not go together with another method, where no general rule says so.
    fn conflict(&self, _other: &dyn Method) -> Option<&'static str> {
        None
    }

    /// Returns whether it has no effect on a model without dropout.
    fn needs_dropout(&self) -> bool {
        false
    }

    /// Returns whether weights outside a mask are set to zero.
    fn prunes(&self) -> bool {
        false
    }

    /// Returns the share of the weights in a scope that train where the mask is fixed, in a model that declares the given
    /// parameters: the others never have moments.
    ///
    /// # Errors
    /// As for [`Method::check`].
    fn fixed_share(&self, _declared: &[Parameter]) -> Result<Option<(f64, MaskScope)>> {
        Ok(None)
    }

    /// Returns the bytes of what it keeps in training besides weights, gradients and optimizer state.
    fn state_bytes(&self, WeightsInUse { declared, .. }: WeightsInUse) -> usize {
        // A bit a weight.
        if self.mask() == Some(MaskKind::Fixed) { weights_of(declared, |_| true).div_ceil(8) } else { 0 }
    }

    /// Checks that the method fits a model that declares the given parameters, before anything trains: by itself that there are
    /// [`Method::layers_needed`].
    ///
    /// # Errors
    /// Fails, naming the option, if it asks for what the model does not have, or, naming the file, if something that the method
    /// reads belongs to another model.
    fn check(&self, declared: &[Parameter]) -> Result<()> {
        let (needed, layers) = (self.layers_needed(), layers_of(declared));
        if needed <= layers {
            return Ok(());
        }
        Err(Error::configuration(format!(
            "{}: the model has {layers} layers, and `{}` needs {needed}; ask for fewer",
            self.name(),
            self.options()
        )))
    }

    /// Returns how many encoder layers a model must have.
    fn layers_needed(&self) -> usize {
        0
    }

    /// Returns whether training starts from new values of a parameter, in a model with so many encoder layers.
    fn draws_anew(&self, _parameter: &Parameter, _layers: usize) -> bool {
        false
    }

    /// Changes the weights that training starts from, in a model that was reset for the run's seed, and adds its own.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn begin(&self, _classifier: &mut Classifier, _seed: u64) -> Result<()> {
        Ok(())
    }

    /// Does what comes before training, after [`Method::begin`]. The model's weights are as before afterwards.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or the user asks to stop.
    fn prepare(&self, _preparation: &mut Preparation) -> Result<Prepared> {
        Ok(Prepared::default())
    }
}

/// The weights of a model as training uses them.
#[derive(Clone, Copy)]
pub struct WeightsInUse<'a> {
    /// The parameters that the model declares.
    pub declared: &'a [Parameter],
    /// Whether passes use other values of a parameter from step to step.
    pub changes: &'a dyn Fn(&Parameter) -> bool,
    /// The bytes of a number in passes.
    pub number: usize,
}

/// Returns the number of weights of some parameters.
fn weights_of(declared: &[Parameter], chosen: impl Fn(&Parameter) -> bool) -> usize {
    declared.iter().filter(|parameter| chosen(parameter)).map(Parameter::count).sum()
}

/// What a method may ask of whoever trains, before training.
pub trait PreparationHost {
    /// Notes that a batch of so many examples was passed over.
    ///
    /// # Errors
    /// An error ends the preparation: the user asked to stop.
    fn progress(&mut self, examples: usize) -> Result<()>;

    /// Trains a model as the run will, but without masks, and all of it.
    ///
    /// # Errors
    /// As training: if it diverges, the user asks to stop, or libtorch refuses an operation.
    fn fine_tune(&mut self, classifier: &mut Classifier) -> Result<()>;

    /// Puts a model back to where training starts, bit for bit.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    fn rewind(&mut self, classifier: &mut Classifier) -> Result<()>;
}

/// What a method may use to prepare a run.
pub struct Preparation<'a> {
    /// The model, reset for the run's seed.
    pub classifier: &'a mut Classifier,
    /// The training data.
    pub data: &'a EncodedDataset,
    /// The run's seed.
    pub seed: u64,
    /// The number of examples of an optimizer step.
    pub batch_size: usize,
    /// The number of examples of one pass, at most `batch_size`.
    pub micro_batch: usize,
    /// The number type of the run's passes.
    pub precision: Precision,
    /// The order of the run's training examples.
    pub order: Order,
    /// The number of optimizer steps of the run.
    pub steps: u64,
    /// Whoever trains.
    pub host: &'a mut dyn PreparationHost,
}

/// What training does differently from plain fine-tuning.
pub struct Prepared {
    /// The mask on the gradients.
    pub mask: Option<Arc<GradientMask>>,
    /// Where the mask meets clipping.
    pub clip: ClipOrder,
    /// What weight decay touches.
    pub decay: DecayScope,
    /// What becomes of the weights outside a fixed mask.
    pub outside: Outside,
    /// What the method adds to the training step.
    pub parts: Parts,
    /// The names of the parameters that do not train.
    pub frozen: HashSet<String>,
    /// Factors on the learning rate by the name of the parameter; 1 for those that are not there.
    pub rates: HashMap<String, f64>,
    /// How uncertain the mask is, where it was chosen by a part of the training data.
    pub fisher: Option<Uncertainty>,
}

impl Prepared {
    /// Returns the fixed child network that training is kept to, if there is one.
    pub fn child(&self) -> Option<&Arc<ChildNetwork>> {
        self.mask.as_deref().and_then(GradientMask::restriction)
    }

    /// Returns the fixed child network that alone decays, where decay is kept to one.
    pub fn decayed(&self) -> Option<Arc<ChildNetwork>> {
        self.child().filter(|_| self.decay == DecayScope::Child).cloned()
    }
}

impl Default for Prepared {
    /// Plain fine-tuning.
    fn default() -> Self {
        Self {
            mask: None,
            clip: ClipOrder::AfterMask,
            decay: DecayScope::All,
            outside: Outside::Freeze,
            parts: Parts::default(),
            frozen: HashSet::new(),
            rates: HashMap::new(),
            fisher: None,
        }
    }
}
