//! How large a weight's gradient is at the start of training (SIFT, Song et al., 2023).

use super::{Criterion, Preparation, Scores};
use crate::child::{GradientHooks, MaskScope};
use crate::error::Result;
use crate::model::{Dropout, Pass, loss};
use crate::random::Purpose;

/// |∂L/∂w| of the mean loss over the first examples of the first epoch: what training's first step would find, if it had as
/// many examples.
pub struct GradientMagnitude {
    /// How many examples; all, where there are no more.
    pub examples: usize,
    /// Whether they are seen with the dropout of that step.
    pub dropout: bool,
}

impl Criterion for GradientMagnitude {
    fn text(&self) -> String {
        format!("examples={} dropout={}", self.examples, self.dropout)
    }

    fn examples(&self, available: usize) -> usize {
        self.examples.min(available)
    }

    fn scores(&self, preparation: &mut Preparation, _scope: MaskScope) -> Result<Scores> {
        let Preparation { classifier, data, seed, micro_batch, precision, order, host, .. } = preparation;
        let device = classifier.parameters.device();
        let mut order = order.of_epoch(data.len(), *seed, 0);
        order.truncate(self.examples);
        let _products = precision.matrix_products(device)?;
        let weights = classifier.parameters.compute_weights(precision.kind())?;
        let hooks = GradientHooks::collect(&classifier.parameters, &weights, |_| true, None)?;
        hooks.begin_step();
        for (part, examples) in order.chunks(*micro_batch).enumerate() {
            let first_slot = part * *micro_batch;
            let (batch, targets) = data.batch(examples, first_slot, device)?;
            let dropout = || Dropout::new(*seed, Purpose::Dropout, 0, first_slot, device);
            let dropout = self.dropout.then(dropout).transpose()?;
            let logits = classifier.logits(&Pass::new(&weights, &batch, dropout))?;
            loss(&logits, &targets, order.len())?.f_backward()?;
            host.progress(examples.len())?;
        }
        hooks.end_step()?;
        Ok(classifier.parameters.gradients()?.f_abs()?.into())
    }
}
