//! Criteria: numbers by which the weights of a fixed child network are chosen.
//!
//! A criterion is one small file. It gives every weight a score; how many weights are kept, and which others they are
//! compared with, is settled by the [`Cut`](crate::child::Cut) of the method that uses it.

mod change;
mod fisher;
mod gradient_magnitude;
mod random;
mod weight_magnitude;

pub use change::Change;
pub use fisher::{Fisher, FisherSpec};
pub use gradient_magnitude::GradientMagnitude;
pub use random::Random;
pub use weight_magnitude::WeightMagnitude;

use tch::Tensor;

use super::Preparation;
use crate::child::{MaskScope, Spread};
use crate::error::Result;

/// What makes one weight more worth training than another.
pub trait Criterion: Send + Sync {
    /// Returns its name and options as canonical text, such as `fisher=per_example fisher.dropout=false`; equal texts are
    /// equal criteria. It may be empty where the method says it all.
    fn text(&self) -> String;

    /// Returns how many of the training examples [`Criterion::scores`] passes over.
    fn examples(&self, _available: usize) -> usize {
        0
    }

    /// Returns whether [`Criterion::scores`] fine-tunes the model first.
    fn fine_tunes(&self) -> bool {
        false
    }

    /// Scores every weight in the scope by a number of at least zero; what is said of the others is not looked at. The
    /// model's weights are as before afterwards.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or the user asks to stop.
    fn scores(&self, preparation: &mut Preparation, scope: MaskScope) -> Result<Scores>;
}

/// The scores of all weights.
pub struct Scores {
    /// One float32 number a weight, in the layout of the flat parameter buffer.
    pub values: Tensor,
    /// How far examples differ, where the scores are a mean over some of them.
    pub spread: Option<Spread>,
}

impl From<Tensor> for Scores {
    /// Scores that are no estimates.
    fn from(values: Tensor) -> Self {
        Self { values, spread: None }
    }
}
