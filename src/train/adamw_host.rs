//! AdamW on the CPU: one pass over weights, gradients and moments, with moments for what trains only.
//!
//! The pass reads each gradient once, scales it by the clip factor, and updates moments and weight. With a fixed child
//! network its moments stand side by side, nothing is kept for the others, and the members' weights and gradients are
//! gathered for the update and put back. Nothing is kept of idle weights either, which decay at most. The arithmetic of an
//! element is the same in all cases, to the bit.

use std::ops::Range;
use std::sync::Arc;

use multiversion::multiversion;
use rayon::prelude::*;

use crate::child::{CHUNK, ChildNetwork};
use crate::libtorch::AdamWConstants;
use crate::model::{Parameter, Treatment, busy};
use crate::random::GROUP;

/// The constants of one step.
#[derive(Clone, Copy, Debug)]
pub struct StepConstants {
    /// Number of the step, from 1.
    pub step: u64,
    /// η, the learning rate of the step.
    pub learning_rate: f64,
    /// Decay rates of the moments.
    pub betas: (f64, f64),
    /// Added to the bias-corrected root of the second moment.
    pub epsilon: f64,
    /// What weight decay leaves of a weight before the update.
    pub decay_before: f64,
    /// What weight decay leaves of a weight after the update.
    pub decay_after: f64,
}

/// The moments of the weights that train.
pub struct HostMoments {
    pieces: Vec<Piece>,
    first: Vec<f32>,
    second: Vec<f32>,
    child: Option<Arc<ChildNetwork>>,
    /// Whether weights outside the child network decay too.
    decays_outside: bool,
}

/// A part of one parameter, a multiple of [`GROUP`] from the start of the flat buffer.
#[derive(Clone, Debug)]
struct Piece {
    range: Range<usize>,
    treatment: Treatment,
    /// What of the range is not idle, from its start on, in multiples of [`GROUP`].
    busy: Vec<Range<usize>>,
    /// Number of weights that have moments.
    members: usize,
}

/// The slices of one piece.
struct Work<'a> {
    piece: &'a Piece,
    values: &'a mut [f32],
    gradients: &'a [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

impl HostMoments {
    /// Makes zero moments for parameters, given in the order of the flat buffer with their treatment; with a child network only
    /// for its members. None are made for `idle` weights, in order and in multiples of [`GROUP`], whose gradients are always zero:
    /// they decay at most.
    pub fn new<'a>(
        parameters: impl Iterator<Item = (&'a Parameter, Treatment)>,
        idle: &[Range<usize>],
        child: Option<Arc<ChildNetwork>>,
        decays_outside: bool,
    ) -> Self {
        let mut pieces = Vec::new();
        for (parameter, treatment) in parameters {
            for start in parameter.range.clone().step_by(CHUNK) {
                let range = start..parameter.range.end.min(start + CHUNK);
                let busy = busy(&range, idle);
                let members = |part: &Range<usize>| match &child {
                    Some(child) => count(words(child, start + part.start), part.len()),
                    None => part.len(),
                };
                let members = busy.iter().map(members).sum();
                pieces.push(Piece { range, treatment, busy, members });
            }
        }
        let total = pieces.iter().map(|piece| piece.members).sum();
        Self { pieces, first: vec![0.0; total], second: vec![0.0; total], child, decays_outside }
    }

    /// Returns the bytes of the moments.
    pub fn bytes(&self) -> usize {
        (self.first.len() + self.second.len()) * size_of::<f32>()
    }

    /// Updates the weights `values` with their gradients times `factor`, both the part of the flat buffer that begins at
    /// `start`; whole parameters only. `constants` are those of a treatment.
    pub fn apply(
        &mut self,
        values: &mut [f32],
        gradients: &[f32],
        start: usize,
        factor: f32,
        constants: impl Fn(Treatment) -> StepConstants + Sync,
    ) {
        let child = self.child.as_deref();
        let decays_outside = self.decays_outside;
        let before = self.pieces.partition_point(|piece| piece.range.start < start);
        let skipped: usize = self.pieces[..before].iter().map(|piece| piece.members).sum();
        let (mut values, mut place) = (values, start);
        let (mut first, mut second) = (&mut self.first[skipped..], &mut self.second[skipped..]);
        let end = start + gradients.len();
        let mut work = Vec::new();
        for piece in self.pieces[before..].iter().take_while(|piece| piece.range.end <= end) {
            let (_, rest) = std::mem::take(&mut values).split_at_mut(piece.range.start - place);
            let (own, rest) = rest.split_at_mut(piece.range.len());
            let (own_first, rest_first) = std::mem::take(&mut first).split_at_mut(piece.members);
            let (own_second, rest_second) = std::mem::take(&mut second).split_at_mut(piece.members);
            (values, first, second) = (rest, rest_first, rest_second);
            place = piece.range.end;
            let gradients = &gradients[piece.range.start - start..piece.range.end - start];
            work.push(Work { piece, values: own, gradients, first: own_first, second: own_second });
        }
        work.into_par_iter().for_each_init(Default::default, |gathered, work| {
            let constants = element_constants(&constants(work.piece.treatment));
            match child.filter(|_| work.piece.members < work.values.len()) {
                Some(child) => update_members(work, child, decays_outside, factor, &constants, gathered),
                None => update_busy(work, factor, &constants),
            }
        });
    }
}

/// Rounds the constants of a step to those that the update of an element uses, on any device.
pub(super) fn element_constants(constants: &StepConstants) -> AdamWConstants {
    let (beta1, beta2) = constants.betas;
    let correction = |beta: f64| 1.0 - beta.powi(constants.step as i32);
    AdamWConstants {
        decay_before: constants.decay_before as f32,
        decay_after: constants.decay_after as f32,
        one_minus_beta1: (1.0 - beta1) as f32,
        beta2: beta2 as f32,
        one_minus_beta2: (1.0 - beta2) as f32,
        root_of_correction: correction(beta2).sqrt() as f32,
        step_size: (constants.learning_rate / correction(beta1)) as f32,
        epsilon: constants.epsilon as f32,
    }
}

/// The update of `torch.optim.AdamW`, element by element.
#[multiversion(targets = "simd")]
fn update(
    values: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    factor: f32,
    constants: &AdamWConstants,
) {
    let constants = *constants;
    for (((value, &gradient), first), second) in values.iter_mut().zip(gradients).zip(first).zip(second) {
        let gradient = gradient * factor;
        *first += constants.one_minus_beta1 * (gradient - *first);
        *second = *second * constants.beta2 + constants.one_minus_beta2 * gradient * gradient;
        let root = second.sqrt() / constants.root_of_correction + constants.epsilon;
        let moved = *value * constants.decay_before - constants.step_size * (*first / root);
        *value = moved * constants.decay_after;
    }
}

/// Updates the weights of one piece that are not idle; the others decay.
fn update_busy(work: Work, factor: f32, constants: &AdamWConstants) {
    let Work { piece, values, gradients, mut first, mut second } = work;
    let mut decayed = 0;
    for part in &piece.busy {
        decay(&mut values[decayed..part.start], constants);
        let (own_first, own_second);
        (own_first, first) = first.split_at_mut(part.len());
        (own_second, second) = second.split_at_mut(part.len());
        let own = part.clone();
        update(&mut values[own.clone()], &gradients[own], own_first, own_second, factor, constants);
        decayed = part.end;
    }
    decay(&mut values[decayed..], constants);
}

/// The update of weights whose gradients and moments are zero.
fn decay(values: &mut [f32], constants: &AdamWConstants) {
    scale(values, constants.decay_before);
    scale(values, constants.decay_after);
}

/// Updates the members of a child network in one piece.
fn update_members(
    work: Work,
    child: &ChildNetwork,
    decays_outside: bool,
    factor: f32,
    constants: &AdamWConstants,
    [values, gradients]: &mut [Vec<f32>; 2],
) {
    let Work { piece, values: all, gradients: all_gradients, first, second } = work;
    let mut inner = *constants;
    if decays_outside {
        // The members decay with the others, in the same place of the arithmetic.
        scale(all, constants.decay_before);
        (inner.decay_before, inner.decay_after) = (1.0, 1.0);
    }
    let each_of = |part: Range<usize>, call: &mut dyn FnMut(usize)| {
        let words = words(child, piece.range.start + part.start);
        for_each_member(words, part.len(), |place| call(part.start + place));
    };
    values.clear();
    gradients.clear();
    let busy = || piece.busy.iter().cloned();
    busy().for_each(|part| {
        each_of(part, &mut |place| {
            values.push(all[place]);
            gradients.push(all_gradients[place]);
        })
    });
    update(values, gradients, first, second, factor, &inner);
    let mut updated = values.iter();
    busy().for_each(|part| {
        each_of(part, &mut |place| {
            if let Some(&value) = updated.next() {
                all[place] = value;
            }
        })
    });
    if decays_outside {
        scale(all, constants.decay_after);
    } else if constants.decay_before != 1.0 || constants.decay_after != 1.0 {
        let ends = std::iter::once(0).chain(busy().map(|part| part.end));
        let starts = busy().map(|part| part.start).chain([all.len()]);
        for (start, end) in ends.zip(starts) {
            each_of(start..end, &mut |place| decay(&mut all[place..=place], constants));
        }
    }
}

fn scale(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

/// The bits from a multiple of [`GROUP`] on.
fn words(child: &ChildNetwork, start: usize) -> &[u64] {
    &child.words()[start / GROUP..]
}

fn for_each_member(words: &[u64], count: usize, mut call: impl FnMut(usize)) {
    for (index, &word) in words[..count.div_ceil(GROUP)].iter().enumerate() {
        // Bits behind the end of a parameter belong to the gap.
        let used = (count - index * GROUP).min(GROUP);
        let mut rest = word & (u64::MAX >> (GROUP - used));
        while rest != 0 {
            call(index * GROUP + rest.trailing_zeros() as usize);
            rest &= rest - 1;
        }
    }
}

fn count(words: &[u64], count: usize) -> usize {
    let mut members = 0;
    for_each_member(words, count, |_| members += 1);
    members
}

#[cfg(test)]
pub(super) mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::child::{Cut, MaskScope, Threshold, mask_in_place, random_scores};
    use crate::libtorch::{elements, elements_mut};
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable, Parameters};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("wide", &[130, 300], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("bias", &[130], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[3, 70], ParameterKind::Weight, ParameterPlace::Head);
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        let random = Tensor::randn([parameters.buffer_len() as i64], (Kind::Float, Device::Cpu));
        parameters.values_to_change().copy_(&random);
        parameters
    }

    fn in_order(parameters: &Parameters) -> Vec<(&Parameter, Treatment)> {
        let mut list: Vec<_> =
            parameters.iter().map(|(_, parameter)| (parameter, Treatment::plain(parameter))).collect();
        list.sort_by_key(|(parameter, _)| parameter.range.start);
        list
    }

    fn child(parameters: &Parameters, p: f64) -> Arc<ChildNetwork> {
        let cut = Cut::highest(p, MaskScope::Backbone, Threshold::Global);
        let scores = random_scores(parameters.buffer_len(), 5);
        Arc::new(ChildNetwork::from_scores(parameters, &scores, &cut).unwrap())
    }

    /// Those of a step; decay comes before or `after` the update.
    pub fn constants(step: u64, decay: f64, after: bool) -> impl Fn(Treatment) -> StepConstants {
        move |treatment| {
            let decays = [if treatment.decays { decay } else { 1.0 }, 1.0];
            StepConstants {
                step,
                learning_rate: 0.01,
                betas: (0.9, 0.999),
                epsilon: 1e-8,
                decay_before: decays[usize::from(after)],
                decay_after: decays[usize::from(!after)],
            }
        }
    }

    /// Gradients of one step, masked.
    fn gradients(parameters: &Parameters, step: u64, child: &ChildNetwork) -> Vec<f32> {
        let key = crate::random::Key::derive(step, crate::random::Purpose::Initialisation, 0);
        let mut gradients = vec![0f32; parameters.buffer_len()];
        crate::random::fill_normal(&mut gradients, 1.0, key, 0);
        mask_in_place(&mut gradients, child.on_cpu(), 0);
        gradients
    }

    fn train(
        parameters: &Parameters,
        mut moments: HostMoments,
        child: &ChildNetwork,
        decay: f64,
        after: bool,
    ) -> (Vec<u32>, usize) {
        for step in 1..=10 {
            let gradients = gradients(parameters, step, child);
            let mut values = parameters.values_to_change();
            let values: &mut [f32] = elements_mut(&mut values).unwrap();
            moments.apply(values, &gradients, 0, 0.7, constants(step, decay, after));
        }
        let values: &[f32] = elements(parameters.values()).unwrap();
        (values.iter().map(|value| value.to_bits()).collect(), moments.bytes())
    }

    #[test]
    fn moments_of_the_members_alone_give_the_same_bits() {
        for (p, after) in [(0.1, false), (0.3, true), (0.9, false)] {
            let start = parameters();
            let child = child(&start, p);
            let run = |compact: bool| {
                let parameters = parameters();
                parameters.values_to_change().copy_(start.values());
                let own = compact.then(|| child.clone());
                let moments = HostMoments::new(in_order(&parameters).into_iter(), &[], own, true);
                train(&parameters, moments, &child, 0.999, after)
            };
            let ((compact, compact_bytes), (dense, dense_bytes)) = (run(true), run(false));
            assert!(compact == dense, "p = {p}");
            let outside = child.maskable() - child.kept();
            assert_eq!(dense_bytes - compact_bytes, 8 * outside);
        }
    }

    #[test]
    fn idle_weights_need_no_moments_and_decay_as_ever() {
        // Of `wide`: across the end of a piece, and of its second piece.
        let idle_ranges = || [64..CHUNK + 64, CHUNK + 128..CHUNK + 128 + 6400];
        let idle = idle_ranges();
        let count: usize = idle.iter().map(Range::len).sum();
        let start = parameters();
        let members = child(&start, 0.3);
        for (child, decays_outside) in [(None, true), (Some(&members), true), (Some(&members), false)] {
            for (decay, after) in [(0.999, false), (0.999, true), (1.0, false)] {
                let run = |idle: &[Range<usize>]| {
                    let parameters = parameters();
                    parameters.values_to_change().copy_(start.values());
                    let list = in_order(&parameters).into_iter();
                    let mut moments = HostMoments::new(list, idle, child.cloned(), decays_outside);
                    for step in 1..=5 {
                        let mut gradients = gradients(&parameters, step, &members);
                        idle_ranges().into_iter().for_each(|idle| gradients[idle].fill(0.0));
                        let mut values = parameters.values_to_change();
                        let values: &mut [f32] = elements_mut(&mut values).unwrap();
                        moments.apply(values, &gradients, 0, 0.7, constants(step, decay, after));
                    }
                    let values: &[f32] = elements(parameters.values()).unwrap();
                    (values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), moments.bytes())
                };
                let ((compact, compact_bytes), (dense, dense_bytes)) = (run(&idle), run(&[]));
                assert!(compact == dense, "{decays_outside} {decay} {after}");
                let saved = match child {
                    None => count,
                    Some(child) => {
                        idle.iter().map(|idle| super::count(words(child, idle.start), idle.len())).sum()
                    }
                };
                assert_eq!(dense_bytes - compact_bytes, 8 * saved);
            }
        }
    }

    #[test]
    fn decay_can_be_kept_to_the_members() {
        let parameters = parameters();
        let before = parameters.values_copy().unwrap();
        let child = child(&parameters, 0.3);
        let moments = HostMoments::new(in_order(&parameters).into_iter(), &[], Some(child.clone()), false);
        train(&parameters, moments, &child, 0.9, false);
        let (old, new): (&[f32], &[f32]) =
            (elements(&before).unwrap(), elements(parameters.values()).unwrap());
        for tensor in child.tensors() {
            for (place, bit) in (tensor.start..).zip(child.bits(tensor)) {
                assert_eq!(old[place] != new[place], bit, "{place}");
            }
        }
    }

    #[test]
    fn parameters_one_by_one_are_all_at_once() {
        let start = parameters();
        let child = child(&start, 0.3);
        let values = |apart: bool| {
            let parameters = parameters();
            parameters.values_to_change().copy_(start.values());
            let list = in_order(&parameters);
            let mut moments = HostMoments::new(list.iter().copied(), &[], Some(child.clone()), true);
            for step in 1..=3 {
                let gradients = gradients(&parameters, step, &child);
                let mut values = parameters.values_to_change();
                let values: &mut [f32] = elements_mut(&mut values).unwrap();
                if !apart {
                    moments.apply(values, &gradients, 0, 1.0, constants(step, 0.99, false));
                    continue;
                }
                for (parameter, _) in list.iter().rev() {
                    let range = parameter.range.clone();
                    let part = &mut values[range.clone()];
                    moments.apply(
                        part,
                        &gradients[range.clone()],
                        range.start,
                        1.0,
                        constants(step, 0.99, false),
                    );
                }
            }
            parameters.values_copy().unwrap()
        };
        assert_eq!(values(true), values(false));
    }
}
