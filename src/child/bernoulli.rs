//! Child-Tuning_F: a fresh Bernoulli mask at every optimizer step.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use multiversion::multiversion;
use rayon::prelude::*;
use tch::Tensor;

use super::network::MaskScope;
use crate::error::Result;
use crate::libtorch::elements_mut;
use crate::model::Parameter;
use crate::random::{self, Bernoulli, GROUP, Key, Purpose};

/// Elements that one thread masks at a time: small enough to stay in its cache.
const CHUNK: usize = 256 * GROUP;

/// The masks of a run: M_t ~ Bernoulli(p) for every element and step t, kept gradients scaled by 1/p (Algorithm 1 and
/// section 3.1 of the paper).
///
/// On the CPU a mask is never stored: each element's fate is a pure function of seed, step and the element's place in
/// the flat gradient, so that all micro-batches of a step and any number of threads see the same mask.
pub struct BernoulliMask {
    scope: MaskScope,
    probability: f64,
    keep: Bernoulli,
    scale: f32,
    seed: u64,
    step: AtomicU64,
    /// On CUDA the mask of the current step is drawn by libtorch, and kept for the step's other micro-batches.
    drawn: Mutex<HashMap<usize, (u64, Tensor)>>,
}

impl BernoulliMask {
    /// Makes the masks of a run that keep each element of `scope` with `probability`.
    pub fn new(scope: MaskScope, probability: f64, rescale: bool, seed: u64) -> Self {
        Self {
            scope,
            probability,
            keep: Bernoulli::new(probability),
            scale: if rescale { (1.0 / probability) as f32 } else { 1.0 },
            seed,
            step: AtomicU64::new(0),
            drawn: Mutex::default(),
        }
    }

    /// Returns the part of the model that is masked.
    pub fn scope(&self) -> MaskScope {
        self.scope
    }

    /// Returns the share of elements that a step keeps on average.
    pub fn probability(&self) -> f64 {
        self.probability
    }

    /// Starts a step: from here on another mask applies.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Masks and scales a parameter's contiguous float32 gradient in place.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn apply(&self, gradient: &mut Tensor, parameter: &Parameter) -> Result<()> {
        let step = self.step.load(Ordering::Relaxed);
        if gradient.device().is_cuda() {
            return self.apply_on_device(gradient, parameter, step);
        }
        let key = Key::derive(self.seed, Purpose::Mask, step);
        let first_group = (parameter.range.start / GROUP) as u32;
        elements_mut::<f32>(gradient)?.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
            mask_and_scale(
                values,
                key,
                first_group + (chunk * CHUNK / GROUP) as u32,
                self.keep.limit,
                self.scale,
            );
        });
        Ok(())
    }

    fn apply_on_device(&self, gradient: &mut Tensor, parameter: &Parameter, step: u64) -> Result<()> {
        let mut drawn = self.drawn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mask = match drawn.get(&parameter.range.start) {
            Some((of_step, mask)) if *of_step == step => mask.shallow_clone(),
            _ => {
                let mut mask = gradient.f_empty_like()?.f_bernoulli_float_(self.probability)?;
                let mask = mask.f_mul_scalar_(f64::from(self.scale))?;
                drawn.insert(parameter.range.start, (step, mask.shallow_clone()));
                mask
            }
        };
        let _ = gradient.f_mul_(&mask)?;
        Ok(())
    }
}

/// Scales the elements whose random number is at most `limit` and zeroes the others. A product with zero, not a store
/// of zero, so that a gradient that is not a number stays visible.
#[multiversion(targets = "simd")]
fn mask_and_scale(values: &mut [f32], key: Key, first_group: u32, limit: u32, scale: f32) {
    for (index, group) in values.chunks_mut(GROUP).enumerate() {
        let numbers = random::group(key, first_group + index as u32, [0; 3]);
        for (value, number) in group.iter_mut().zip(numbers) {
            *value *= if number <= limit { scale } else { 0.0 };
        }
    }
}
