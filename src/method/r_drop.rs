//! R-Drop (Liang et al., 2021): two passes with different dropout, whose predictions are to agree.
//!
//! L₁ + L₂ + α (KL(p₁‖p₂) + KL(p₂‖p₁)) / 2, all means over examples; in regression α times the squared difference of the
//! scores.

use std::sync::Arc;

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::divergence::{squared_difference, symmetric_kl};
use super::registry::MethodOptions;
use super::{Method, Parts, Passes, Penalty, Preset};
use crate::error::Result;
use crate::model::loss;
use crate::values::{NonNegative, OneOrMany, axis};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    alpha: Option<OneOrMany<NonNegative>>,
}

/// R-Drop.
#[derive(Clone, Copy)]
struct RDrop {
    alpha: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let alphas = axis(&self.alpha, NonNegative(1.0));
        Ok(alphas.iter().map(|alpha| Arc::new(RDrop { alpha: alpha.0 }) as Arc<dyn Method>).collect())
    }
}

impl Method for RDrop {
    fn name(&self) -> &str {
        "r_drop"
    }

    fn options(&self) -> String {
        format!("alpha={}", self.alpha)
    }

    fn needs_dropout(&self) -> bool {
        self.alpha > 0.0
    }

    fn conflict(&self, other: &dyn Method) -> Option<&'static str> {
        let both = self.needs_dropout() && !other.parts().dropout && other.name() != self.name();
        both.then_some("its two passes differ by dropout alone, which the other turns off; give that one `dropout: true`")
    }

    fn parts(&self) -> Parts {
        // Without a weight on their agreement, a second pass is only more of the first.
        let penalties: Vec<Box<dyn Penalty>> =
            if self.alpha > 0.0 { vec![Box::new(*self)] } else { Vec::new() };
        Parts { penalties, ..Parts::default() }
    }
}

impl Penalty for RDrop {
    fn further_passes(&self, _regression: bool) -> usize {
        1
    }

    fn term(&self, passes: &Passes, logits: &Tensor) -> Result<Tensor> {
        let second = passes.logits()?;
        let loss = loss(&second, passes.targets, passes.examples)?;
        let (apart, weight) = match passes.targets.kind() {
            Kind::Int64 => (symmetric_kl(logits, &second)?, self.alpha / 2.0),
            _ => (squared_difference(logits, &second)?, self.alpha),
        };
        Ok(loss.f_add(&apart.f_mul_scalar(weight / passes.examples as f64)?)?)
    }
}
