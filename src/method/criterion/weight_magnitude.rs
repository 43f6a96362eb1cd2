//! How large a weight is before training.

use super::{Criterion, Preparation, Scores};
use crate::child::MaskScope;
use crate::error::Result;

/// |w| of the weights that training starts from.
pub struct WeightMagnitude;

impl Criterion for WeightMagnitude {
    fn text(&self) -> String {
        String::new()
    }

    fn scores(&self, preparation: &mut Preparation, _scope: MaskScope) -> Result<Scores> {
        Ok(preparation.classifier.parameters.values().f_abs()?.into())
    }
}
