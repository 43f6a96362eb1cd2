//! Fine-tuning methods: what happens to gradients between backward and the optimizer.
//!
//! A method is one file and one name in `registry.rs`. It reads its options from YAML, says which parameters train, and before
//! training turns its options into a [`Prepared`] plan: the gradient mask, where it meets clipping, and what weight decay may
//! touch. A list of methods is one method, composed of them.

mod bitfit;
mod child_tuning_d;
mod child_tuning_f;
mod composed;
mod fisher_pass;
mod registry;
mod top_layers;
mod vanilla;

pub use registry::{METHODS, MethodSpec};

use std::collections::HashSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::child::{GradientMask, MaskScope, Uncertainty};
use crate::data::EncodedDataset;
use crate::error::Result;
use crate::model::{Classifier, Parameter, Parameters, Precision};

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

/// A fine-tuning method with all its options settled.
pub trait Method: Send + Sync {
    /// Returns its name in YAML and results.
    fn name(&self) -> &str;

    /// Returns its options as canonical text, such as `p=0.3 scope=backbone`; equal texts are equal methods.
    fn options(&self) -> String;

    /// Returns whether it is one of the paper's; the released code trains those without warm-up.
    fn is_child_tuning(&self) -> bool {
        false
    }

    /// Returns how many of the training examples [`Method::prepare`] passes over.
    fn examples_passed(&self, _available: usize) -> usize {
        0
    }

    /// Returns whether [`Method::prepare`] gives a mask on the gradients.
    fn has_mask(&self) -> bool {
        false
    }

    /// Returns whether that mask stays the same for the whole run.
    fn has_fixed_mask(&self) -> bool {
        false
    }

    /// Returns whether a parameter trains, in a model with so many encoder layers; the others keep every bit.
    fn trains(&self, _parameter: &Parameter, _layers: usize) -> bool {
        true
    }

    /// Returns the share of the weights in a scope that train where the mask is fixed, as far as it is known beforehand: the
    /// others have no moments.
    fn fixed_share(&self) -> Option<(f64, MaskScope)> {
        None
    }

    /// Checks that the method fits a model, before anything trains.
    ///
    /// # Errors
    /// Fails, naming the file at fault, if something that the method reads belongs to another model.
    fn check(&self, _parameters: &Parameters) -> Result<()> {
        Ok(())
    }

    /// Does what comes before training. The model's weights are as before afterwards.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or the user asks to stop.
    fn prepare(&self, preparation: &mut Preparation) -> Result<Prepared>;
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
    /// The number type of the run's passes.
    pub precision: Precision,
    /// Whether examples are taken in another order than the file's.
    pub shuffled: bool,
    /// Told after each batch how many examples it had; an error ends the preparation.
    pub progress: &'a mut dyn FnMut(usize) -> Result<()>,
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
    /// Factor on the learning rate of the run.
    pub learning_rate_factor: f64,
    /// The names of the parameters that do not train.
    pub frozen: HashSet<String>,
    /// How uncertain the mask is, where it was chosen by a part of the training data.
    pub fisher: Option<Uncertainty>,
}

impl Default for Prepared {
    /// Plain fine-tuning.
    fn default() -> Self {
        Self {
            mask: None,
            clip: ClipOrder::AfterMask,
            decay: DecayScope::All,
            outside: Outside::Freeze,
            learning_rate_factor: 1.0,
            frozen: HashSet::new(),
            fisher: None,
        }
    }
}
