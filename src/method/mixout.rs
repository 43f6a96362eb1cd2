//! Mixout (Lee et al., 2020): at every step, passes use the weights that training started from in place of some weights.
//!
//! With W₀ those of the start and M = 1 with probability 1 − q, else 0, the passes of a step use
//! W′ = [(1 − M) W₀ + M W − q W₀] / (1 − q) for the matrix W of every linear layer, whose mean over M is W. Scoring uses W.
//! Numbers come from Philox on the CPU; on CUDA libtorch's generator draws, seeded by the same key.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::registry::MethodOptions;
use super::{Method, Parts, Preset, TrainingPoint, WeightTransform, WeightsInUse, weights_of};
use crate::child::{StepMask, mask_in_place};
use crate::error::Result;
use crate::libtorch::{elements_mut, seed_generators, with_backward};
use crate::model::{Parameter, ParameterId, ParameterKind};
use crate::random::{Bernoulli, Key, Purpose};
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
        let gradient_factor = if mask == MaskForm::Weight { 1.0 / (1.0 - q) } else { 1.0 };
        self.start.keep(at)?;
        for (id, parameter) in at.parameters.iter().filter(|(_, own)| own.kind == ParameterKind::Weight) {
            let weight = &mut weights[id.index()];
            // One that does not train is W₀ already.
            if weight.requires_grad() {
                let draw = Factors::new(q, mask, parameter, id, at.seed, at.step);
                let draw = move |factor, device| draw.draw(factor, device);
                *weight = mixed(weight, &self.start.of(id, at)?, 1.0 / (1.0 - q), gradient_factor, draw)?;
            }
        }
        Ok(())
    }
}

/// The values of the matrices of linear layers that training starts from.
#[derive(Default)]
pub(super) struct StartOfMatrices {
    /// What matrices had at the first step, where that is not what the checkpoint brought: those of a new head, and of
    /// layers that were drawn anew or pruned.
    own: RefCell<HashMap<ParameterId, Tensor>>,
}

impl StartOfMatrices {
    /// Copies, at the first step, the values of the matrices that do not start from the checkpoint's.
    pub(super) fn keep(&self, at: &TrainingPoint) -> Result<()> {
        let matrices = at.parameters.iter().filter(|(_, own)| own.kind == ParameterKind::Weight);
        for (id, _) in matrices.filter(|_| at.step == 0) {
            let values = at.parameters.part(at.parameters.values(), id)?;
            if !values.f_equal(&at.parameters.part(at.start, id)?)? {
                let mut copy = values.f_empty_like()?;
                copy.f_copy_(&values)?;
                self.own.borrow_mut().insert(id, copy);
            }
        }
        Ok(())
    }

    /// Returns the values of a matrix, `[count]`.
    pub(super) fn of(&self, id: ParameterId, at: &TrainingPoint) -> Result<Tensor> {
        match self.own.borrow().get(&id) {
            Some(own) => Ok(own.shallow_clone()),
            None => at.parameters.part(at.start, id),
        }
    }
}

/// Returns T + M (W − T) / (1 − q) for a matrix W and a target T of its values, in the type of W: the form of W′ above, with T for
/// W₀. T is rounded as W is, so that a weight that did not move is T in W′ as well.
///
/// `draw` makes M times a factor in float32, `factor` is 1 / (1 − q), and W gets the gradient of W′ times M and
/// `gradient_factor`.
pub(super) fn mixed(
    weight: &Tensor,
    target: &Tensor,
    factor: f64,
    gradient_factor: f64,
    draw: impl Fn(f64, Device) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    let kind = weight.kind();
    let own = weight.f_detach()?.f_to_kind(Kind::Float)?;
    let target = target.f_view_as(&own)?.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
    let mixed = target.f_lerp_tensor(&own, &draw(factor, weight.device())?)?.f_to_kind(kind)?;
    // M is drawn again and not kept.
    with_backward(mixed, &[weight], move |gradient| {
        let factors = draw(gradient_factor, gradient.device())?;
        Ok(vec![gradient.f_mul(&factors)?.f_to_kind(gradient.kind())?])
    })
}

/// M of one matrix in one step.
pub(super) struct Factors {
    q: f64,
    key: Key,
    /// The shape of the matrix, or one that is extended to it.
    shape: Vec<i64>,
}

impl Factors {
    /// Makes those of a matrix in a step.
    fn new(q: f64, mask: MaskForm, parameter: &Parameter, id: ParameterId, seed: u64, step: u64) -> Self {
        let mut shape = parameter.shape.clone();
        if mask == MaskForm::InputNeuron {
            match parameter.input_first {
                true => shape[1..].fill(1),
                false => shape[0] = 1,
            }
        }
        let key = Key::derive(seed, Purpose::Mixout, step).of_part(id.index() as u64);
        Self { q, key, shape }
    }

    /// Makes those of a matrix in a step, one number an input.
    pub(super) fn of_inputs(q: f64, parameter: &Parameter, id: ParameterId, seed: u64, step: u64) -> Self {
        Self::new(q, MaskForm::InputNeuron, parameter, id, seed, step)
    }

    /// Draws M times a factor, in float32.
    pub(super) fn draw(&self, factor: f64, device: Device) -> Result<Tensor> {
        let numbers = [self.shape.iter().product::<i64>()];
        let drawn = if device.is_cuda() {
            seed_generators(self.key.to_seed())?;
            let kept = Tensor::f_rand(numbers, (Kind::Float, device))?.f_ge(self.q)?;
            kept.f_to_kind(Kind::Float)?.f_mul_scalar(factor)?
        } else {
            let mut drawn = Tensor::f_ones(numbers, (Kind::Float, device))?;
            let limit = Bernoulli::new(1.0 - self.q).limit;
            let mask = StepMask::Random { key: self.key, limit, scale: factor as f32 };
            mask_in_place(elements_mut(&mut drawn)?, mask, 0);
            drawn
        };
        Ok(drawn.f_view(self.shape.as_slice())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ParameterPlace, ParameterTable};

    /// A column for each input, wherever inputs stand; the mean over M is the matrix.
    #[test]
    fn a_mask_has_a_number_for_each_input_or_weight_and_the_share_that_is_kept() {
        for (input_first, mask, expected) in [
            (false, MaskForm::InputNeuron, [1, 500, 1]),
            (true, MaskForm::InputNeuron, [400, 1, 1]),
            (false, MaskForm::Weight, [400, 500, 1]),
        ] {
            let mut table = ParameterTable::default();
            let kind = ParameterKind::Weight;
            let id = table.declare("matrix", &[400, 500, 1], kind, ParameterPlace::EncoderLayer(0));
            if input_first {
                table.store_input_first(id);
            }
            let factors = Factors::new(0.3, mask, table.iter().next().unwrap(), id, 1, 0);
            let drawn = factors.draw(2.0, Device::Cpu).unwrap();
            assert_eq!(drawn.size(), expected);
            assert_eq!(drawn, factors.draw(2.0, Device::Cpu).unwrap());
            let kept = drawn.eq(2.0).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(kept + drawn.eq(0.0).sum(Kind::Int64).int64_value(&[]), drawn.numel() as i64);
            let (share, count) = (kept as f64 / drawn.numel() as f64, drawn.numel() as f64);
            assert!((share - 0.7).abs() < 5.0 * (0.3 * 0.7 / count).sqrt(), "{share}");
        }
    }
}
