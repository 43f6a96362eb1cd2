//! The optimizer of a run, whichever it is.

use super::hyperparameters::{Hyperparameters, OptimizerRule};
use super::optimizer::AdamW;
use super::sgd::Sgd;
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::model::{Parameters, Trainable};

/// What turns gradients into steps.
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Plain stochastic gradient descent.
    Sgd(Sgd),
}

impl Optimizer {
    /// Makes the optimizer that the hyper-parameters ask for, for the parameters that train.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        parameters: &Parameters,
        trainable: &Trainable,
        hyperparameters: &Hyperparameters,
    ) -> Result<Self> {
        Ok(match hyperparameters.optimizer {
            OptimizerRule::Adamw => Optimizer::AdamW(AdamW::new(parameters, trainable, hyperparameters)?),
            OptimizerRule::Sgd => Optimizer::Sgd(Sgd::new(trainable, hyperparameters)),
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        match self {
            Optimizer::AdamW(adamw) => adamw.state_bytes(),
            Optimizer::Sgd(_) => 0,
        }
    }

    /// Applies one step with the accumulated gradients. With `decayed`, weight decay touches only the members of that
    /// child network, and all other weights keep every bit.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn step(
        &mut self,
        parameters: &Parameters,
        learning_rate: f64,
        decayed: Option<&ChildNetwork>,
    ) -> Result<()> {
        match self {
            Optimizer::AdamW(adamw) => adamw.step(parameters, learning_rate, decayed),
            Optimizer::Sgd(sgd) => sgd.step(parameters, learning_rate, decayed),
        }
    }
}
