//! SIFT, sparse increment fine-tuning (Song et al., 2023): of each tensor, the weights with the largest gradient at the start
//! of training.

use std::sync::Arc;

use super::criterion::GradientMagnitude;
use super::registry::MethodOptions;
use super::sparse_mask::criterion_options;
use super::{Method, Preset};
use crate::child::{Cut, MaskScope, Threshold};
use crate::error::Result;
use crate::values::Count;

criterion_options! {
    examples: Count,
    dropout: bool,
}

impl MethodOptions for Options {
    /// The share and the batch of the released scripts for GLUE.
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let gradient = GradientMagnitude {
            examples: self.examples.map_or(32, |count| count.0),
            dropout: self.dropout.unwrap_or(true),
        };
        self.typed().methods("sift", gradient, Cut::highest(0.008, MaskScope::Backbone, Threshold::PerTensor))
    }
}
