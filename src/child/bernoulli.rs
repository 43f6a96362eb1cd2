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

    /// Returns the factor on what is kept: 1/p, or 1 without rescaling.
    pub fn scale(&self) -> f64 {
        f64::from(self.scale)
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
        // Rows of the embedding table that no token of the batch uses: what is zero stays zero, and costs no numbers.
        if group.iter().all(|value| value.to_bits() << 1 == 0) {
            continue;
        }
        let numbers = random::group(key, first_group + index as u32, [0; 3]);
        for (value, number) in group.iter_mut().zip(numbers) {
            *value *= if number <= limit { scale } else { 0.0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};

    const COUNT: i64 = 100_003;

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("other", &[7], ParameterKind::Weight, ParameterPlace::Head);
        table.declare("weight", &[COUNT], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    fn masked(mask: &BernoulliMask, step: u64) -> Vec<f32> {
        let parameters = parameters();
        let parameter = parameters.get(parameters.find("weight").unwrap());
        let mut gradient = Tensor::ones([COUNT], (Kind::Float, Device::Cpu));
        mask.begin_step(step);
        mask.apply(&mut gradient, parameter).unwrap();
        Vec::try_from(gradient).unwrap()
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

    #[test]
    fn the_mask_does_not_depend_on_the_number_of_threads() {
        let mask = BernoulliMask::new(MaskScope::All, 0.3, true, 42);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let three = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(one.install(|| masked(&mask, 5)), three.install(|| masked(&mask, 5)));
    }

    #[test]
    fn a_gradient_that_is_not_a_number_stays_visible() {
        let mut values = vec![f32::NAN; GROUP];
        mask_and_scale(&mut values, Key([1, 2]), 0, Bernoulli::new(0.3).limit, 2.0);
        assert!(values.iter().all(|value| value.is_nan()));
    }
}
