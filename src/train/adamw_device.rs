//! AdamW on a GPU: the arithmetic of the CPU's in a kernel of our own, which reads gradients through the mask, with moments for
//! what trains only.

use std::ops::Range;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::adamw_host::{StepConstants, element_constants};
use crate::child::GradientMask;
use crate::error::Result;
use crate::libtorch::{Chosen, RandomMask, Stretch, sums_of_squares, update};
use crate::model::{HalfCopy, Parameter, ParameterKind, Parameters, TrainableGroup, Treatment, busy, span};
use crate::random::GROUP;

/// The moments of the weights that train, on a device.
pub struct DeviceMoments {
    pieces: Vec<Piece>,
    /// The mask, where it is a random one or one of members.
    mask: Option<Arc<GradientMask>>,
    /// Whether weights outside a fixed child network decay.
    decays_outside: bool,
    /// Whether updates keep the weights in bfloat16 up to date.
    keeps_copy: bool,
    /// The factor on gradients of a step without clipping.
    one: Tensor,
}

/// Weights side by side that are treated alike.
struct Piece {
    range: Range<usize>,
    treatment: Treatment,
    /// What has moments: a fixed child network's members, or without one the groups that are not idle; `None` where all are.
    chosen: Option<Chosen>,
    /// Whether the random mask reaches them.
    is_masked: bool,
    /// The same weights in bfloat16, where passes compute with them.
    half: Option<Tensor>,
    first_moments: Tensor,
    second_moments: Tensor,
}

impl Piece {
    fn stretch(&self, mask: Option<RandomMask>) -> Stretch<'_> {
        Stretch {
            first_group: self.range.start / GROUP,
            chosen: self.chosen.as_ref(),
            mask: mask.filter(|_| self.is_masked),
        }
    }
}

impl DeviceMoments {
    /// Makes zero moments for groups of weights of `parameters`, on their device; with a fixed child network only for its members.
    /// Without one, none are made for `idle` weights, in order and in multiples of [`GROUP`], whose gradients are always zero.
    /// `copy` is that of the weights in bfloat16, if updates are to keep it up to date.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(
        groups: &[TrainableGroup],
        idle: &[Range<usize>],
        parameters: &Parameters,
        mask: Option<&Arc<GradientMask>>,
        decays_outside: bool,
        copy: Option<&HalfCopy>,
    ) -> Result<Self> {
        let device = parameters.device();
        let mask = mask.filter(|mask| mask.restriction().is_some() || mask.as_random().is_some()).cloned();
        let child = mask.as_ref().and_then(|mask| mask.restriction());
        let random = mask.as_ref().filter(|mask| mask.as_random().is_some());
        // Weights outside a child network that decay change, too.
        let copy = copy.filter(|_| child.is_none() || !decays_outside);
        let reaches = |parameter: &Parameter| random.is_some_and(|mask| mask.scope().covers(parameter));
        let half_of = |range: &Range<usize>| match copy {
            Some(copy) => copy.part(range),
            None => Ok(None),
        };
        let mut list: Vec<&Parameter> = parameters.iter().map(|(_, parameter)| parameter).collect();
        list.sort_by_key(|parameter| parameter.range.start);
        let mut pieces = Vec::new();
        for group in groups {
            let kind = |parameter: &Parameter| {
                let is_table = parameter.kind == ParameterKind::Embedding;
                Ok((reaches(parameter), half_of(&parameter.range)?.is_some(), is_table))
            };
            for (range, (is_masked, ..)) in cut(&group.range, &list, kind)? {
                let half = half_of(&range)?;
                let chosen = match child {
                    Some(child) => Some(Chosen::Members(child.members_on_device(range.clone(), device)?)),
                    None => busy_groups(&range, idle, device)?.map(Chosen::Groups),
                };
                let count = chosen.as_ref().map_or(range.len(), Chosen::count) as i64;
                let zeros = || Tensor::f_zeros([count], (Kind::Float, device));
                let (first_moments, second_moments) = (zeros()?, zeros()?);
                let treatment = group.treatment;
                pieces.push(Piece {
                    range,
                    treatment,
                    chosen,
                    is_masked,
                    half,
                    first_moments,
                    second_moments,
                });
            }
        }
        let keeps_copy = copy.is_some();
        Ok(Self {
            pieces,
            mask,
            decays_outside,
            keeps_copy,
            one: Tensor::f_ones([1], (Kind::Float, device))?,
        })
    }

    /// Returns whether updates read gradients through the mask, so that nobody else has to mask them.
    pub fn masks(&self) -> bool {
        self.mask.is_some()
    }

    /// Returns whether updates keep the weights in bfloat16 up to date.
    pub fn keeps_copy(&self) -> bool {
        self.keeps_copy
    }

    /// Returns sums that add up to that of the squares of all masked gradients, from the whole flat buffer.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn squares(&self, gradients: &Tensor) -> Result<Vec<Tensor>> {
        let squares =
            |piece: &Piece| sums_of_squares(piece.stretch(self.random()), &span(gradients, &piece.range)?);
        self.pieces.iter().map(squares).collect()
    }

    /// Returns the bytes of moments, and of the places of what has some.
    pub fn bytes(&self) -> usize {
        let bytes = |piece: &Piece| {
            let places = piece.chosen.as_ref().map_or(0, |chosen| chosen.places().numel() * size_of::<i32>());
            2 * piece.first_moments.numel() * size_of::<f32>() + places
        };
        self.pieces.iter().map(bytes).sum()
    }

    /// Updates whole pieces of weights, from the one that begins at `start` of the flat buffer, where `values` and `gradients`
    /// begin, too. Gradients are multiplied by the mask and by `factor`. `constants` are those of a treatment.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn apply(
        &mut self,
        values: &Tensor,
        gradients: &Tensor,
        start: usize,
        factor: Option<&Tensor>,
        constants: impl Fn(Treatment) -> StepConstants,
    ) -> Result<()> {
        let end = start + gradients.numel();
        let own = |piece: &&Piece| piece.range.start >= start && piece.range.end <= end;
        for piece in self.pieces.iter().filter(own) {
            let mut inner = element_constants(&constants(piece.treatment));
            let part = |flat: &Tensor| {
                flat.f_narrow(0, (piece.range.start - start) as i64, piece.range.len() as i64)
            };
            let (mut values, gradients) = (part(values)?, part(gradients)?);
            let decay_after = inner.decay_after;
            let outside = match &piece.chosen {
                Some(Chosen::Groups(_)) => true,
                Some(Chosen::Members(_)) => self.decays_outside,
                None => false,
            };
            if outside {
                // What has moments decays with the rest, in the same place of the arithmetic.
                scale(&mut values, inner.decay_before)?;
                (inner.decay_before, inner.decay_after) = (1.0, 1.0);
            }
            let moments = [&piece.first_moments, &piece.second_moments];
            let factor = factor.unwrap_or(&self.one);
            let half = piece.half.as_ref();
            update(piece.stretch(self.random()), inner, factor, &gradients, &values, moments, half)?;
            if outside {
                scale(&mut values, decay_after)?;
            }
        }
        Ok(())
    }

    /// Returns the random mask of the current step, if there is one.
    fn random(&self) -> Option<RandomMask> {
        self.mask.as_ref().and_then(|mask| mask.as_random())
    }
}

/// Returns the groups of a range that are not idle, int32, unless none is.
fn busy_groups(range: &Range<usize>, idle: &[Range<usize>], device: Device) -> Result<Option<Tensor>> {
    let busy = busy(range, idle);
    if busy.first() == Some(&(0..range.len())) {
        return Ok(None);
    }
    let groups = busy.iter().flat_map(|part| part.start / GROUP..part.end.div_ceil(GROUP));
    let groups: Vec<i32> = groups.map(|group| group as i32).collect();
    Ok(Some(Tensor::from_slice(&groups).f_to_device(device)?))
}

/// Cuts a range, in which parameters stand in order, into pieces of parameters of one kind.
fn cut<K: PartialEq + Copy>(
    range: &Range<usize>,
    parameters: &[&Parameter],
    kind: impl Fn(&Parameter) -> Result<K>,
) -> Result<Vec<(Range<usize>, K)>> {
    let mut pieces: Vec<(Range<usize>, K)> = Vec::new();
    for parameter in parameters.iter().filter(|parameter| range.contains(&parameter.range.start)) {
        let (start, kind) = (parameter.range.start, kind(parameter)?);
        match pieces.last_mut() {
            Some((piece, last)) if *last == kind => piece.end = range.end,
            before => {
                before.into_iter().for_each(|(piece, _)| piece.end = start);
                pieces.push((start..range.end, kind));
            }
        }
    }
    Ok(pieces)
}

fn scale(values: &mut Tensor, factor: f32) -> Result<()> {
    if factor != 1.0 {
        let _ = values.f_mul_scalar_(f64::from(factor))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::adamw_host::HostMoments;
    use super::super::adamw_host::tests::constants;
    use super::*;
    use crate::child::{BernoulliMask, CHUNK, Cut, MaskScope, Threshold, mask_in_place, random_scores};
    use crate::libtorch::{elements, elements_mut};
    use crate::model::{ParameterPlace, ParameterTable};
    use crate::random::{Key, Purpose, fill_normal};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("table", &[40, 70], ParameterKind::Embedding, ParameterPlace::Embeddings);
        table.declare("wide", &[130, 300], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("bias", &[130], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[3, 70], ParameterKind::Weight, ParameterPlace::Head);
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        for (id, parameter) in parameters.iter() {
            let part = parameters.part(&parameters.values_to_change(), id).unwrap();
            part.shallow_clone().copy_(&Tensor::from_slice(&normal(parameter.count(), id.index() as u64)));
        }
        parameters
    }

    fn normal(count: usize, index: u64) -> Vec<f32> {
        let mut numbers = vec![0f32; count];
        fill_normal(&mut numbers, 1.0, Key::derive(7, Purpose::Initialisation, index), 0);
        numbers
    }

    fn masks(parameters: &Parameters) -> Vec<Option<Arc<GradientMask>>> {
        let random = |scope| GradientMask::Bernoulli(BernoulliMask::new(scope, 0.3, true, 5));
        let cut = Cut::highest(0.3, MaskScope::Backbone, Threshold::Global);
        let scores = random_scores(parameters.buffer_len(), 5);
        let child = Arc::new(crate::child::ChildNetwork::from_scores(parameters, &scores, &cut).unwrap());
        let masks = [random(MaskScope::All), random(MaskScope::EncoderLayers), GradientMask::Fixed(child)];
        std::iter::once(None).chain(masks.map(|mask| Some(Arc::new(mask)))).collect()
    }

    /// The kernels, run on the CPU's tensors, against the CPU's own way: masked gradients, then moments of all or of members.
    #[test]
    fn every_bit_is_as_on_the_cpu() {
        let count = masks(&parameters()).len();
        let cases = (0..count).flat_map(|number| [(number, true, false), (number, false, true)]);
        let cases = cases.flat_map(|case| [(case, &[][..]), (case, &[0, 3, 4, 21, 39][..])]);
        for ((number, decays_outside, decays_after), words) in cases {
            let (host, device, released) = (parameters(), parameters(), parameters());
            let mask = masks(&host).swap_remove(number);
            let treated = host.iter().map(|(_, parameter)| (parameter, Treatment::plain(parameter)));
            let mut list: Vec<_> = treated.collect();
            list.sort_by_key(|(parameter, _)| parameter.range.start);
            let child = mask.as_ref().and_then(|mask| mask.restriction()).cloned();
            let mut trainable = host.trainable(|_| true);
            if !words.is_empty() {
                trainable.note_rows(host.get(host.find("table").unwrap()), words);
                assert_eq!(trainable.idle.len(), 3);
            }
            let idle = trainable.idle.clone();
            let mut on_host = HostMoments::new(list.iter().copied(), &idle, child, decays_outside);
            let one_by_one = trainable.one_by_one(host.iter().map(|(_, parameter)| parameter));
            let moments = |groups, idle: &[Range<usize>]| {
                let copy = device.half_copy();
                DeviceMoments::new(groups, idle, &device, mask.as_ref(), decays_outside, copy).unwrap()
            };
            let mut apart = moments(&one_by_one, &idle);
            // From here on there is a copy of the weights.
            device.compute_weights(Kind::BFloat16).unwrap();
            let mut at_once = moments(&trainable.groups, &idle);
            assert_eq!(at_once.keeps_copy(), number < count - 1 || !decays_outside);
            assert_eq!((at_once.masks(), apart.masks()), (mask.is_some(), mask.is_some()));
            let dense = moments(&trainable.groups, &[]).bytes();
            assert_eq!(at_once.bytes() < dense, !idle.is_empty() && number < count - 1);
            for step in 1..=4 {
                if let Some(mask) = &mask {
                    mask.begin_step(step).unwrap();
                }
                let whole = device.gradients().unwrap().shallow_clone();
                whole.shallow_clone().copy_(&Tensor::from_slice(&normal(host.buffer_len(), step)));
                idle.iter().for_each(|idle| drop(span(&whole, idle).unwrap().zero_()));
                host.gradients().unwrap().shallow_clone().copy_(&whole);
                if let Some(mask) = &mask {
                    mask.apply_to_all(&host).unwrap();
                }
                let masked: &[f32] = elements(host.gradients().unwrap()).unwrap();
                // Gaps hold zeros in a run; here they hold what no gradient is.
                let exact: f64 = (list.iter().flat_map(|(parameter, _)| &masked[parameter.range.clone()]))
                    .map(|&value| f64::from(value).powi(2))
                    .sum();
                let squares = Tensor::cat(&apart.squares(&whole).unwrap(), 0).sum(Kind::Double);
                let found = f64::try_from(squares).unwrap();
                assert!((found / exact - 1.0).abs() < 1e-12, "{found} {exact}");

                let mut values = host.values_to_change();
                let values: &mut [f32] = elements_mut(&mut values).unwrap();
                on_host.apply(values, masked, 0, 0.7, constants(step, 0.99, decays_after));
                let factor = Tensor::from_slice(&[0.7f32]);
                let own = device.values_to_change();
                at_once.apply(&own, &whole, 0, Some(&factor), constants(step, 0.99, decays_after)).unwrap();
                // As gradients come that are released: parameter by parameter, the last first.
                for (_, parameter) in released.iter().collect::<Vec<_>>().into_iter().rev() {
                    let part = |flat: &Tensor| span(flat, &parameter.range).unwrap();
                    let (values, gradients) = (part(&released.values_to_change()), part(&whole));
                    let (start, constants) = (parameter.range.start, constants(step, 0.99, decays_after));
                    apart.apply(&values, &gradients, start, Some(&factor), constants).unwrap();
                }
            }
            for (id, parameter) in host.iter() {
                let part = |of: &Parameters| of.part(of.values(), id).unwrap();
                if at_once.keeps_copy() {
                    device.half_copy().unwrap().mark_fresh();
                }
                let half = &device.compute_weights(Kind::BFloat16).unwrap()[id.index()];
                let rounded = host.leaf(id).to_kind(half.kind());
                assert_eq!(half, &rounded, "{} with mask {number}", parameter.name);
                for found in [&device, &released] {
                    assert_eq!(part(found), part(&host), "{} with mask {number}", parameter.name);
                }
            }
        }
    }

    #[test]
    fn stretches_longer_than_all_threads_take_at_a_time_are_whole() {
        const COUNT: usize = 4 * 2048 * 256 + 5 * CHUNK + 37;
        let mask = BernoulliMask::new(MaskScope::All, 0.3, true, 5);
        mask.begin_step(3);
        let mut expected = vec![1f32; COUNT];
        mask_in_place(&mut expected, mask.on_cpu(), 11);
        let found = Tensor::ones([COUNT as i64], (Kind::Float, Device::Cpu));
        let stretch = Stretch { first_group: 11, chosen: None, mask: Some(mask.for_kernels()) };
        crate::libtorch::mask_in_place(stretch, &found).unwrap();
        assert!(elements::<f32>(&found).unwrap() == expected);
    }
}
