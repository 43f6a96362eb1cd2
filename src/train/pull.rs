//! What holds weights near to those that training started from, at work on the flat buffers.

use std::sync::Arc;

use multiversion::multiversion;
use rayon::prelude::*;
use tch::Tensor;

use crate::child::{CHUNK, ChildNetwork};
use crate::error::Result;
use crate::libtorch::{elements, elements_mut};
use crate::method::{DecayOrder, Pull, PullStrength};
use crate::model::{Trainable, TrainableGroup, span};

/// The pulls of a run.
pub struct Pulls {
    pulls: Vec<Box<dyn Pull>>,
    /// Coefficient of the weight decay that comes after them; zero where it comes with the update.
    weight_decay: f64,
    /// The fixed child network that alone decays; without one, all weights do.
    decayed: Option<Arc<ChildNetwork>>,
}

impl Pulls {
    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pulls.is_empty()
    }

    /// Takes the pulls of a method, and the weight decay of the run from the optimizer, if one of them does it or takes its
    /// place. With `decayed` nothing but the members of that child network is moved towards zero. Returns what is left
    /// of the decay to the optimizer.
    pub fn new(
        pulls: Vec<Box<dyn Pull>>,
        weight_decay: f64,
        decayed: Option<Arc<ChildNetwork>>,
    ) -> (Self, f64) {
        let order = pulls.iter().map(|pull| pull.decay()).max().unwrap_or(DecayOrder::WithUpdate);
        let (own, left) = match order {
            DecayOrder::WithUpdate => (0.0, weight_decay),
            DecayOrder::AfterPull => (weight_decay, 0.0),
            DecayOrder::Replaced => (0.0, 0.0),
        };
        (Self { pulls, weight_decay: own, decayed }, left)
    }

    /// Returns the strengths of a step, numbered from 0.
    pub fn at(&self, step: u64) -> PullStrength {
        self.pulls.iter().fold(PullStrength::default(), |all, pull| all.and(pull.at(step)))
    }

    /// Returns whether gradients are more than those of the loss.
    pub fn reach_gradients(&self) -> bool {
        self.pulls.iter().any(|pull| pull.reaches_gradients())
    }

    /// Adds the gradients of α/2 ‖w − w₀‖² and β/2 ‖w‖², the second for new weights.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn on_gradients(
        &self,
        strength: &PullStrength,
        trainable: &Trainable,
        [gradients, values, start]: [&Tensor; 3],
    ) -> Result<()> {
        for group in &trainable.groups {
            let is_pretrained = group.treatment.pretrained;
            let (of_pretrained, of_new) = strength.on_gradients;
            let strength = if is_pretrained { of_pretrained } else { of_new };
            if strength == 0.0 {
                continue;
            }
            let [mut gradients, values, start] =
                [part(gradients, group)?, part(values, group)?, part(start, group)?];
            if gradients.device().is_cuda() {
                let away = if is_pretrained { values.f_sub(&start)? } else { values };
                let _ = gradients.f_add_(&away.f_mul_scalar(strength)?)?;
                continue;
            }
            let start = is_pretrained.then(|| elements(&start)).transpose()?;
            add(elements_mut(&mut gradients)?, elements(&values)?, start, strength);
        }
        Ok(())
    }

    /// Moves weights before the optimizer's update.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn before_update(
        &self,
        strength: &PullStrength,
        learning_rate: f64,
        trainable: &Trainable,
        [values, start]: [&Tensor; 2],
    ) -> Result<()> {
        let decays = |group: &&TrainableGroup| group.treatment.decays && strength.before_update != 0.0;
        for group in trainable.groups.iter().filter(decays) {
            let way = learning_rate * group.treatment.rate * strength.before_update;
            if group.treatment.pretrained {
                let _ = part(values, group)?.f_lerp_(&part(start, group)?, way)?;
            } else {
                self.shrink(values, group, 1.0 - way)?;
            }
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
        [values, start]: [&Tensor; 2],
    ) -> Result<()> {
        for group in &trainable.groups {
            let rate = learning_rate * group.treatment.rate;
            if group.treatment.pretrained && strength.after_update != 0.0 {
                let way = rate * strength.after_update;
                let _ = part(values, group)?.f_lerp_(&part(start, group)?, way)?;
            }
            if group.treatment.decays && self.weight_decay != 0.0 {
                self.shrink(values, group, 1.0 - rate * self.weight_decay)?;
            }
        }
        Ok(())
    }

    /// Moves the weights of a group that decay towards zero. (A pull towards the start needs no such care: weights outside the
    /// child network are at their start.)
    fn shrink(&self, values: &Tensor, group: &TrainableGroup, factor: f64) -> Result<()> {
        let mut values = part(values, group)?;
        match &self.decayed {
            Some(child) => child.scale_members(&mut values, group.range.start, factor)?,
            None => values.f_mul_scalar_(factor).map(|_| ())?,
        }
        Ok(())
    }
}

/// The elements of a group, with the zeros of the gaps.
fn part(flat: &Tensor, group: &TrainableGroup) -> Result<Tensor> {
    span(flat, &group.range)
}

/// g ← g + strength (w − w₀), or g + strength w without w₀.
fn add(gradients: &mut [f32], values: &[f32], start: Option<&[f32]>, strength: f64) {
    let strength = strength as f32;
    let pieces = gradients.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate();
    pieces.for_each(|(piece, (gradients, values))| match start {
        Some(start) => add_away(gradients, values, &start[piece * CHUNK..], strength),
        None => gradients.iter_mut().zip(values).for_each(|(gradient, value)| *gradient += strength * value),
    });
}

#[multiversion(targets = "simd")]
fn add_away(gradients: &mut [f32], values: &[f32], start: &[f32], strength: f32) {
    for ((gradient, value), start) in gradients.iter_mut().zip(values).zip(start) {
        *gradient += strength * (value - start);
    }
}
