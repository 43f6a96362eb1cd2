//! Where new weights come from.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::libtorch::elements_mut;
use crate::random::{self, Key};

/// The distribution that the weights of a matrix or a table are drawn from where training starts from new ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum FreshWeights {
    /// Normal, with the config's `initializer_range` as standard deviation.
    #[default]
    Normal,
    /// Normal around zero, cut off at `cutoff` standard deviations.
    TruncatedNormal {
        /// That of the whole normal distribution.
        standard_deviation: f64,
        /// Positive.
        cutoff: f64,
    },
}

impl FreshWeights {
    /// Draws the weights of a parameter, in float32 on the CPU: numbers of a stream of the key.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn draw(self, shape: &[i64], initializer_range: f64, key: Key, stream: u32) -> Result<Tensor> {
        match self {
            FreshWeights::Normal => {
                let mut values = Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?;
                random::fill_normal(elements_mut(&mut values)?, initializer_range, key, stream);
                Ok(values)
            }
            FreshWeights::TruncatedNormal { standard_deviation, cutoff } => {
                truncated_normal(shape, [standard_deviation, cutoff], key, stream)
            }
        }
    }
}

/// Draws numbers from a normal distribution that is cut off at so many standard deviations: by its quantiles.
fn truncated_normal(
    shape: &[i64],
    [standard_deviation, cutoff]: [f64; 2],
    key: Key,
    stream: u32,
) -> Result<Tensor> {
    let mut uniform = vec![0f64; shape.iter().product::<i64>() as usize];
    random::fill_uniform(&mut uniform, key, stream);
    let most = Tensor::from(cutoff / std::f64::consts::SQRT_2).f_erf()?;
    let shares = Tensor::from_slice(&uniform).f_mul_scalar(2.0)?.f_sub_scalar(1.0)?.f_mul(&most)?;
    let deviates = shares.f_erfinv()?.f_mul_scalar(std::f64::consts::SQRT_2)?.f_clamp(-cutoff, cutoff)?;
    Ok(deviates.f_mul_scalar(standard_deviation)?.f_to_kind(Kind::Float)?.f_view(shape)?)
}
