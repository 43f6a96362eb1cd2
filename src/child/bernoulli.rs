//! Child-Tuning_F: a fresh Bernoulli mask at every optimizer step.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use super::masking::StepMask;
use super::network::MaskScope;
use crate::error::Result;
use crate::libtorch::seed_generators;
use crate::locking::locked;
use crate::model::Parameter;
use crate::random::{Bernoulli, Key, Purpose};

/// The masks of a run: M_t ~ Bernoulli(p) for every element and step t, kept gradients scaled by 1/p (Algorithm 1 of
/// the paper).
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
    /// `scale` on the device that last asked for it.
    scale_on_device: Mutex<Option<Tensor>>,
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
            scale_on_device: Mutex::new(None),
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

    /// Returns the factor on what is kept: 1/p, or 1 without rescaling.
    pub fn scale(&self) -> f64 {
        f64::from(self.scale)
    }

    /// Starts a step: from here on another mask applies.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Returns the mask of the current step, for the CPU.
    pub fn on_cpu(&self) -> StepMask<'static> {
        StepMask::Random { key: self.key(), limit: self.keep.limit, scale: self.scale }
    }

    /// Returns a parameter's gradient, of any type, with zeros where the mask of the current step drops it, on a GPU; what is kept
    /// is not scaled yet ([`BernoulliMask::scale_on`]). libtorch draws, seeded anew for each parameter and step, so that
    /// micro-batches share a mask that nobody stores.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn on_device(&self, gradient: &Tensor, parameter: &Parameter) -> Result<Tensor> {
        // The kernel compares with numbers up to 1, 1 included.
        if self.probability == 1.0 {
            return Ok(gradient.shallow_clone());
        }
        seed_generators(self.key().of_part(parameter.range.start as u64).to_seed())?;
        // A tensor of its own, since which number an element gets depends on the type of what is drawn.
        let kept = Tensor::f_empty(gradient.size(), (Kind::Bool, gradient.device()))?
            .f_bernoulli_float_(self.probability)?;
        Ok(gradient.f_mul(&kept)?)
    }

    /// Returns the factor on what is kept as one float32 number `[1]` on a device, where it is not 1: multiplied by it,
    /// gradients of any type become float32 and are rounded no more than that.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn scale_on(&self, device: Device) -> Result<Option<Tensor>> {
        if self.scale == 1.0 {
            return Ok(None);
        }
        let mut on_device = locked(&self.scale_on_device);
        if on_device.as_ref().is_none_or(|scale| scale.device() != device) {
            *on_device = Some(Tensor::f_full([1], f64::from(self.scale), (Kind::Float, device))?);
        }
        Ok(on_device.as_ref().map(Tensor::shallow_clone))
    }

    fn key(&self) -> Key {
        Key::derive(self.seed, Purpose::Mask, self.step.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::masking::mask_in_place;
    use super::*;

    const COUNT: usize = 100_003;

    fn masked(mask: &BernoulliMask, step: u64) -> Vec<f32> {
        let mut gradient = vec![1f32; COUNT];
        mask.begin_step(step);
        mask_in_place(&mut gradient, mask.on_cpu(), 1);
        gradient
    }

    #[test]
    fn keeps_the_share_p_scaled_by_one_over_p() {
        for p in [0.1, 0.3, 0.5, 0.9] {
            let values = masked(&BernoulliMask::new(MaskScope::All, p, true, 42), 0);
            let kept = values.iter().filter(|&&value| value != 0.0).count();
            assert!(values.iter().all(|&value| value == 0.0 || value == (1.0 / p) as f32));
            // Five standard deviations of a binomial count.
            let (mean, deviation) = (p * COUNT as f64, (p * (1.0 - p) * COUNT as f64).sqrt());
            assert!((kept as f64 - mean).abs() < 5.0 * deviation, "{kept} of {COUNT} at p = {p}");
        }
        let plain = masked(&BernoulliMask::new(MaskScope::All, 0.3, false, 42), 0);
        assert!(plain.iter().all(|&value| value == 0.0 || value == 1.0));
    }

    #[test]
    fn every_step_and_seed_has_a_mask_of_its_own() {
        let agreement = |left: &[f32], right: &[f32]| {
            left.iter().zip(right).filter(|(left, right)| left == right).count() as f64 / COUNT as f64
        };
        let mask = BernoulliMask::new(MaskScope::All, 0.3, true, 42);
        let first = masked(&mask, 0);
        assert_eq!(first, masked(&mask, 0));
        // Independent masks agree where both keep or both drop: p² + (1 − p)² = 0.58.
        for other in [masked(&mask, 1), masked(&BernoulliMask::new(MaskScope::All, 0.3, true, 43), 0)] {
            let share = agreement(&first, &other);
            assert!((share - 0.58).abs() < 5.0 * (0.58f64 * 0.42 / COUNT as f64).sqrt(), "{share}");
        }
    }
}
