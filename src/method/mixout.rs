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
use super::{Method, Parts, Preset, TrainingPoint, WeightTransform};
use crate::child::{StepMask, mask_in_place};
use crate::error::Result;
use crate::libtorch::{elements_mut, with_backward};
use crate::model::{Parameter, ParameterId, ParameterKind};
use crate::random::{Bernoulli, Key, Purpose};
use crate::values::{OneOrMany, PartialShare, yaml_name};

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
        let shares = self.q.as_ref().map_or(&[PartialShare(0.1)][..], |shares| &shares.0);
        let forms = self.mask.as_ref().map_or(&[MaskForm::InputNeuron][..], |forms| &forms.0);
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

    fn parts(&self) -> Parts {
        let mixing = Mixing { mixout: *self, own_start: RefCell::default() };
        let weights: Vec<Box<dyn WeightTransform>> =
            if self.q > 0.0 { vec![Box::new(mixing)] } else { Vec::new() };
        Parts { weights, dropout: self.dropout, ..Parts::default() }
    }
}

/// Mixout in one run.
struct Mixing {
    mixout: Mixout,
    /// What matrices had at the first step, where that is not what the checkpoint brought: those of a new head, and of
    /// layers that were drawn anew or pruned.
    own_start: RefCell<HashMap<ParameterId, Tensor>>,
}

impl WeightTransform for Mixing {
    fn apply(&self, weights: &mut [Tensor], at: &TrainingPoint) -> Result<()> {
        if at.step == 0 {
            self.keep_start(at)?;
        }
        let key = Key::derive(at.seed, Purpose::Mixout, at.step);
        for (id, parameter) in at.parameters.iter().filter(|(_, own)| own.kind == ParameterKind::Weight) {
            let weight = &mut weights[id.index()];
            // One that does not train is W₀ already.
            if weight.requires_grad() {
                let start = match self.own_start.borrow().get(&id) {
                    Some(own) => own.shallow_clone(),
                    None => at.parameters.part(at.start, id)?,
                };
                *weight = self.mixed(weight, &start, parameter, key.of_part(id.index() as u64))?;
            }
        }
        Ok(())
    }
}

impl Mixing {
    /// Copies the values of the matrices that do not start from the checkpoint's.
    fn keep_start(&self, at: &TrainingPoint) -> Result<()> {
        let mut own_start = self.own_start.borrow_mut();
        for (id, _) in at.parameters.iter().filter(|(_, own)| own.kind == ParameterKind::Weight) {
            let values = at.parameters.part(at.parameters.values(), id)?;
            if !values.f_equal(&at.parameters.part(at.start, id)?)? {
                let mut copy = values.f_empty_like()?;
                copy.f_copy_(&values)?;
                own_start.insert(id, copy);
            }
        }
        Ok(())
    }

    /// Returns W′ of a matrix, in its type. W₀ is rounded as W is, so that a weight that did not move is W₀ in W′ as well.
    fn mixed(&self, weight: &Tensor, start: &Tensor, parameter: &Parameter, key: Key) -> Result<Tensor> {
        let Mixout { q, mask, .. } = self.mixout;
        let kind = weight.kind();
        let factors =
            Factors { q, mask, key, shape: parameter.shape.clone(), input_first: parameter.input_first };
        let scale = 1.0 / (1.0 - q);
        let own = weight.f_detach()?.f_to_kind(Kind::Float)?;
        let start = start.f_view_as(&own)?.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
        // W₀ + M (W − W₀) / (1 − q), which is the same.
        let mixed = start.f_lerp_tensor(&own, &factors.draw(weight.device(), scale)?)?.f_to_kind(kind)?;
        let scale = if mask == MaskForm::Weight { scale } else { 1.0 };
        // M is drawn again and not kept.
        with_backward(mixed, &[weight], move |gradient| {
            let factors = factors.draw(gradient.device(), scale)?;
            Ok(vec![gradient.f_mul(&factors)?.f_to_kind(gradient.kind())?])
        })
    }
}

/// M of one matrix.
struct Factors {
    q: f64,
    mask: MaskForm,
    key: Key,
    shape: Vec<i64>,
    input_first: bool,
}

impl Factors {
    /// Draws M times a factor, in float32, in the shape of the matrix or one that is extended to it.
    fn draw(&self, device: Device, factor: f64) -> Result<Tensor> {
        let mut shape = self.shape.clone();
        if self.mask == MaskForm::InputNeuron {
            match self.input_first {
                true => shape[1..].fill(1),
                false => shape[0] = 1,
            }
        }
        let numbers = [shape.iter().product::<i64>()];
        let drawn = if device.is_cuda() {
            tch::manual_seed((self.key.as_u64() >> 1) as i64);
            let kept = Tensor::f_rand(numbers, (Kind::Float, device))?.f_ge(self.q)?;
            kept.f_to_kind(Kind::Float)?.f_mul_scalar(factor)?
        } else {
            let mut drawn = Tensor::f_ones(numbers, (Kind::Float, device))?;
            let limit = Bernoulli::new(1.0 - self.q).limit;
            let mask = StepMask::Random { key: self.key, limit, scale: factor as f32 };
            mask_in_place(elements_mut(&mut drawn)?, mask, 0);
            drawn
        };
        Ok(drawn.f_view(shape.as_slice())?)
    }
}
