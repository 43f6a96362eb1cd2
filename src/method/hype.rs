//! HyPe (Yuan et al., 2023): noise on the hidden states that enter each Transformer layer, in training.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Parts, Preset};
use crate::error::Result;
use crate::model::{Noise, NoiseKind};
use crate::values::{NonNegative, OneOrMany, axis, yaml_name};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    noise: Option<OneOrMany<NoiseKind>>,
    scale: Option<OneOrMany<NonNegative>>,
}

/// HyPe-N with normal noise, HyPe-U with uniform noise.
struct HyPe(Noise);

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let kinds = axis(&self.noise, NoiseKind::Normal);
        let scales = axis(&self.scale, NonNegative(1e-5));
        let with = |&kind: &NoiseKind| {
            scales.iter().map(move |scale| Arc::new(HyPe(Noise { kind, scale: scale.0 })) as Arc<dyn Method>)
        };
        Ok(kinds.iter().flat_map(with).collect())
    }
}

impl Method for HyPe {
    fn name(&self) -> &str {
        "hype"
    }

    fn options(&self) -> String {
        format!("noise={} scale={}", yaml_name(&self.0.kind), self.0.scale)
    }

    fn parts(&self) -> Parts {
        Parts { hidden_noise: Some(self.0).filter(|noise| noise.scale > 0.0), ..Parts::default() }
    }
}
