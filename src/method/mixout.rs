//! Mixout (Lee et al., 2020): at every step, passes use the weights that training started from in place of some weights.
//!
//! With W₀ those of the start and M = 1 with probability 1 − q, else 0, the passes of a step use
//! W′ = [(1 − M) W₀ + M W − q W₀] / (1 − q) for the matrix W of every linear layer, whose mean over M is W. Scoring uses W.
//! Numbers come from Philox on the CPU; on CUDA libtorch's generator draws, seeded by the same key.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::mixed_weights::{Factors, MixingMask, Sharing, StartOfMatrices, mixed};
use super::registry::MethodOptions;
use super::{Method, Parts, Preset, TrainingPoint, WeightTransform, WeightsInUse, weights_of};
use crate::error::Result;
use crate::model::ParameterKind;
use crate::values::{OneOrMany, PartialShare, axis, yaml_name};

/// The options as typed in YAML.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    q: Option<OneOrMany<PartialShare>>,
    mask: Option<OneOrMany<MaskForm>>,
    dropout: Option<bool>,
}

/// What shares one number of M.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MaskForm {
    /// All weights of an input neuron; the gradient has no factor 1 / (1 − q), as in the released code.
    InputNeuron,
    /// A weight has its own.
    Weight,
}

/// Mixout.
#[derive(Clone, Copy)]
struct Mixout {
    q: f64,
    mask: MaskForm,
    dropout: bool,
}

impl MethodOptions for Options {
    fn resolve(&self, _: Preset) -> Result<Vec<Arc<dyn Method>>> {
        let dropout = self.dropout.unwrap_or(false);
        let shares = axis(&self.q, PartialShare(0.1));
        let forms = axis(&self.mask, MaskForm::InputNeuron);
        let with = |&mask: &MaskForm| {
            shares.iter().map(move |q| Arc::new(Mixout { q: q.0, mask, dropout }) as Arc<dyn Method>)
        };
        Ok(forms.iter().flat_map(with).collect())
    }
}

impl Method for Mixout {
    fn name(&self) -> &str {
        "mixout"
    }

    fn options(&self) -> String {
        format!("q={} mask={} dropout={}", self.q, yaml_name(&self.mask), self.dropout)
    }

    fn state_bytes(&self, WeightsInUse { declared, changes, number }: WeightsInUse) -> usize {
        // In a step, the matrices that passes use and their gradients.
        let matrices = weights_of(declared, |own| own.kind == ParameterKind::Weight && changes(own));
        if self.q > 0.0 { 2 * number * matrices } else { 0 }
    }

    fn parts(&self) -> Parts {
        let mixing = Mixing { mixout: *self, start: StartOfMatrices::default() };
        let weights: Vec<Box<dyn WeightTransform>> =
            if self.q > 0.0 { vec![Box::new(mixing)] } else { Vec::new() };
        Parts { weights, dropout: self.dropout, ..Parts::default() }
    }
}

/// Mixout in one run.
struct Mixing {
    mixout: Mixout,
    start: StartOfMatrices,
}

impl WeightTransform for Mixing {
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()> {
        let Mixout { q, mask, .. } = self.mixout;
        // As released, or the derivative of W′.
        let (sharing, gradient_factor) = match mask {
            MaskForm::InputNeuron => (Sharing::Inputs, 1.0),
            MaskForm::Weight => (Sharing::Nothing, 1.0 / (1.0 - q)),
        };
        self.start.keep(at)?;
        for (id, parameter) in at.parameters.iter().filter(|(_, own)| own.kind == ParameterKind::Weight) {
            let weight = &mut weights[id.index()];
            // One that does not train is W₀ already.
            if weight.requires_grad() {
                let mask = MixingMask::Drawn(Factors::new(q, sharing, parameter, id, at.seed, at.step));
                *weight = mixed(weight, &self.start.of(id, at)?, 1.0 / (1.0 - q), gradient_factor, mask)?;
            }
        }
        Ok(())
    }
}
