//! Masks at work: a gradient hook on every parameter that the mask reaches.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::bernoulli::BernoulliMask;
use super::network::{ChildNetwork, MaskScope};
use crate::error::Result;
use crate::libtorch::GradientHook;
use crate::model::{Parameter, Parameters};

/// The mask that a run multiplies its gradients by.
pub enum GradientMask {
    /// Another random mask at every step (Child-Tuning_F).
    Bernoulli(BernoulliMask),
    /// One mask for the whole run (Child-Tuning_D).
    Fixed(ChildNetwork),
}

impl GradientMask {
    /// Starts an optimizer step, numbered from 0.
    pub fn begin_step(&self, step: u64) {
        if let GradientMask::Bernoulli(mask) = self {
            mask.begin_step(step);
        }
    }

    /// Returns the part of the model that the mask reaches.
    pub fn scope(&self) -> MaskScope {
        match self {
            GradientMask::Bernoulli(mask) => mask.scope(),
            GradientMask::Fixed(child) => child.scope(),
        }
    }

    /// Returns the share of the maskable weights that trains: on average over the steps, or exactly.
    pub fn share(&self) -> f64 {
        match self {
            GradientMask::Bernoulli(mask) => mask.probability(),
            GradientMask::Fixed(child) => child.kept() as f64 / child.maskable() as f64,
        }
    }

    /// Returns the fixed child network, if there is one.
    pub fn child(&self) -> Option<&ChildNetwork> {
        match self {
            GradientMask::Bernoulli(_) => None,
            GradientMask::Fixed(child) => Some(child),
        }
    }

    /// Multiplies a parameter's contiguous float32 gradient by the mask, in place.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn apply(&self, gradient: &mut Tensor, parameter: &Parameter) -> Result<()> {
        match self {
            GradientMask::Bernoulli(mask) => mask.apply(gradient, parameter),
            GradientMask::Fixed(child) => child.apply(gradient, parameter),
        }
    }

    /// Masks the accumulated gradients of a model, for the released code's order: clip first, then mask.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn apply_to_all(&self, parameters: &Parameters) -> Result<()> {
        for (_, parameter) in parameters.iter().filter(|(_, parameter)| self.scope().covers(parameter)) {
            let range = &parameter.range;
            let mut gradient = parameters.gradients().f_narrow(0, range.start as i64, range.len() as i64)?;
            self.apply(&mut gradient, parameter)?;
        }
        Ok(())
    }
}

/// Registers the mask on every parameter in its scope; it applies until the hooks are dropped.
///
/// A hook runs once a backward pass, before the gradient is added to what earlier micro-batches left. It multiplies in
/// place where nobody else holds the gradient, and in a copy elsewhere.
///
/// # Errors
/// Fails if libtorch refuses a hook.
pub fn install_hooks(parameters: &Parameters, mask: &Arc<GradientMask>) -> Result<Vec<GradientHook>> {
    let covered = parameters.iter().filter(|(_, parameter)| mask.scope().covers(parameter));
    covered
        .map(|(id, parameter)| {
            let (mask, parameter) = (mask.clone(), parameter.clone());
            GradientHook::register(parameters.leaf(id), move |hooked| {
                let mut gradient = hooked.gradient;
                let in_place = hooked.exclusive && gradient.is_contiguous() && gradient.kind() == Kind::Float;
                if in_place {
                    mask.apply(&mut gradient, &parameter)?;
                    return Ok(None);
                }
                let mut copy = Tensor::f_empty(gradient.size(), (Kind::Float, gradient.device()))?;
                copy.f_copy_(&gradient)?;
                mask.apply(&mut copy, &parameter)?;
                Ok(Some(copy))
            })
        })
        .collect()
}
