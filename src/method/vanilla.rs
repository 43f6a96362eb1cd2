//! Plain fine-tuning: every weight trains.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Preset};
use crate::error::Result;
use crate::model::Parameter;
use crate::values::{OneOrMany, Positive, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    learning_rate_factor: Option<OneOrMany<Positive>>,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let factors = axis(&self.learning_rate_factor, Positive(1.0));
        let method =
            |factor: &Positive| -> Arc<dyn Method> { Arc::new(Vanilla { learning_rate_factor: factor.0 }) };
        Ok(factors.iter().map(method).collect())
    }
}

/// Plain fine-tuning.
struct Vanilla {
    learning_rate_factor: f64,
}

impl Method for Vanilla {
    fn name(&self) -> &str {
        "vanilla"
    }

    fn options(&self) -> String {
        match self.learning_rate_factor {
            1.0 => String::new(),
            factor => format!("learning_rate_factor={factor}"),
        }
    }

    fn is_vanilla(&self) -> bool {
        true
    }

    fn rate(&self, _: &Parameter, _layers: usize) -> f64 {
        self.learning_rate_factor
    }
}
