//! Top-K tuning (Houlsby et al., 2019): the topmost Transformer layers train, and what stands above them.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Preset};
use crate::error::{Error, Result};
use crate::model::{Parameter, ParameterPlace};
use crate::values::OneOrMany;

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    k: Option<OneOrMany<usize>>,
}

/// Trains the top `k` layers, the pooler and the head.
struct TopLayers {
    k: usize,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let counts = self.k.as_ref().ok_or_else(|| {
            Error::configuration(
                "top_layers: `k` is missing, the number of layers that train: `top_layers: {k: 3}`",
            )
        })?;
        Ok(counts.0.iter().map(|&k| Arc::new(TopLayers { k }) as Arc<dyn Method>).collect())
    }
}

impl Method for TopLayers {
    fn name(&self) -> &str {
        "top_layers"
    }

    fn options(&self) -> String {
        format!("k={}", self.k)
    }

    fn trains(&self, parameter: &Parameter, layers: usize) -> bool {
        match parameter.place {
            ParameterPlace::EncoderLayer(layer) => layer >= layers.saturating_sub(self.k),
            ParameterPlace::Embeddings => false,
            ParameterPlace::AboveLayers | ParameterPlace::Pooler | ParameterPlace::Head => true,
        }
    }

    fn layers_needed(&self) -> usize {
        self.k
    }
}
