//! Child-Tuning_F: a fresh Bernoulli mask at every optimizer step.

use std::sync::atomic::{AtomicU64, Ordering};

use super::masking::StepMask;
use super::network::MaskScope;
use crate::libtorch::RandomMask;
use crate::random::{Bernoulli, Key, Purpose};

/// The masks of a run: M_t ~ Bernoulli(p) for every element and step t, kept gradients scaled by 1/p (Algorithm 1 of
/// the paper).
///
/// A mask is never stored: each element's fate is a pure function of seed, step and the element's place in the flat gradient, so
/// that all micro-batches of a step, any number of threads and every device see the same mask.
pub struct BernoulliMask {
    scope: MaskScope,
    probability: f64,
    keep: Bernoulli,
    scale: f32,
    seed: u64,
    step: AtomicU64,
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

    /// Returns the mask of the current step, for kernels.
    pub fn for_kernels(&self) -> RandomMask {
        RandomMask { key: self.key().0, limit: self.keep.limit, scale: self.scale }
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
