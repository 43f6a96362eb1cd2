//! Re-initialised top layers (Zhang et al., 2021, "Revisiting few-sample BERT fine-tuning"): the topmost layers, and the pooler,
//! start from new weights.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Preset};
use crate::error::Result;
use crate::model::{Classifier, Parameter, ParameterPlace};
use crate::values::{OneOrMany, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    layers: Option<OneOrMany<usize>>,
    pooler: Option<bool>,
}

/// Draws layers anew, by the run's seed.
struct ReinitialisedLayers {
    layers: usize,
    pooler: bool,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let pooler = self.pooler.unwrap_or(true);
        let counts = axis(&self.layers, 1);
        let method = |&layers: &usize| Arc::new(ReinitialisedLayers { layers, pooler }) as Arc<dyn Method>;
        Ok(counts.iter().map(method).collect())
    }
}

impl Method for ReinitialisedLayers {
    fn name(&self) -> &str {
        "reinitialised_layers"
    }

    fn options(&self) -> String {
        format!("layers={} pooler={}", self.layers, self.pooler)
    }

    fn layers_needed(&self) -> usize {
        self.layers
    }

    fn draws_anew(&self, parameter: &Parameter, layers: usize) -> bool {
        match parameter.place {
            ParameterPlace::EncoderLayer(layer) => layer >= layers.saturating_sub(self.layers),
            ParameterPlace::Pooler => self.pooler,
            ParameterPlace::Embeddings | ParameterPlace::AboveLayers | ParameterPlace::Head => false,
        }
    }

    fn begin(&self, classifier: &mut Classifier, seed: u64) -> Result<()> {
        let layers = classifier.parameters.layers();
        classifier.reinitialise(seed, |parameter: &Parameter| self.draws_anew(parameter, layers))
    }
}
