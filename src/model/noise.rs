//! Noise on activations: like dropout's pattern a pure function of seed, step, place in the network, example and token.
//!
//! So it does not depend on what else is in the batch or on how a step is cut into micro-batches. This holds on the CPU; on
//! CUDA libtorch's generator draws, seeded by the same key.

use multiversion::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::dropout::token_counters;
use crate::data::PackedBatch;
use crate::error::Result;
use crate::libtorch::{elements_mut, seed_generators};
use crate::random::{self, GROUP, Key};

/// The distribution that noise is drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoiseKind {
    /// Normal, of mean 0.
    Normal,
    /// Uniform, as far below 0 as above.
    Uniform,
}

/// Noise of one distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Noise {
    /// The distribution.
    pub kind: NoiseKind,
    /// The standard deviation of normal noise; the bound of uniform noise.
    pub scale: f64,
}

impl Noise {
    /// Draws noise for the packed tokens of a batch, `[tokens, width]` in float32. `site` is the place in the network.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn tokens(self, key: Key, site: u32, width: i64, batch: &PackedBatch) -> Result<Tensor> {
        let device = batch.input_ids.device();
        let tokens = batch.input_ids.size()[0];
        let options = (Kind::Float, device);
        let unit = if device.is_cuda() {
            let first_slot = u64::from(batch.slots.first().copied().unwrap_or(0));
            seed_generators(key.of_part(first_slot).of_part(u64::from(site)).to_seed())?;
            match self.kind {
                NoiseKind::Normal => Tensor::f_randn([tokens, width], options)?,
                NoiseKind::Uniform => {
                    Tensor::f_rand([tokens, width], options)?.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?
                }
            }
        } else {
            let counters = token_counters(batch, site);
            match self.kind {
                NoiseKind::Normal => normal_rows(key, &counters, width)?,
                NoiseKind::Uniform => {
                    let mut rows = Tensor::f_empty([tokens, width], options)?;
                    fill(&mut rows, width, &counters, |row, counter| uniform_row(row, key, counter))?;
                    rows
                }
            }
        };
        Ok(unit.f_mul_scalar(self.scale)?)
    }
}

/// Draws the uniform numbers in (−bound, bound) of one row, `[count]` in float32 on the CPU.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub(crate) fn uniform_numbers(key: Key, row: [u32; 3], count: i64, bound: f64) -> Result<Tensor> {
    let mut numbers = Tensor::f_empty([count], (Kind::Float, tch::Device::Cpu))?;
    uniform_row(elements_mut(&mut numbers)?, key, row);
    Ok(numbers.f_mul_scalar(bound)?)
}

/// Draws standard normal numbers for rows named by three numbers, `[rows, width]` in float32 on the CPU (Box–Muller): two of each
/// pair of uniform ones.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub(crate) fn normal_rows(key: Key, counters: &[[u32; 3]], width: i64) -> Result<Tensor> {
    let pairs = (width + 1) / 2;
    let mut uniform = Tensor::f_empty([counters.len() as i64, 2 * pairs], (Kind::Float, tch::Device::Cpu))?;
    fill(&mut uniform, 2 * pairs, counters, |row, counter| pair_row(row, key, counter))?;
    let half = |number: i64| uniform.f_narrow(1, number * pairs, pairs);
    let radius = half(0)?.f_log()?.f_mul_scalar(-2.0)?.f_sqrt()?;
    let angle = half(1)?.f_mul_scalar(std::f64::consts::TAU)?;
    let deviates = [angle.f_cos()?.f_mul(&radius)?, angle.f_sin()?.f_mul(&radius)?];
    Ok(Tensor::f_cat(&deviates, 1)?.f_narrow(1, 0, width)?)
}

/// Fills the rows of a float32 tensor on the CPU, each from its counter.
fn fill(
    rows: &mut Tensor,
    width: i64,
    counters: &[[u32; 3]],
    row: impl Fn(&mut [f32], [u32; 3]) + Sync,
) -> Result<()> {
    let width = width as usize;
    let values: &mut [f32] = elements_mut(rows)?;
    values.par_chunks_mut(width.max(1)).zip(counters).for_each(|(values, &counter)| row(values, counter));
    Ok(())
}

/// Numbers in (−1, 1), none of them 0.
#[multiversion(targets = "simd")]
fn uniform_row(row: &mut [f32], key: Key, counter: [u32; 3]) {
    for (index, values) in row.chunks_mut(GROUP).enumerate() {
        for (value, number) in values.iter_mut().zip(random::group(key, index as u32, counter)) {
            // 23 bits and a half: all of it exact in float32.
            *value = ((number >> 9) as f32 + 0.5) * 2f32.powi(-22) - 1.0;
        }
    }
}

/// Numbers in (0, 1] in the first half of the row, so that they have a logarithm, and in [0, 1) in the other.
#[multiversion(targets = "simd")]
fn pair_row(row: &mut [f32], key: Key, counter: [u32; 3]) {
    for (index, values) in row.chunks_mut(GROUP).enumerate() {
        for (value, number) in values.iter_mut().zip(random::group(key, index as u32, counter)) {
            *value = (number >> 8) as f32 * 2f32.powi(-24);
        }
    }
    let half = row.len() / 2;
    row[..half].iter_mut().for_each(|value| *value += 2f32.powi(-24));
}

#[cfg(test)]
mod tests {
    use super::super::dropout::tests::batch;
    use super::*;
    use crate::random::Purpose;

    fn key() -> Key {
        Key::derive(7, Purpose::Noise, 3)
    }

    #[test]
    fn noise_has_the_moments_of_its_distribution() {
        for (kind, deviation, fourth) in
            [(NoiseKind::Normal, 0.1, 3.0), (NoiseKind::Uniform, 0.1 / 3f64.sqrt(), 1.8)]
        {
            let noise = Noise { kind, scale: 0.1 }.tokens(key(), 1, 301, &batch(&[1000], 0)).unwrap();
            let noise = noise.to_kind(Kind::Double) / deviation;
            let moment =
                |power: f64| f64::try_from(noise.pow_tensor_scalar(power).mean(Kind::Double)).unwrap();
            // Five standard errors of a mean over 301,000 draws, of variances at most 1, 2, 15 and 96.
            for (power, expected, variance) in
                [(1.0, 0.0, 1.0), (2.0, 1.0, 2.0), (3.0, 0.0, 15.0), (4.0, fourth, 96.0)]
            {
                let bound = 5.0 * f64::sqrt(variance / 301_000.0);
                assert!((moment(power) - expected).abs() < bound, "{kind:?} {power}: {}", moment(power));
            }
            let largest = f64::try_from(noise.abs().max()).unwrap() * deviation;
            assert!(kind == NoiseKind::Normal || largest <= 0.1, "{largest}");
        }
    }

    #[test]
    fn the_noise_of_an_example_does_not_depend_on_its_batch() {
        for kind in [NoiseKind::Normal, NoiseKind::Uniform] {
            let noise = Noise { kind, scale: 1.0 };
            let whole = noise.tokens(key(), 2, 70, &batch(&[4, 5], 0)).unwrap();
            assert_eq!(whole.narrow(0, 4, 5), noise.tokens(key(), 2, 70, &batch(&[5], 1)).unwrap());
            assert_ne!(whole, noise.tokens(key(), 3, 70, &batch(&[4, 5], 0)).unwrap());
        }
    }
}
