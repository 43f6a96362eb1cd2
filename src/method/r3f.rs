//! R3F (Aghajanyan et al., 2021): a second pass with noise on the embeddings of words, whose predictions are to agree with those
//! of the first.
//!
//! L + λ (KL(p′‖p) + KL(p‖p′)), means over examples, with the gradients of both sides. As in the released code (fairseq's
//! `sentence_prediction_r3f`) the embeddings are constants in the noised pass, and a regression has no such term unless
//! `regression: mse` asks for λ times the squared difference of the scores.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::divergence::{squared_difference, symmetric_kl};
use super::registry::MethodOptions;
use super::{Method, Parts, Passes, Penalty, Preset};
use crate::error::Result;
use crate::model::{Noise, NoiseKind, Shift};
use crate::values::{NonNegative, OneOrMany, axis, yaml_name};

/// The place of this noise in the network.
const SITE: u32 = 0;

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    lambda: Option<OneOrMany<NonNegative>>,
    epsilon: Option<NonNegative>,
    noise: Option<OneOrMany<NoiseKind>>,
    regression: Option<Regression>,
}

/// What is asked of scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Regression {
    /// Nothing.
    #[default]
    None,
    /// That the squared difference is small.
    Mse,
}

/// R3F.
#[derive(Clone, Copy)]
pub(super) struct R3F {
    lambda: f64,
    noise: Noise,
    regression: Regression,
}

impl Options {
    /// Returns the method at each point of the grid.
    pub(super) fn points(&self) -> Vec<R3F> {
        let lambdas = axis(&self.lambda, NonNegative(1.0));
        let kinds = axis(&self.noise, NoiseKind::Uniform);
        let scale = self.epsilon.map_or(1e-5, |epsilon| epsilon.0);
        let regression = self.regression.unwrap_or_default();
        let with = |lambda: &NonNegative| {
            let lambda = lambda.0;
            kinds.iter().map(move |&kind| R3F { lambda, noise: Noise { kind, scale }, regression })
        };
        lambdas.iter().flat_map(with).collect()
    }
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        Ok(self.points().into_iter().map(|point| Arc::new(point) as Arc<dyn Method>).collect())
    }
}

impl Method for R3F {
    fn name(&self) -> &str {
        "r3f"
    }

    fn options(&self) -> String {
        let Self { lambda, noise: Noise { kind, scale }, regression } = self;
        let [kind, regression] = [yaml_name(kind), yaml_name(regression)];
        format!("lambda={lambda} epsilon={scale} noise={kind} regression={regression}")
    }

    fn parts(&self) -> Parts {
        let penalties: Vec<Box<dyn Penalty>> =
            if self.lambda > 0.0 { vec![Box::new(*self)] } else { Vec::new() };
        Parts { penalties, ..Parts::default() }
    }
}

impl Penalty for R3F {
    fn further_passes(&self, regression: bool) -> usize {
        usize::from(!regression || self.regression == Regression::Mse)
    }

    fn term(&self, passes: &Passes, logits: &Tensor) -> Result<Tensor> {
        let difference = match (passes.targets.kind(), self.regression) {
            (Kind::Int64, _) => symmetric_kl,
            (_, Regression::Mse) => squared_difference,
            (_, Regression::None) => return Ok(Tensor::f_zeros([], (Kind::Float, logits.device()))?),
        };
        let by = passes.embedding_noise(self.noise, SITE)?;
        let noised = passes.shifted_logits(Shift { by, of_constants: true })?;
        Ok(difference(&noised, logits)?.f_mul_scalar(self.lambda / passes.examples as f64)?)
    }
}
