//! The optimizer of a run, whichever it is.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::adamw::AdamW;
use super::hyperparameters::{Hyperparameters, OptimizerRule};
use super::sgd::Sgd;
use crate::child::GradientMask;
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
    /// By this factor, `[1]` in float32, which stays on the device so that nobody waits for it.
    OnDevice(Tensor),
}

impl Clip {
    /// Scales gradients of a norm that the host knows to one of at most `limit`. A norm that is no number makes all gradients so,
    /// and the weights with them, as `clip_grad_norm_` does; but not those that the optimizer leaves out.
    pub(super) fn to(limit: f64, norm: f64) -> Self {
        let factor = limit / (norm + 1e-6);
        Clip::Factor(if factor > 1.0 { 1.0 } else { factor as f32 })
    }

    /// Scales gradients of a norm on a GPU to one of at most `limit`, without waiting for it: `squares` are sums that add up to its
    /// square.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub(super) fn on_device(limit: f64, squares: &[Tensor]) -> Result<Self> {
        let norm = Tensor::f_cat(squares, 0)?.f_sum(Kind::Double)?.f_sqrt()?.f_view([1])?;
        let factor = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(limit)?;
        Ok(Clip::OnDevice(factor.f_clamp_max(1.0)?.f_to_kind(Kind::Float)?))
    }
}

impl Optimizer {
    /// Makes the optimizer that the hyper-parameters ask for, for the parameters that train. With a `mask` that is a fixed child
    /// network, weight decay may be kept to its members; all other weights keep every bit then.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        parameters: &Parameters,
        trainable: &Trainable,
        hyperparameters: &Hyperparameters,
        mask: Option<&Arc<GradientMask>>,
        decay: DecayScope,
    ) -> Result<Self> {
        Ok(match hyperparameters.optimizer {
            OptimizerRule::Adamw => {
                Optimizer::AdamW(AdamW::new(parameters, trainable, hyperparameters, mask, decay)?)
            }
            OptimizerRule::Sgd => {
                let child = mask.and_then(|mask| mask.restriction());
                Optimizer::Sgd(Sgd::new(trainable, hyperparameters, child, decay))
            }
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        match self {
            Optimizer::AdamW(adamw) => adamw.state_bytes(),
            Optimizer::Sgd(_) => 0,
        }
    }

    /// Returns whether updates read gradients through the mask, so that nobody else has to mask them.
    pub fn masks(&self) -> bool {
        match self {
            Optimizer::AdamW(adamw) => adamw.masks(),
            Optimizer::Sgd(_) => false,
        }
    }

    /// Returns whether updates keep the weights in bfloat16 up to date that passes compute with
    /// ([`Parameters::half_copy`]).
    pub fn keeps_copy(&self) -> bool {
        match self {
            Optimizer::AdamW(adamw) => adamw.keeps_copy(),
            Optimizer::Sgd(_) => false,
        }
    }

    /// Returns sums on the device that add up to that of the squares of the gradients which updates will read through the mask, from
    /// the whole flat buffer; none if they do not.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn squares(&self, gradients: &Tensor) -> Result<Vec<Tensor>> {
        match self {
            Optimizer::AdamW(adamw) => adamw.squares(gradients),
            Optimizer::Sgd(_) => Ok(Vec::new()),
        }
    }

    /// Starts a step. `pretrained_factor` scales the update, but not the decay, of weights that have pretrained values
    /// ([`Treatment::pretrained`](crate::model::Treatment)).
    pub fn begin_step(&mut self, learning_rate: f64, pretrained_factor: f64) {
        match self {
            Optimizer::AdamW(adamw) => adamw.begin_step(learning_rate, pretrained_factor),
            Optimizer::Sgd(sgd) => sgd.begin_step(learning_rate, pretrained_factor),
        }
    }

    /// Updates weights with their gradients, both the part of the flat buffer that begins at `start`: the whole buffer, or one
    /// parameter. Gradients are masked already unless [`Optimizer::masks`] says that they need not be.
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
            Clip::OnDevice(_) => unreachable!("the host knows the norm"),
        };
        assert_eq!(factor(4.0), (1.0 / (4.0 + 1e-6)) as f32);
        assert_eq!([0.5, 0.0, f64::INFINITY].map(factor), [1.0, 1.0, 0.0]);
        assert!(factor(f64::NAN).is_nan());
        let on_device = |norm: f64| {
            let squares = [Tensor::from_slice(&[norm * norm, 0.0]), Tensor::from_slice(&[0f64])];
            let Ok(Clip::OnDevice(factor)) = Clip::on_device(1.0, &squares) else {
                unreachable!("it stays there")
            };
            f64::try_from(factor).unwrap() as f32
        };
        assert_eq!([4.0, 0.5, 0.0, f64::INFINITY].map(on_device), [4.0, 0.5, 0.0, f64::INFINITY].map(factor));
        assert!(on_device(f64::NAN).is_nan());
    }
}
