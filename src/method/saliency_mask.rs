//! A mask by connection sensitivity (SNIP, Lee et al., 2019): the weights without which the loss would change most.

use std::sync::Arc;

use super::criterion::{Criterion, GradientMagnitude, Scores};
use super::registry::MethodOptions;
use super::sparse_mask::criterion_options;
use super::{Method, Preparation, Preset};
use crate::child::{Cut, MaskScope, Threshold};
use crate::error::Result;
use crate::values::Count;

criterion_options! {
    examples: Count,
}

/// |w · ∂L/∂w|, the change of the loss to first order if the weight were zero.
struct Saliency(GradientMagnitude);

impl Criterion for Saliency {
    fn text(&self) -> String {
        format!("examples={}", self.0.examples)
    }

    fn examples(&self, available: usize) -> usize {
        self.0.examples(available)
    }

    fn scores(&self, preparation: &mut Preparation, scope: MaskScope) -> Result<Scores> {
        let gradients = self.0.scores(preparation, scope)?.values;
        let weights = preparation.classifier.parameters.values().f_abs()?;
        Ok(gradients.f_mul(&weights)?.into())
    }
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let examples = self.examples.map_or(128, |count| count.0);
        let saliency = Saliency(GradientMagnitude { examples, dropout: false });
        let cut = Cut::highest(0.01, MaskScope::Backbone, Threshold::Global);
        self.typed().methods("saliency_mask", saliency, cut)
    }
}
