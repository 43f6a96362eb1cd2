//! The optimizer of a run, whichever it is.

use std::sync::Arc;

use tch::Tensor;

use super::adamw::AdamW;
use super::hyperparameters::{Hyperparameters, OptimizerRule};
use super::sgd::Sgd;
use crate::child::ChildNetwork;
use crate::error::Result;
use crate::method::DecayScope;
use crate::model::{Parameters, Trainable};

/// What turns gradients into steps.
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Plain stochastic gradient descent.
    Sgd(Sgd),
}

/// How clipping scales the gradients of a step.
pub enum Clip {
    /// By this factor, known to the host.
    Factor(f32),
    /// By one over this scalar, which stays on the device so that nobody waits for it.
    Divisor(Tensor),
}

impl Clip {
    /// Scales gradients of a norm that the host knows to one of at most `limit`. A norm that is no number makes all gradients so,
    /// and the weights with them, as `clip_grad_norm_` does.
    pub(super) fn to(limit: f64, norm: f64) -> Self {
        let factor = limit / (norm + 1e-6);
        Clip::Factor(if factor > 1.0 { 1.0 } else { factor as f32 })
    }
}

impl Optimizer {
    /// Makes the optimizer that the hyper-parameters ask for, for the parameters that train. With a fixed `child` network, weight
    /// decay may be kept to its members; all other weights keep every bit then.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        parameters: &Parameters,
        trainable: &Trainable,
        hyperparameters: &Hyperparameters,
        child: Option<&Arc<ChildNetwork>>,
        decay: DecayScope,
    ) -> Result<Self> {
        Ok(match hyperparameters.optimizer {
            OptimizerRule::Adamw => {
                Optimizer::AdamW(AdamW::new(parameters, trainable, hyperparameters, child, decay)?)
            }
            OptimizerRule::Sgd => Optimizer::Sgd(Sgd::new(trainable, hyperparameters, child, decay)),
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        match self {
            Optimizer::AdamW(adamw) => adamw.state_bytes(),
            Optimizer::Sgd(_) => 0,
        }
    }

    /// Returns whether updates read the gradients of a fixed child network's members only, so that nobody else has to mask them.
    pub fn gathers(&self) -> bool {
        match self {
            Optimizer::AdamW(adamw) => adamw.gathers(),
            Optimizer::Sgd(_) => false,
        }
    }

    /// Returns the norm of each group of gradients that updates will gather from the whole buffer, as scalars on its device: the
    /// norm of these norms is the global norm. None if the optimizer does not gather.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn norms(&self, gradients: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Optimizer::AdamW(adamw) => adamw.norms(gradients),
            Optimizer::Sgd(_) => Ok(Vec::new()),
        }
    }

    /// Starts a step. `pretrained_factor` is on the update, without decay, of weights that have pretrained values
    /// ([`Treatment::pretrained`](crate::model::Treatment)).
    pub fn begin_step(&mut self, learning_rate: f64, pretrained_factor: f64) {
        match self {
            Optimizer::AdamW(adamw) => adamw.begin_step(learning_rate, pretrained_factor),
            Optimizer::Sgd(sgd) => sgd.begin_step(learning_rate, pretrained_factor),
        }
    }

    /// Updates weights with their gradients, both the part of the flat buffer that begins at `start`: the whole buffer, or one
    /// parameter. Gradients are masked already unless [`Optimizer::gathers`] says that they need not be.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn apply(
        &mut self,
        values: &mut Tensor,
        gradients: &Tensor,
        start: usize,
        clip: &Clip,
    ) -> Result<()> {
        match self {
            Optimizer::AdamW(adamw) => adamw.apply(values, gradients, start, clip),
            Optimizer::Sgd(sgd) => sgd.apply(values, gradients, start, clip),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_become_shorter_never_longer_and_what_is_no_number_is_not_hidden() {
        let factor = |norm: f64| match Clip::to(1.0, norm) {
            Clip::Factor(factor) => factor,
            Clip::Divisor(_) => unreachable!("the host knows the norm"),
        };
        assert_eq!(factor(4.0), (1.0 / (4.0 + 1e-6)) as f32);
        assert_eq!([0.5, 0.0, f64::INFINITY].map(factor), [1.0, 1.0, 0.0]);
        assert!(factor(f64::NAN).is_nan());
    }
}
