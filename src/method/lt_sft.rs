//! LT-SFT, lottery ticket sparse fine-tuning (Ansell et al., 2022): the model is fine-tuned, the weights that moved farthest
//! are taken, the model is rewound, and these train.

use std::sync::Arc;

use super::criterion::Change;
use super::registry::MethodOptions;
use super::sparse_mask::criterion_options;
use super::{Method, Preset};
use crate::child::{Cut, MaskScope, Threshold};
use crate::error::Result;

criterion_options! {}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        self.typed().methods("lt_sft", Change, Cut::highest(0.01, MaskScope::Backbone, Threshold::Global))
    }
}
