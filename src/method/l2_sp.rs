//! L2-SP (Li et al., 2018): the loss has α/2 ‖w − w₀‖² for the weights that training starts from, and β/2 ‖w‖² for new ones.

use std::sync::Arc;

use serde::Deserialize;

use super::registry::MethodOptions;
use super::{Method, Parts, Preset, Pull, PullStrength};
use crate::error::Result;
use crate::values::{NonNegative, OneOrMany, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    alpha: Option<OneOrMany<NonNegative>>,
    beta: Option<NonNegative>,
}

/// L2-SP. The gradient of its terms is added to that of the loss, so masks and clipping see their sum.
#[derive(Clone, Copy)]
struct L2Sp {
    alpha: f64,
    beta: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let beta = self.beta.map_or(0.01, |beta| beta.0);
        let alphas = axis(&self.alpha, NonNegative(0.01));
        Ok(alphas.iter().map(|alpha| Arc::new(L2Sp { alpha: alpha.0, beta }) as Arc<dyn Method>).collect())
    }
}

impl Method for L2Sp {
    fn name(&self) -> &str {
        "l2_sp"
    }

    fn options(&self) -> String {
        format!("alpha={} beta={}", self.alpha, self.beta)
    }

    fn parts(&self) -> Parts {
        Parts { pulls: vec![Box::new(*self)], ..Parts::default() }
    }
}

impl Pull for L2Sp {
    fn at(&self, _step: u64) -> PullStrength {
        PullStrength { on_gradients: (self.alpha, self.beta), ..PullStrength::default() }
    }

    fn reaches_gradients(&self) -> bool {
        (self.alpha, self.beta) != (0.0, 0.0)
    }
}
