//! R4F (Aghajanyan et al., 2021): R3F, and the matrix of the head's last layer is divided by its largest singular value.
//!
//! As `torch.nn.utils.spectral_norm` estimates it: σ = uᵀ W v, with one power iteration v ← Wᵀ u / ‖Wᵀ u‖, u ← W v / ‖W v‖ a step;
//! u and v are constants. The released code (fairseq) iterates in every forward pass, so twice a step.

use std::cell::RefCell;
use std::sync::Arc;

use serde::Deserialize;
use tch::Tensor;

use super::r3f::{self, R3F};
use super::registry::MethodOptions;
use super::{Method, Parts, Preset, TrainingPoint, WeightTransform};
use crate::error::Result;
use crate::model::{ParameterId, Parameters, normal_rows};
use crate::random::{Key, Purpose};

/// Below this a norm counts as this.
const SMALLEST_NORM: f64 = 1e-12;
/// The row of random numbers that the first u is made of.
const FIRST_ROW: [u32; 3] = [1, 0, 0];

/// The options as typed in YAML: those of R3F.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct Options(r3f::Options);

/// R4F.
struct R4F(R3F);

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        Ok(self.0.points().into_iter().map(|point| Arc::new(R4F(point)) as Arc<dyn Method>).collect())
    }
}

impl Method for R4F {
    fn name(&self) -> &str {
        "r4f"
    }

    fn options(&self) -> String {
        self.0.options()
    }

    fn conflict(&self, other: &dyn Method) -> Option<&'static str> {
        (other.name() == "r3f").then_some("r4f already includes r3f's term; remove r3f")
    }

    fn parts(&self) -> Parts {
        Parts { weights: vec![Box::new(SpectralNorm::default())], ..self.0.parts() }
    }
}

/// W / σ(W) in place of the matrix W of the head's last layer.
#[derive(Default)]
struct SpectralNorm {
    /// Where the last step left off.
    state: RefCell<Option<SingularVectors>>,
}

/// Estimates of the singular vectors of a matrix that belong to its largest singular value.
struct SingularVectors {
    matrix: ParameterId,
    step: u64,
    /// u, `[out]`.
    left: Tensor,
    /// v, `[in]`.
    right: Tensor,
}

impl WeightTransform for SpectralNorm {
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()> {
        let weight = &mut weights[at.output.index()];
        let mut state = self.state.borrow_mut();
        let vectors = match state.take() {
            Some(vectors) if vectors.step == at.step => vectors,
            Some(vectors) => SingularVectors::of(weight, &vectors.left, at)?,
            None => SingularVectors::of(weight, &first(weight, at.seed)?, at)?,
        };
        *weight = vectors.normalised(weight)?;
        *state = Some(vectors);
        Ok(())
    }

    fn settles(&self) -> bool {
        true
    }

    fn settle(&self, parameters: &Parameters, _start: &Tensor) -> Result<()> {
        let state = self.state.borrow();
        let Some(vectors) = &*state else { return Ok(()) };
        let shape = parameters.get(vectors.matrix).shape.as_slice();
        let mut weight = parameters.part(&parameters.values_to_change(), vectors.matrix)?.f_view(shape)?;
        weight.f_copy_(&vectors.normalised(&weight)?)?;
        Ok(())
    }
}

impl SingularVectors {
    /// Takes one power iteration from `left`.
    fn of(weight: &Tensor, left: &Tensor, at: &TrainingPoint) -> Result<Self> {
        let weight = weight.f_detach()?;
        let right = unit(&weight.f_transpose(0, 1)?.f_mv(left)?)?;
        let left = unit(&weight.f_mv(&right)?)?;
        Ok(Self { matrix: at.output, step: at.step, left, right })
    }

    /// W / (uᵀ W v).
    fn normalised(&self, weight: &Tensor) -> Result<Tensor> {
        Ok(weight.f_div(&self.left.f_dot(&weight.f_mv(&self.right)?)?)?)
    }
}

/// The u of the first step: of a random direction.
fn first(weight: &Tensor, seed: u64) -> Result<Tensor> {
    let row = normal_rows(Key::derive(seed, Purpose::Initialisation, 0), &[FIRST_ROW], weight.size()[0])?;
    unit(&row.f_view([-1])?.f_to_device(weight.device())?)
}

fn unit(vector: &Tensor) -> Result<Tensor> {
    Ok(vector.f_div(&vector.f_norm()?.f_clamp_min(SMALLEST_NORM)?)?)
}
