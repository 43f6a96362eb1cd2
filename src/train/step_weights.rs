//! The weights that the passes over one micro-batch use.

use tch::Tensor;

use crate::error::Result;
use crate::model::{Parameter, Parameters, Precision, Trainable};

/// The weights of passes, some of which may be functions of those that train.
pub struct StepWeights {
    /// What the passes use, one for each parameter.
    pub used: Vec<Tensor>,
    /// Functions of weights, and the leaves that passes use in their place.
    cut: Vec<(Tensor, Tensor)>,
}

impl StepWeights {
    /// Takes the leaves themselves.
    pub fn plain(used: Vec<Tensor>) -> Self {
        Self { used, cut: Vec::new() }
    }

    /// Replaces weights that are computed from the leaves by copies that begin a graph of their own. Several backward passes
    /// run through them, of which the first would free the graph that they share; [`StepWeights::backward`] carries the sum of
    /// their gradients on to the leaves.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn new(mut used: Vec<Tensor>, leaves: &[Tensor]) -> Result<Self> {
        let mut cut = Vec::new();
        for (weight, leaf) in used.iter_mut().zip(leaves) {
            if weight.requires_grad() && weight.data_ptr() != leaf.data_ptr() {
                let own = weight.f_detach()?.f_set_requires_grad(true)?;
                cut.push((std::mem::replace(weight, own.shallow_clone()), own));
            }
        }
        Ok(Self { used, cut })
    }

    /// Goes on backward, from the weights that passes used to those that train.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn backward(&self) -> Result<()> {
        for (weight, own) in &self.cut {
            let gradient = own.f_grad()?;
            if gradient.defined() {
                // The derivative of Σ weight · gradient.
                weight.f_mul(&gradient)?.f_sum(weight.kind())?.f_backward()?;
            }
        }
        Ok(())
    }
}

/// Returns the weights that passes of plain fine-tuning use; those that do not train ask for no gradient, so that backward ends
/// where all below are such.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub fn plain_weights(
    parameters: &Parameters,
    trainable: &Trainable,
    precision: Precision,
) -> Result<Vec<Tensor>> {
    let weights = parameters.compute_weights(precision.kind())?;
    let settled = |((_, parameter), weight): ((_, &Parameter), Tensor)| match trainable.holds(parameter) {
        true => Ok(weight),
        false => Ok(weight.f_detach()?),
    };
    parameters.iter().zip(weights).map(settled).collect()
}
