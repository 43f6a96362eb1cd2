//! The epoch whose weights scored best.

use tch::Tensor;

use crate::error::Result;
use crate::model::Parameters;

/// The best epoch so far.
#[derive(Default)]
pub struct BestEpoch {
    best: Option<Best>,
    /// Epochs since then.
    pub epochs_without_gain: usize,
}

/// An epoch and its weights.
pub struct Best {
    headline: f64,
    /// The weights that were scored, `[total]`.
    pub values: Tensor,
    /// The optimizer steps behind them.
    pub step: u64,
}

impl BestEpoch {
    /// Takes an epoch's score in; among equals the earlier epoch stays the best, and a score that is no number never is
    /// better than one that is.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn consider(&mut self, headline: f64, parameters: &Parameters, step: u64) -> Result<()> {
        let worse = |best: &Best| !(headline > best.headline || best.headline.is_nan() && !headline.is_nan());
        if self.best.as_ref().is_some_and(worse) {
            self.epochs_without_gain += 1;
            return Ok(());
        }
        self.best = Some(Best { headline, values: parameters.values_copy()?, step });
        self.epochs_without_gain = 0;
        Ok(())
    }

    /// Returns the best epoch, if any was scored.
    pub fn into_best(self) -> Option<Best> {
        self.best
    }
}
