//! Weight decay towards the pretrained weights, decoupled: before the update w ← w − η λ (w − w₀).
//!
//! The prior WD of the paper's comparison. As in the code of Zhang et al. (2021, "Revisiting few-sample BERT fine-tuning") it
//! takes the place of plain weight decay, for the weights that decay. New weights have no w₀ and decay towards 0, as that code
//! means to do.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{DecayOrder, Method, Parts, Preset, Pull, PullStrength};
use crate::error::Result;
use crate::values::{NonNegative, OneOrMany, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    strength: Option<OneOrMany<NonNegative>>,
}

/// Weight decay towards the pretrained weights.
#[derive(Clone, Copy)]
struct PriorWeightDecay {
    strength: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let strengths = axis(&self.strength, NonNegative(0.01));
        let method =
            |strength: &NonNegative| Arc::new(PriorWeightDecay { strength: strength.0 }) as Arc<dyn Method>;
        Ok(strengths.iter().map(method).collect())
    }
}

impl Method for PriorWeightDecay {
    fn name(&self) -> &str {
        "prior_weight_decay"
    }

    fn options(&self) -> String {
        format!("strength={}", self.strength)
    }

    fn parts(&self) -> Parts {
        Parts { pulls: vec![Box::new(*self)], ..Parts::default() }
    }
}

impl Pull for PriorWeightDecay {
    fn at(&self, _step: u64) -> PullStrength {
        PullStrength { before_update: self.strength, ..PullStrength::default() }
    }

    fn decay(&self) -> DecayOrder {
        DecayOrder::Replaced
    }
}
