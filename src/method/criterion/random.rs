//! A draw from the run's seed.

use super::{Criterion, Preparation, Scores};
use crate::child::{MaskScope, random_scores};
use crate::error::Result;

/// Independent uniform numbers, whatever the weights and the data are.
pub struct Random;

impl Criterion for Random {
    fn text(&self) -> String {
        "choose=random".into()
    }

    fn scores(&self, preparation: &mut Preparation, _scope: MaskScope) -> Result<Scores> {
        Ok(random_scores(preparation.classifier.parameters.buffer_len(), preparation.seed).into())
    }
}
