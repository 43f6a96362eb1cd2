//! Weights that passes use in place of those that train: some of these, pushed away from targets, and for the others their targets.

use std::cell::RefCell;
use std::collections::HashMap;

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use super::TrainingPoint;
use crate::child::{CHUNK, StepMask, mask_in_place};
use crate::error::Result;
use crate::libtorch::{Number, elements, elements_mut, seed_generators, with_backward};
use crate::model::{Parameter, ParameterId, ParameterKind};
use crate::random::{Bernoulli, GROUP, Key, Purpose};

/// Returns T + M (W − T) · `factor` for a matrix W and a target T of its values, in the type of W. T is rounded as W is, so that a
/// weight that did not move is T in the result as well. The gradient of W is that of the result times M and `gradient_factor`.
///
/// # Errors
/// Fails if libtorch refuses an operation.
pub(super) fn mixed(
    weight: &Tensor,
    target: &Tensor,
    factor: f64,
    gradient_factor: f64,
    mask: MixingMask,
) -> Result<Tensor> {
    let (own, target) = (weight.f_detach()?.f_contiguous()?, target.f_contiguous()?);
    let mixed = match (own.device(), own.kind()) {
        (Device::Cpu, Kind::BFloat16) => mix::<bf16>(&own, &target, &mask.filler(factor)?)?,
        (Device::Cpu, _) => mix::<f32>(&own, &target, &mask.filler(factor)?)?,
        _ => mixed_on_device(&own, &target, &mask.draw(factor, own.device())?)?,
    };
    // M is drawn again and not kept.
    with_backward(mixed, &[weight], move |gradient| {
        let gradient = gradient.f_contiguous()?;
        Ok(vec![match (gradient.device(), gradient.kind()) {
            (Device::Cpu, Kind::BFloat16) => multiply::<bf16>(&gradient, &mask.filler(gradient_factor)?)?,
            (Device::Cpu, _) => multiply::<f32>(&gradient, &mask.filler(gradient_factor)?)?,
            _ => {
                let factors = mask.draw(gradient_factor, gradient.device())?;
                gradient.f_mul(&factors)?.f_to_kind(gradient.kind())?
            }
        }])
    })
}

/// M of one matrix in one step.
pub(super) enum MixingMask {
    /// Numbers that are drawn whenever they are needed.
    Drawn(Factors),
    /// Booleans in the shape of the matrix.
    Members(Tensor),
}

impl MixingMask {
    /// Returns M times a factor, in float32, in the shape of the matrix or one that is extended to it.
    fn draw(&self, factor: f64, device: Device) -> Result<Tensor> {
        match self {
            MixingMask::Drawn(factors) => factors.draw(factor, device),
            MixingMask::Members(members) => Ok(members.f_to_kind(Kind::Float)?.f_mul_scalar(factor)?),
        }
    }

    /// Returns what writes M times a factor for the elements of the matrix from one on, a multiple of [`GROUP`], on the CPU.
    fn filler(&self, factor: f64) -> Result<Filler<'_>> {
        match self {
            MixingMask::Drawn(factors) => factors.filler(factor),
            MixingMask::Members(members) => {
                let (members, factor) = (elements::<bool>(members)?, factor as f32);
                Ok(Box::new(move |start, factors| {
                    for (number, &member) in factors.iter_mut().zip(&members[start..]) {
                        *number = if member { factor } else { 0.0 };
                    }
                }))
            }
        }
    }
}

/// Writes the factors of the elements from a place on.
type Filler<'a> = Box<dyn Fn(usize, &mut [f32]) + Sync + 'a>;

/// What shares one number of M.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// All weights of an input neuron.
    Inputs,
    /// A weight has its own.
    Nothing,
}

/// Numbers of M that are 1 with probability 1 − q, else 0; from Philox on the CPU, from libtorch's generator with the same key on
/// CUDA.
pub(super) struct Factors {
    q: f64,
    key: Key,
    sharing: Sharing,
    /// The shape of the matrix, or one that is extended to it.
    shape: Vec<i64>,
    /// Elements of the matrix between those of one input and the next; 1 where inputs vary fastest.
    stride: usize,
}

impl Factors {
    /// Makes those of a matrix in a step.
    pub(super) fn new(
        q: f64,
        sharing: Sharing,
        parameter: &Parameter,
        id: ParameterId,
        seed: u64,
        step: u64,
    ) -> Self {
        let (mut shape, mut stride) = (parameter.shape.clone(), 1);
        if sharing == Sharing::Inputs {
            match parameter.input_first {
                true => {
                    stride = shape[1..].iter().product::<i64>() as usize;
                    shape[1..].fill(1);
                }
                false => shape[0] = 1,
            }
        }
        let key = Key::derive(seed, Purpose::Mixout, step).of_part(id.index() as u64);
        Self { q, key, sharing, shape, stride }
    }

    /// Draws M times a factor, in float32.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub(super) fn draw(&self, factor: f64, device: Device) -> Result<Tensor> {
        let numbers = [self.shape.iter().product::<i64>()];
        let drawn = if device.is_cuda() {
            seed_generators(self.key.to_seed())?;
            let kept = Tensor::f_rand(numbers, (Kind::Float, device))?.f_ge(self.q)?;
            kept.f_to_kind(Kind::Float)?.f_mul_scalar(factor)?
        } else {
            let mut drawn = Tensor::f_ones(numbers, (Kind::Float, device))?;
            mask_in_place(elements_mut(&mut drawn)?, self.mask(factor), 0);
            drawn
        };
        Ok(drawn.f_view(self.shape.as_slice())?)
    }

    fn mask(&self, factor: f64) -> StepMask<'static> {
        let limit = Bernoulli::new(1.0 - self.q).limit;
        StepMask::Random { key: self.key, limit, scale: factor as f32 }
    }

    fn filler(&self, factor: f64) -> Result<Filler<'_>> {
        if self.sharing == Sharing::Nothing {
            let mask = self.mask(factor);
            return Ok(Box::new(move |start, factors| {
                factors.fill(1.0);
                mask_in_place(factors, mask, start / GROUP);
            }));
        }
        let inputs = Vec::<f32>::try_from(self.draw(factor, Device::Cpu)?.f_view([-1])?)?;
        let stride = self.stride;
        Ok(Box::new(move |start, mut factors| {
            let (mut input, mut offset) = (start / stride % inputs.len(), start % stride);
            while !factors.is_empty() {
                let (count, own) = match stride {
                    1 => (inputs.len() - input, &inputs[input..]),
                    _ => (stride - offset, std::slice::from_ref(&inputs[input])),
                };
                let (now, rest) = factors.split_at_mut(count.min(factors.len()));
                match own {
                    [number] => now.fill(*number),
                    numbers => now.copy_from_slice(&numbers[..now.len()]),
                }
                (input, offset, factors) = ((input + own.len()) % inputs.len(), 0, rest);
            }
        }))
    }
}

/// Returns T + M (W − T) · f in the type of W, on the CPU, where `fill` writes M f.
fn mix<T: Number>(weight: &Tensor, target: &Tensor, fill: &Filler) -> Result<Tensor> {
    let mut mixed = weight.f_empty_like()?;
    let parts = elements_mut::<T>(&mut mixed)?.par_chunks_mut(CHUNK).enumerate();
    let sources = elements::<T>(weight)?.par_chunks(CHUNK).zip(elements(target)?.par_chunks(CHUNK));
    parts.zip(sources).for_each_init(
        || vec![0f32; CHUNK],
        |factors, ((part, mixed), (weights, targets))| {
            let factors = &mut factors[..mixed.len()];
            fill(part * CHUNK, factors);
            mix_part(mixed, weights, targets, factors);
        },
    );
    Ok(mixed)
}

/// The arithmetic of `torch.lerp`, which begins at the nearer end.
#[multiversion(targets = "simd")]
fn mix_part<T: Number>(mixed: &mut [T], weights: &[T], targets: &[f32], factors: &[f32]) {
    for (((mixed, weight), target), factor) in mixed.iter_mut().zip(weights).zip(targets).zip(factors) {
        let (weight, target) = (weight.to_float(), T::from_float(*target).to_float());
        let (coefficient, base) = if factor.abs() < 0.5 { (*factor, target) } else { (factor - 1.0, weight) };
        *mixed = T::from_float(coefficient.mul_add(weight - target, base));
    }
}

/// Returns T + M (W − T) · f in the type of W, through libtorch.
fn mixed_on_device(weight: &Tensor, target: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let kind = weight.kind();
    let own = weight.f_to_kind(Kind::Float)?;
    let target = target.f_view_as(&own)?.f_to_kind(kind)?.f_to_kind(Kind::Float)?;
    Ok(target.f_lerp_tensor(&own, factors)?.f_to_kind(kind)?)
}

/// Returns a gradient times factors, in its type, on the CPU.
fn multiply<T: Number>(gradient: &Tensor, fill: &Filler) -> Result<Tensor> {
    let mut products = gradient.f_empty_like()?;
    let parts = elements_mut::<T>(&mut products)?.par_chunks_mut(CHUNK).enumerate();
    parts.zip(elements::<T>(gradient)?.par_chunks(CHUNK)).for_each_init(
        || vec![0f32; CHUNK],
        |factors, ((part, products), gradient)| {
            let factors = &mut factors[..products.len()];
            fill(part * CHUNK, factors);
            multiply_part(products, gradient, factors);
        },
    );
    Ok(products)
}

#[multiversion(targets = "simd")]
fn multiply_part<T: Number>(products: &mut [T], gradient: &[T], factors: &[f32]) {
    for ((product, gradient), factor) in products.iter_mut().zip(gradient).zip(factors) {
        *product = T::from_float(gradient.to_float() * factor);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    /// The matrices that are looked at: whether inputs stand first, and what shares a number.
    const CASES: [(bool, Sharing); 4] = [
        (false, Sharing::Inputs),
        (true, Sharing::Inputs),
        (false, Sharing::Nothing),
        (true, Sharing::Nothing),
    ];

    fn factors(shape: &[i64], input_first: bool, sharing: Sharing) -> Factors {
        let mut table = ParameterTable::default();
        let kind = ParameterKind::Weight;
        let id = table.declare("matrix", shape, kind, ParameterPlace::EncoderLayer(0));
        if input_first {
            table.store_input_first(id);
        }
        Factors::new(0.3, sharing, table.iter().next().unwrap(), id, 1, 0)
    }

    /// A column for each input, wherever inputs stand; the mean over M is the matrix.
    #[test]
    fn a_mask_has_a_number_for_each_input_or_weight_and_the_share_that_is_kept() {
        let expected = [[1, 500, 1], [400, 1, 1], [400, 500, 1], [400, 500, 1]];
        for ((input_first, sharing), expected) in CASES.into_iter().zip(expected) {
            let factors = factors(&[400, 500, 1], input_first, sharing);
            let drawn = factors.draw(2.0, Device::Cpu).unwrap();
            assert_eq!(drawn.size(), expected);
            assert_eq!(drawn, factors.draw(2.0, Device::Cpu).unwrap());
            let kept = drawn.eq(2.0).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(kept + drawn.eq(0.0).sum(Kind::Int64).int64_value(&[]), drawn.numel() as i64);
            let (share, count) = (kept as f64 / drawn.numel() as f64, drawn.numel() as f64);
            assert!((share - 0.7).abs() < 5.0 * (0.3 * 0.7 / count).sqrt(), "{share}");
        }
    }

    /// Matrices longer than the part of a thread, and of odd widths.
    #[test]
    fn the_cpu_mixes_as_libtorch_does() {
        let mut masks = Vec::new();
        for shape in [[3, 20_001, 1], [20_001, 3, 1], [300, 70, 1], [77, 81, 5], [1, 5, 1], [5, 1, 1]] {
            for (input_first, sharing) in CASES {
                masks.push((shape, MixingMask::Drawn(factors(&shape, input_first, sharing))));
            }
            let members = Tensor::rand(shape, (Kind::Float, Device::Cpu)).gt(0.5);
            masks.push((shape, MixingMask::Members(members)));
        }
        for (shape, mask) in masks {
            for kind in [Kind::Float, Kind::BFloat16] {
                let weight = Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let target = Tensor::randn(shape, (Kind::Float, Device::Cpu));
                let gradient = Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind);
                let factors = mask.draw(1.0 / 0.7, Device::Cpu).unwrap();
                let expected = mixed_on_device(&weight, &target, &factors).unwrap();
                let leaf = weight.copy().set_requires_grad(true);
                let again = match &mask {
                    MixingMask::Drawn(own) => MixingMask::Drawn(Factors { shape: own.shape.clone(), ..*own }),
                    MixingMask::Members(members) => MixingMask::Members(members.shallow_clone()),
                };
                let found = mixed(&leaf, &target.view([-1]), 1.0 / 0.7, 2.0, again).unwrap();
                // To a unit in the last place: not every build of libtorch rounds product and sum as one.
                let unit = if kind == Kind::Float { 2f64.powi(-23) } else { 2f64.powi(-8) };
                assert!(found.allclose(&expected, unit, unit, false), "{shape:?} {kind:?}");
                (&found * &gradient).sum(kind).backward();
                let factors = mask.draw(2.0, Device::Cpu).unwrap();
                assert!(leaf.grad().equal(&(&gradient * factors).to_kind(kind)), "{shape:?} {kind:?}");
            }
        }
    }
}
