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

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::{Cut, Threshold};
    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("body", &[1000], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[10], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    /// Backward through a loss whose gradient is 3 everywhere; returns the gradients of body and head.
    fn backward(parameters: &Parameters) -> [Vec<f32>; 2] {
        let names = ["body", "head"];
        for name in names {
            (parameters.leaf(parameters.find(name).unwrap()) * 3.0).sum(Kind::Float).backward();
        }
        names.map(|name| Vec::try_from(parameters.leaf(parameters.find(name).unwrap()).grad()).unwrap())
    }

    #[test]
    fn micro_batches_of_a_step_share_a_mask_and_steps_do_not() {
        let mut parameters = parameters();
        let mask = BernoulliMask::new(MaskScope::EncoderLayers, 0.5, true, 1);
        let mask = Arc::new(GradientMask::Bernoulli(mask));
        let hooks = install_hooks(&parameters, &mask).unwrap();
        assert_eq!(hooks.len(), 1);

        mask.begin_step(0);
        let [once, head] = backward(&parameters);
        let [twice, _] = backward(&parameters);
        assert!(once.iter().all(|&value| value == 0.0 || value == 6.0));
        assert!(once.iter().zip(&twice).all(|(once, twice)| *twice == 2.0 * once));
        assert_eq!(head, [3.0; 10], "the head is outside the scope");

        parameters.zero_gradients().unwrap();
        mask.begin_step(1);
        assert_ne!(backward(&parameters)[0], once);

        drop(hooks);
        parameters.zero_gradients().unwrap();
        assert_eq!(backward(&parameters)[0], [3.0; 1000]);
    }

    #[test]
    fn a_fixed_mask_lets_exactly_its_members_through() {
        let parameters = parameters();
        let scores = Tensor::arange(parameters.buffer_len() as i64, (Kind::Float, Device::Cpu));
        let child = ChildNetwork::from_scores(
            &parameters,
            &scores,
            &Cut::highest(0.25, MaskScope::EncoderLayers, Threshold::Global),
        )
        .unwrap();
        assert_eq!((child.kept(), child.maskable()), (250, 1000));
        let _hooks = install_hooks(&parameters, &Arc::new(GradientMask::Fixed(child))).unwrap();
        let [body, head] = backward(&parameters);
        assert!(body.iter().enumerate().all(|(index, &value)| value == if index >= 750 { 3.0 } else { 0.0 }));
        assert_eq!(head, [3.0; 10]);
    }
}
