//! How far an estimate of Fisher information from a part of the training data can be trusted, and the mask with it.

use rayon::prelude::*;
use tch::{Device, Tensor};

use super::cut::{Cut, Threshold};
use super::fisher::Spread;
use super::network::{ChildNetwork, TensorMask};
use super::select::Extreme;
use crate::error::Result;
use crate::libtorch::elements;

/// What drawing another part of the training data would change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Uncertainty {
    /// How many examples the estimate is from.
    pub examples: usize,
    /// How many there are to draw from.
    pub available: usize,
    /// Standard error of the information of all weights in the scope together, relative to it.
    pub relative_standard_error: f64,
    /// Share of the maskable weights whose information is within one standard error of the mask's threshold.
    pub undecided: f64,
}

/// Returns the standard error of a mean of `n` values, drawn without replacement from `available`, if their variance is
/// 1 (a sum divided by `n`): √((1 − n / available) / (n − 1)).
fn factor(n: usize, available: usize) -> f64 {
    let drawn = n as f64;
    ((1.0 - drawn / available as f64).max(0.0) / (drawn - 1.0)).sqrt()
}

impl Spread {
    /// Returns the standard error of each weight's information, √((mean f² − F²) / (n − 1) · (1 − n / available)), where f is
    /// the information of a single example, F the mean over n and `available` the number that they were drawn from.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn standard_errors(&self, values: &Tensor, available: usize) -> Result<Tensor> {
        // Rounding may leave a negative variance where there is none.
        let mut variance = self.mean_squares.f_addcmul(values, &values.f_neg()?)?.f_clamp_min_(0.0)?;
        Ok(variance.f_sqrt_()?.f_mul_scalar_(factor(self.totals.len(), available))?)
    }

    /// Returns the standard error of the information of all weights together, relative to it; 0 if there is none.
    pub fn relative_standard_error(&self, available: usize) -> f64 {
        let n = self.totals.len();
        let mean = self.totals.iter().sum::<f64>() / n as f64;
        let variance = self.totals.iter().map(|total| (total - mean).powi(2)).sum::<f64>() / n as f64;
        if mean > 0.0 { factor(n, available) * variance.sqrt() / mean } else { 0.0 }
    }
}

/// Tells how uncertain an estimate from examples drawn from `available` ones is, and the child network that was cut out of
/// its `values`. `None` where it is not known how examples differ, and of one example alone.
///
/// # Errors
/// Fails if libtorch refuses an operation.
pub fn uncertainty(
    values: &Tensor,
    spread: Option<&Spread>,
    child: &ChildNetwork,
    cut: &Cut,
    available: usize,
) -> Result<Option<Uncertainty>> {
    let Some(spread) = spread.filter(|spread| spread.totals.len() > 1) else {
        return Ok(None);
    };
    let errors = spread.standard_errors(values, available)?.f_to_device(Device::Cpu)?;
    let values = values.f_to_device(Device::Cpu)?;
    let (values, errors): (&[f32], &[f32]) = (elements(&values)?, elements(&errors)?);
    let tensors: Vec<&TensorMask> = child.tensors().iter().collect();
    let undecided: usize = match cut.threshold {
        Threshold::PerTensor => {
            tensors.chunks(1).map(|own| undecided(child, own, cut.choose, values, errors)).sum()
        }
        Threshold::Global | Threshold::Percentile | Threshold::Budget => {
            undecided(child, &tensors, cut.choose, values, errors)
        }
    };
    Ok(Some(Uncertainty {
        examples: spread.totals.len(),
        available,
        relative_standard_error: spread.relative_standard_error(available),
        undecided: undecided as f64 / child.maskable() as f64,
    }))
}

/// Counts the weights of tensors with a common threshold whose value is within one standard error of it. The threshold is the
/// value of the last weight that belongs to the child network.
fn undecided(
    child: &ChildNetwork,
    tensors: &[&TensorMask],
    choose: Extreme,
    values: &[f32],
    errors: &[f32],
) -> usize {
    let lowest = choose == Extreme::Lowest;
    let last = |left: f32, right: f32| if lowest { left.max(right) } else { left.min(right) };
    let none = if lowest { f32::NEG_INFINITY } else { f32::INFINITY };
    let threshold = tensors.par_iter().map(|tensor| {
        let words = child.words_of(tensor).par_iter();
        let values = values[tensor.start..tensor.start + tensor.count].par_chunks(u64::BITS as usize);
        let members = values.zip(words).map(|(values, word)| {
            let members = values.iter().enumerate().filter(|(bit, _)| word >> bit & 1 == 1);
            members.fold(none, |threshold, (_, &value)| last(threshold, value))
        });
        members.reduce(|| none, last)
    });
    let threshold = threshold.reduce(|| none, last);
    let within = |tensor: &&TensorMask| {
        let range = tensor.start..tensor.start + tensor.count;
        let pairs = values[range.clone()].par_iter().zip(&errors[range]);
        pairs.filter(|(value, error)| (**value - threshold).abs() <= **error).count()
    };
    tensors.par_iter().map(within).sum()
}
