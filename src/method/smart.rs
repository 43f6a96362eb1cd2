//! SMART's smoothness term (Jiang et al., 2020), with one step of ascent: predictions are to stay where they are when the
//! embeddings of words move a little into the direction in which predictions move most.
//!
//! From normal noise z on the embeddings, whose pass differs from the first by ℓ(z) = Σ KL(p‖p′) + KL(p′‖p), the shift is
//! d = z + step_size · g / (max |g| + 1e-6) with g = ∂ℓ/∂z, the maximum over the numbers of a token, cut to ± radius. The loss
//! gets α (KL(p̄′‖p) + KL(p̄‖p′)), means over examples; p̄ is p as a constant. In regression both are squared differences of scores.
//! What the released code (mt-dnn) does otherwise is in docs/methods.md.

use std::sync::Arc;

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::divergence::{divergence_from_constant, squared_difference, symmetric_kl};
use super::registry::MethodOptions;
use super::{Method, Parts, Passes, Penalty, Preset};
use crate::error::Result;
use crate::model::{Noise, NoiseKind, Shift};
use crate::values::{NonNegative, OneOrMany, Positive, axis};

/// The place of this noise in the network.
const SITE: u32 = 1;
/// Keeps the largest number of a gradient from zero.
const SMALLEST_GRADIENT: f64 = 1e-6;

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    alpha: Option<OneOrMany<NonNegative>>,
    step_size: Option<NonNegative>,
    noise: Option<NonNegative>,
    radius: Option<Positive>,
}

/// SMART.
#[derive(Clone, Copy)]
struct Smart {
    alpha: f64,
    step_size: f64,
    /// The standard deviation of z.
    noise: f64,
    radius: f64,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let step_size = self.step_size.map_or(1e-3, |step_size| step_size.0);
        let noise = self.noise.map_or(1e-5, |noise| noise.0);
        let radius = self.radius.map_or(1e-5, |radius| radius.0);
        let alphas = axis(&self.alpha, NonNegative(1.0));
        let method = |alpha: &NonNegative| {
            Arc::new(Smart { alpha: alpha.0, step_size, noise, radius }) as Arc<dyn Method>
        };
        Ok(alphas.iter().map(method).collect())
    }
}

impl Method for Smart {
    fn name(&self) -> &str {
        "smart"
    }

    fn options(&self) -> String {
        let Self { alpha, step_size, noise, radius } = self;
        format!("alpha={alpha} step_size={step_size} noise={noise} radius={radius}")
    }

    fn parts(&self) -> Parts {
        let penalties: Vec<Box<dyn Penalty>> =
            if self.alpha > 0.0 { vec![Box::new(*self)] } else { Vec::new() };
        Parts { penalties, ..Parts::default() }
    }
}

impl Penalty for Smart {
    fn further_passes(&self, _regression: bool) -> usize {
        2
    }

    fn term(&self, passes: &Passes, logits: &Tensor) -> Result<Tensor> {
        let shift = self.shift(passes, &logits.f_detach()?)?;
        let shifted = passes.shifted_logits(Shift { by: shift, of_constants: false })?;
        let apart = match passes.targets.kind() {
            Kind::Int64 => divergence_from_constant(&shifted, logits)?
                .f_add(&divergence_from_constant(logits, &shifted)?)?,
            _ => squared_difference(&shifted, logits)?,
        };
        Ok(apart.f_mul_scalar(self.alpha / passes.examples as f64)?)
    }
}

impl Smart {
    /// Looks for the shift that moves the outputs away from `logits`, which are constants.
    fn shift(&self, passes: &Passes, logits: &Tensor) -> Result<Tensor> {
        let noise = Noise { kind: NoiseKind::Normal, scale: self.noise };
        let start = passes.embedding_noise(noise, SITE)?;
        let moved = start.f_detach()?.f_set_requires_grad(true)?;
        let found = passes.logits_of_shift(&moved)?;
        let apart = match passes.targets.kind() {
            Kind::Int64 => symmetric_kl(&found, logits)?,
            _ => squared_difference(&found, logits)?,
        };
        let ascent = Tensor::f_run_backward(&[apart], &[moved], false, false)?.remove(0);
        let largest = ascent.f_abs()?.f_amax([-1], true)?.f_add_scalar(SMALLEST_GRADIENT)?;
        let step = ascent.f_div(&largest)?.f_mul_scalar(self.step_size)?;
        Ok(start.f_add(&step)?.f_clamp(-self.radius, self.radius)?)
    }
}
