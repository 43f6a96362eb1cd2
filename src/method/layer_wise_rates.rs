//! Layer-wise learning rates: lower layers learn more slowly, each by a factor.
//!
//! As ELECTRA's fine-tuning code counts (Clark et al., 2020): of L layers the i-th from 0 has the factor decay^(L + 1 − i), what
//! stands below them decay^(L + 2), pooler and head 1.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Preset};
use crate::error::Result;
use crate::model::{Parameter, ParameterPlace};
use crate::values::{OneOrMany, Share, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    decay: Option<OneOrMany<Share>>,
}

/// Layer-wise learning rates.
struct LayerWiseRates {
    decay: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let decays = axis(&self.decay, Share(0.9));
        Ok(decays
            .iter()
            .map(|decay| Arc::new(LayerWiseRates { decay: decay.0 }) as Arc<dyn Method>)
            .collect())
    }
}

impl Method for LayerWiseRates {
    fn name(&self) -> &str {
        "layer_wise_rates"
    }

    fn options(&self) -> String {
        format!("decay={}", self.decay)
    }

    fn rate(&self, parameter: &Parameter, layers: usize) -> f64 {
        let below_head = match parameter.place {
            ParameterPlace::Embeddings => layers + 2,
            ParameterPlace::EncoderLayer(layer) => layers + 1 - layer,
            ParameterPlace::AboveLayers | ParameterPlace::Pooler | ParameterPlace::Head => 0,
        };
        self.decay.powi(below_head as i32)
    }
}
