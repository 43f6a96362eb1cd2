//! The epoch whose weights scored best.

use tch::Tensor;

use crate::error::Result;
use crate::model::Parameters;

/// The best epoch so far.
pub struct BestEpoch {
    keeps_values: bool,
    best: Option<Best>,
    /// Epochs since then.
    pub epochs_without_gain: usize,
}

/// An epoch and its weights.
pub struct Best {
    headline: f64,
    /// The weights that were scored, `[total]`, if they are kept.
    pub values: Option<Tensor>,
    /// The optimizer steps behind them.
    pub step: u64,
}

impl BestEpoch {
    /// Begins before the first epoch; the weights of the best are copied, or only how long ago it was is counted.
    pub fn new(keeps_values: bool) -> Self {
        Self { keeps_values, best: None, epochs_without_gain: 0 }
    }

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
        // What is replaced goes first: two copies are never there.
        self.best = None;
        let values = self.keeps_values.then(|| parameters.values_copy()).transpose()?;
        self.best = Some(Best { headline, values, step });
        self.epochs_without_gain = 0;
        Ok(())
    }

    /// Returns the best epoch, if any was scored.
    pub fn into_best(self) -> Option<Best> {
        self.best
    }
}
