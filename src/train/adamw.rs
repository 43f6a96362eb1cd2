//! AdamW over the flat buffers of a model.

use std::sync::Arc;

use tch::Tensor;

use super::adamw_device::DeviceMoments;
use super::adamw_host::{HostMoments, StepConstants};
use super::hyperparameters::{AdamWForm, Hyperparameters};
use super::optimizer::Clip;
use crate::child::GradientMask;
use crate::error::{Error, Result};
use crate::libtorch::{elements, elements_mut};
use crate::method::DecayScope;
use crate::model::{Parameters, Trainable, Treatment};

/// AdamW with bias correction (Loshchilov and Hutter, 2019).
///
/// The two forms differ in where epsilon stands and when decay happens:
///
/// - `torch`: w ← (1 − ηλ) w, then w ← w − η m̂ / (√v̂ + ε);
/// - `hf_legacy`: w ← w − η √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε), then w ← (1 − ηλ) w.
///
/// The second update is the first with ε / √(1 − β₂ᵗ) in place of ε, so one kernel serves both. With a fixed child network
/// moments exist for its members only, and for none that are idle ([`Trainable::idle`]; on a GPU only without one): those of the
/// others would stay zero.
pub struct AdamW {
    form: AdamWForm,
    betas: (f64, f64),
    epsilon: f64,
    weight_decay: f64,
    step: u64,
    learning_rate: f64,
    /// Factor on the update, without decay, of weights that have pretrained values.
    pretrained_factor: f64,
    moments: Moments,
}

enum Moments {
    Host(HostMoments),
    Device(DeviceMoments),
}

impl AdamW {
    /// Makes an optimizer with zero moments for the parameters that train; the others are not touched.
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
        let list = || parameters.iter().map(|(_, parameter)| parameter);
        let decays_outside = decay == DecayScope::All;
        let moments = if parameters.device().is_cuda() {
            // Gradients that are released come one by one.
            let groups = match hyperparameters.release_gradients {
                true => trainable.one_by_one(list()),
                false => trainable.groups.clone(),
            };
            // Backward may still read those in bfloat16 when gradients are released.
            let copy = parameters.half_copy().filter(|_| !hyperparameters.release_gradients);
            let idle = &trainable.idle;
            Moments::Device(DeviceMoments::new(&groups, idle, parameters, mask, decays_outside, copy)?)
        } else {
            let treated = |parameter| Some((parameter, trainable.treatment(parameter)?));
            let mut list: Vec<_> = list().filter_map(treated).collect();
            list.sort_by_key(|(parameter, _)| parameter.range.start);
            let child = mask.and_then(|mask| mask.restriction());
            Moments::Host(HostMoments::new(list.into_iter(), &trainable.idle, child.cloned(), decays_outside))
        };
        Ok(Self {
            form: hyperparameters.adamw,
            betas: hyperparameters.betas,
            epsilon: hyperparameters.epsilon,
            weight_decay: hyperparameters.weight_decay,
            step: 0,
            learning_rate: 0.0,
            pretrained_factor: 1.0,
            moments,
        })
    }

    /// Returns the bytes of the optimizer's state.
    pub fn state_bytes(&self) -> usize {
        match &self.moments {
            Moments::Host(moments) => moments.bytes(),
            Moments::Device(moments) => moments.bytes(),
        }
    }

    /// Returns whether updates read gradients through the mask, and so need no masked ones; on a GPU only, since on the CPU
    /// hooks mask at no cost.
    pub fn masks(&self) -> bool {
        matches!(&self.moments, Moments::Device(moments) if moments.masks())
    }

    /// Returns whether updates keep the weights in bfloat16 up to date that passes compute with
    /// ([`Parameters::half_copy`]).
    pub fn keeps_copy(&self) -> bool {
        matches!(&self.moments, Moments::Device(moments) if moments.keeps_copy())
    }

    /// Returns sums that add up to that of the squares of the gradients that updates read through the mask; none on the CPU.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn squares(&self, gradients: &Tensor) -> Result<Vec<Tensor>> {
        match &self.moments {
            Moments::Device(moments) => moments.squares(gradients),
            Moments::Host(_) => Ok(Vec::new()),
        }
    }

    /// Starts a step. `pretrained_factor` scales the update, but not the decay, of weights that have pretrained values.
    pub fn begin_step(&mut self, learning_rate: f64, pretrained_factor: f64) {
        self.step += 1;
        (self.learning_rate, self.pretrained_factor) = (learning_rate, pretrained_factor);
    }

    /// Updates weights with their gradients, both the part of the flat buffer that begins at `start`.
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
        let Self { form, betas, epsilon, weight_decay, step, learning_rate, pretrained_factor, .. } = *self;
        let legacy = form == AdamWForm::HfLegacy;
        let root = (1.0 - betas.1.powi(step as i32)).sqrt();
        let constants = |treatment: Treatment| {
            let rate = learning_rate * treatment.rate;
            let decay = if treatment.decays { 1.0 - rate * weight_decay } else { 1.0 };
            StepConstants {
                step,
                learning_rate: rate * if treatment.pretrained { pretrained_factor } else { 1.0 },
                betas,
                epsilon: if legacy { epsilon / root } else { epsilon },
                decay_before: if legacy { 1.0 } else { decay },
                decay_after: if legacy { decay } else { 1.0 },
            }
        };
        match &mut self.moments {
            Moments::Host(moments) => {
                let Clip::Factor(factor) = clip else {
                    return Err(Error::Libtorch(
                        "a norm on a device cannot clip gradients on the CPU".into(),
                    ));
                };
                let (values, gradients) = (elements_mut(values)?, elements(gradients)?);
                moments.apply(values, gradients, start, *factor, constants);
                Ok(())
            }
            Moments::Device(moments) => {
                let factor = match clip {
                    Clip::Factor(1.0) => None,
                    Clip::Factor(factor) => {
                        Some(Tensor::from_slice(&[*factor]).f_to_device(values.device())?)
                    }
                    Clip::OnDevice(factor) => Some(factor.shallow_clone()),
                };
                moments.apply(values, gradients, start, factor.as_ref(), constants)
            }
        }
    }
}
