//! How far fine-tuning moves a weight (lottery ticket sparse fine-tuning, Ansell et al., 2022).

use super::{Criterion, Preparation, Scores};
use crate::child::MaskScope;
use crate::error::Result;

/// |w − w₀| after the model was fine-tuned with the run's settings and without a mask; it is rewound then.
pub struct Change;

impl Criterion for Change {
    fn text(&self) -> String {
        String::new()
    }

    fn fine_tunes(&self) -> bool {
        true
    }

    fn scores(&self, preparation: &mut Preparation, _scope: MaskScope) -> Result<Scores> {
        let Preparation { classifier, host, .. } = preparation;
        host.fine_tune(classifier)?;
        let mut values = classifier.parameters.values_copy()?;
        host.rewind(classifier)?;
        let _ = values.f_sub_(classifier.parameters.values())?;
        Ok(values.f_abs_()?.into())
    }
}
