//! RecAdam (Chen et al., 2020): the update starts as a pull to the pretrained weights and becomes that of Adam, by an annealing
//! λ(t) = 1 / (1 + exp(−k (t − t₀))).
//!
//! As the released code: w ← w − λ(t) η m̂ / (√v̂ + ε), then w ← w − η (1 − λ(t)) γ (w − w₀), then weight decay, with t from 1.
//! New weights take plain steps.

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
    k: Option<OneOrMany<NonNegative>>,
    t0: Option<OneOrMany<NonNegative>>,
    gamma: Option<NonNegative>,
}

/// RecAdam's annealing.
#[derive(Clone, Copy)]
struct RecAdam {
    k: f64,
    t0: f64,
    gamma: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        // The defaults of the released scripts.
        let gamma = self.gamma.map_or(5000.0, |gamma| gamma.0);
        let slopes = axis(&self.k, NonNegative(0.5));
        let middles = axis(&self.t0, NonNegative(250.0));
        let with = |k: &NonNegative| {
            let k = k.0;
            middles.iter().map(move |t0| Arc::new(RecAdam { k, t0: t0.0, gamma }) as Arc<dyn Method>)
        };
        Ok(slopes.iter().flat_map(with).collect())
    }
}

impl Method for RecAdam {
    fn name(&self) -> &str {
        "recadam"
    }

    fn options(&self) -> String {
        format!("k={} t0={} gamma={}", self.k, self.t0, self.gamma)
    }

    fn parts(&self) -> Parts {
        Parts { pulls: vec![Box::new(*self)], ..Parts::default() }
    }
}

impl Pull for RecAdam {
    fn at(&self, step: u64) -> PullStrength {
        let annealed = 1.0 / (1.0 + (-self.k * (step as f64 + 1.0 - self.t0)).exp());
        PullStrength {
            update_factor: annealed,
            after_update: (1.0 - annealed) * self.gamma,
            ..PullStrength::default()
        }
    }

    fn decay(&self) -> DecayOrder {
        DecayOrder::AfterPull
    }
}
