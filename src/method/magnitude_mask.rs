//! A mask by the magnitude of the weights that training starts from: of each tensor, the largest train, or the smallest.

use std::sync::Arc;

use super::criterion::WeightMagnitude;
use super::registry::MethodOptions;
use super::sparse_mask::criterion_options;
use super::{Method, Preset};
use crate::child::{Cut, MaskScope, Threshold};
use crate::error::Result;

criterion_options! {}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let cut = Cut::highest(0.01, MaskScope::Backbone, Threshold::PerTensor);
        self.typed().methods("magnitude_mask", WeightMagnitude, cut)
    }
}
