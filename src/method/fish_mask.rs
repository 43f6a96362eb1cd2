//! FISH Mask (Sung et al., 2021): the weights with the highest Fisher information of some examples train, and the head, which
//! is counted in their budget.

use std::sync::Arc;

use serde::Deserialize;

use super::criterion::Fisher;
use super::registry::MethodOptions;
use super::sparse_mask::criterion_options;
use super::{Method, Preset};
use crate::child::{Cut, Estimator, MaskScope, Threshold};
use crate::error::Result;
use crate::values::Count;

/// Of whose labels the Fisher information is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Labels {
    /// Those of the data.
    #[default]
    Empirical,
    /// Those that the model expects.
    Expected,
}

criterion_options! {
    estimator: Labels,
    examples: Count,
}

impl MethodOptions for Options {
    /// The released code's examples and share; its mask is applied after backward and before clipping.
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let fisher = Fisher {
            estimator: match self.estimator.unwrap_or_default() {
                Labels::Empirical => Estimator::PerExample,
                Labels::Expected => Estimator::Expected,
            },
            dropout: false,
            clip: None,
            precision: None,
            examples: Some(self.examples.map_or(1024, |count| count.0)),
        };
        let cut = Cut::highest(0.005, MaskScope::Backbone, Threshold::Budget);
        self.typed().methods("fish_mask", fisher, cut)
    }
}
