//! What holds weights near to those that training started from, at work on the flat buffers.

use multiversion::multiversion;
use rayon::prelude::*;
use tch::Tensor;

use crate::error::Result;
use crate::libtorch::{elements, elements_mut};
use crate::method::{DecayOrder, Pull, PullStrength};
use crate::model::{Trainable, TrainableGroup};
use crate::random::GROUP;

/// Elements that one thread works on at a time.
const PIECE: usize = 256 * GROUP;

/// The pulls of a run.
pub struct Pulls {
    pulls: Vec<Box<dyn Pull>>,
    /// Coefficient of the weight decay that comes after them; zero where it comes with the update.
    weight_decay: f64,
}

impl Pulls {
    /// Takes the pulls of a method, and the weight decay of the run from the optimizer, if one of them does it or takes its
    /// place. Returns what is left of it to the optimizer.
    pub fn new(pulls: Vec<Box<dyn Pull>>, weight_decay: f64) -> (Self, f64) {
        let order = pulls.iter().map(|pull| pull.decay()).max().unwrap_or(DecayOrder::WithUpdate);
        let (own, left) = match order {
            DecayOrder::WithUpdate => (0.0, weight_decay),
            DecayOrder::AfterPull => (weight_decay, 0.0),
            DecayOrder::Replaced => (0.0, 0.0),
        };
        (Self { pulls, weight_decay: own }, left)
    }

    /// Returns the strengths of a step, numbered from 0.
    pub fn at(&self, step: u64) -> PullStrength {
        self.pulls.iter().fold(PullStrength::default(), |all, pull| all.and(pull.at(step)))
    }

    /// Returns whether gradients are more than those of the loss.
    pub fn reach_gradients(&self) -> bool {
        self.at(0).on_gradients != (0.0, 0.0)
    }

    /// Adds the gradients of α/2 ‖w − w₀‖² and β/2 ‖w‖², the second for new weights.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn on_gradients(
        strength: &PullStrength,
        trainable: &Trainable,
        [gradients, values, start]: [&Tensor; 3],
    ) -> Result<()> {
        let (pretrained, new) = strength.on_gradients;
        for group in &trainable.groups {
            let [mut gradients, values, start] =
                [part(gradients, group)?, part(values, group)?, part(start, group)?];
            let strength = if group.treatment.pretrained { pretrained } else { new };
            match group.treatment.pretrained {
                _ if strength == 0.0 => {}
                pretrained if gradients.device().is_cuda() => {
                    let away = if pretrained { values.f_sub(&start)? } else { values };
                    let _ = gradients.f_add_(&away.f_mul_scalar(strength)?)?;
                }
                true => {
                    add(elements_mut(&mut gradients)?, elements(&values)?, Some(elements(&start)?), strength)
                }
                false => add(elements_mut(&mut gradients)?, elements(&values)?, None, strength),
            }
        }
        Ok(())
    }

    /// Moves weights before the optimizer's update.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn before_update(
        strength: &PullStrength,
        learning_rate: f64,
        trainable: &Trainable,
        values: &Tensor,
        start: &Tensor,
    ) -> Result<()> {
        let decays = |group: &&TrainableGroup| group.treatment.decays && strength.before_update != 0.0;
        let groups = trainable.groups.iter().filter(decays);
        for group in groups {
            let way = learning_rate * group.treatment.rate * strength.before_update;
            let mut values = part(values, group)?;
            let _ = match group.treatment.pretrained {
                true => values.f_lerp_(&part(start, group)?, way)?,
                false => values.f_mul_scalar_(1.0 - way)?,
            };
        }
        Ok(())
    }

    /// Moves weights after the optimizer's update, and then does the decay that was taken over from it.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn after_update(
        &self,
        strength: &PullStrength,
        learning_rate: f64,
        trainable: &Trainable,
        values: &Tensor,
        start: &Tensor,
    ) -> Result<()> {
        for group in &trainable.groups {
            let rate = learning_rate * group.treatment.rate;
            let mut values = part(values, group)?;
            if group.treatment.pretrained && strength.after_update != 0.0 {
                let _ = values.f_lerp_(&part(start, group)?, rate * strength.after_update)?;
            }
            if group.treatment.decays && self.weight_decay != 0.0 {
                let _ = values.f_mul_scalar_(1.0 - rate * self.weight_decay)?;
            }
        }
        Ok(())
    }
}

/// The elements of a group, with the zeros of the gaps.
fn part(flat: &Tensor, group: &TrainableGroup) -> Result<Tensor> {
    Ok(flat.f_narrow(0, group.range.start as i64, group.range.len() as i64)?)
}

/// g ← g + strength (w − w₀), or g + strength w without w₀.
fn add(gradients: &mut [f32], values: &[f32], start: Option<&[f32]>, strength: f64) {
    let strength = strength as f32;
    let pieces = gradients.par_chunks_mut(PIECE).zip(values.par_chunks(PIECE)).enumerate();
    pieces.for_each(|(piece, (gradients, values))| match start {
        Some(start) => add_away(gradients, values, &start[piece * PIECE..], strength),
        None => gradients.iter_mut().zip(values).for_each(|(gradient, value)| *gradient += strength * value),
    });
}

#[multiversion(targets = "simd")]
fn add_away(gradients: &mut [f32], values: &[f32], start: &[f32], strength: f32) {
    for ((gradient, value), start) in gradients.iter_mut().zip(values).zip(start) {
        *gradient += strength * (value - start);
    }
}
