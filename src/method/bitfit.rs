//! BitFit (Ben-Zaken et al., 2022): only biases train, and the task's head.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Preset};
use crate::error::{Error, Result};
use crate::model::{Parameter, ParameterKind, ParameterPlace};

/// The options as typed in YAML: there are none.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {}

/// Trains the biases of all layers, those of normalisations and of the pooler among them, and the whole head.
struct BitFit;

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        Ok(vec![Arc::new(BitFit)])
    }
}

impl Method for BitFit {
    fn name(&self) -> &str {
        "bitfit"
    }

    fn options(&self) -> String {
        String::new()
    }

    fn trains(&self, parameter: &Parameter, _layers: usize) -> bool {
        let is_bias = matches!(parameter.kind, ParameterKind::Bias | ParameterKind::LayerNormBias);
        is_bias || parameter.place == ParameterPlace::Head
    }

    fn check(&self, declared: &[Parameter]) -> Result<()> {
        let is_bias = |own: &Parameter| own.place != ParameterPlace::Head && self.trains(own, 0);
        if declared.iter().any(is_bias) {
            return Ok(());
        }
        Err(Error::configuration(
            "bitfit: the model has no biases outside its head, so the head alone would train",
        ))
    }
}
