//! Where backward leaves the gradients of parameters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Kind, Tensor};

use super::row_sums::{Total, totals};
use crate::error::Result;

/// The place of a parameter's gradient in a flat float32 buffer, to which operations of our own may bring what they have of it,
/// without a tensor of its own in between.
pub struct GradientPlace {
    /// `[count]`, in the order in which the parameter is stored.
    numbers: Tensor,
    /// Whether a part of the step's gradient is there.
    holds: Arc<AtomicBool>,
}

impl GradientPlace {
    /// Makes a place that holds nothing yet, `[count]`.
    pub fn new(numbers: Tensor) -> Self {
        Self { numbers, holds: Arc::default() }
    }

    /// Returns another handle of the same place.
    pub fn shallow_clone(&self) -> Self {
        Self { numbers: self.numbers.shallow_clone(), holds: self.holds.clone() }
    }

    /// Returns the numbers.
    pub fn numbers(&self) -> &Tensor {
        &self.numbers
    }

    /// Returns whether a part of the step's gradient is there.
    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::Relaxed)
    }

    /// Notes whether a part of the step's gradient is there: if not, the next part takes the place of what is.
    pub fn note(&self, holds: bool) {
        self.holds.store(holds, Ordering::Relaxed);
    }

    /// Notes that a part comes; returns whether it adds to what is there.
    pub fn claim(&self) -> bool {
        self.holds.swap(true, Ordering::Relaxed)
    }
}

/// A parameter as an operation uses it.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    /// A leaf, a view of one, or a function of some.
    pub values: &'a Tensor,
    /// Where its gradient is wanted, if `values` is the leaf or a view of it.
    pub place: Option<&'a GradientPlace>,
}

impl<'a> Operand<'a> {
    /// Makes a parameter whose gradient takes libtorch's way.
    pub fn plain(values: &'a Tensor) -> Self {
        Self { values, place: None }
    }

    /// Returns what backward has to do for it.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { asked: self.values.requires_grad(), place: self.place.map(GradientPlace::shallow_clone) }
    }
}

/// Whether backward is asked for a gradient, and where it is to leave it.
pub(super) struct Wanted {
    pub asked: bool,
    pub place: Option<GradientPlace>,
}

/// Adds up rows of sums, of which each holds those of all `wanted` side by side, `[rows, wanted · width]` in float32. Returns
/// the gradients of those that have no place for them, `[width]` in float32, and undefined tensors for the others.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub(super) fn gradients_of_sums(sums: &Tensor, wanted: &[&Wanted]) -> Result<Vec<Tensor>> {
    let width = sums.size()[1] / wanted.len() as i64;
    let mut gradients = Vec::with_capacity(wanted.len());
    let mut targets = Vec::with_capacity(wanted.len());
    for Wanted { asked, place } in wanted {
        let gradient = match (asked, place) {
            (true, None) => Tensor::f_empty([width], (Kind::Float, sums.device()))?,
            _ => Tensor::new(),
        };
        targets.push(match (asked, place) {
            (false, _) => None,
            (true, None) => Some(Total { numbers: gradient.shallow_clone(), adds: false }),
            (true, Some(place)) => {
                Some(Total { numbers: place.numbers.shallow_clone(), adds: place.claim() })
            }
        });
        gradients.push(gradient);
    }
    totals(sums, &targets)?;
    Ok(gradients)
}
