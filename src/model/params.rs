//! The parameters of a model in one flat buffer.
//!
//! Values and gradients of all parameters are two contiguous float32 tensors; each parameter is a range of both. So the
//! optimizer is one pass, a norm is one reduction, and a model is reset for the next seed by one copy. Ranges start at
//! multiples of [`ALIGNMENT`]; the gaps between them hold zeros and stay zero.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::fresh_weights::FreshWeights;
use super::half_copy::HalfCopy;
use super::parameter::{Parameter, ParameterKind, ParameterPlace, layers_of};
use super::trainable::{Trainable, TrainableGroup, Treatment};
use crate::error::{Error, Result};
use crate::libtorch::use_device;
use crate::random::{self, Key, Purpose};

/// Ranges start at multiples of this many elements: a cache line, and one group of random numbers.
pub const ALIGNMENT: usize = random::GROUP;

/// Names one parameter of a model; valid for the table that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParameterId(usize);

impl ParameterId {
    /// Returns the parameter's number in the order of declaration.
    pub fn index(self) -> usize {
        self.0
    }
}

/// The parameters that a model declares, in the order of declaration.
#[derive(Clone, Debug, Default)]
pub struct ParameterTable {
    parameters: Vec<Parameter>,
}

impl ParameterTable {
    /// Declares a parameter and returns its name tag.
    pub fn declare(
        &mut self,
        name: impl Into<String>,
        shape: &[i64],
        kind: ParameterKind,
        place: ParameterPlace,
    ) -> ParameterId {
        let count = shape.iter().product::<i64>() as usize;
        self.parameters.push(Parameter {
            name: name.into(),
            shape: shape.to_vec(),
            kind,
            place,
            range: 0..count,
            fresh: FreshWeights::default(),
            input_first: false,
        });
        ParameterId(self.parameters.len() - 1)
    }

    /// Says where new weights of a parameter come from, if not from [`FreshWeights::Normal`].
    pub fn start_from(&mut self, id: ParameterId, fresh: FreshWeights) {
        self.parameters[id.0].fresh = fresh;
    }

    /// Says that a matrix is stored with its inputs first.
    pub fn store_input_first(&mut self, id: ParameterId) {
        self.parameters[id.0].input_first = true;
    }

    /// Counts the chosen parameters as parts of the head; returns whether there are any.
    pub fn count_as_head(&mut self, chosen: impl Fn(&Parameter) -> bool) -> bool {
        let mut any = false;
        for parameter in self.parameters.iter_mut().filter(|parameter| chosen(parameter)) {
            parameter.place = ParameterPlace::Head;
            any = true;
        }
        any
    }

    /// Iterates over the parameters in the order of declaration.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.parameters.iter()
    }

    /// Returns the parameters in the order of declaration.
    pub fn as_slice(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Gives every parameter its range: those with weight decay first, so that each group is contiguous. Returns the
    /// length of the buffer.
    fn place(&mut self) -> usize {
        let mut next = 0;
        for decays in [true, false] {
            for parameter in self.parameters.iter_mut().filter(|parameter| parameter.decays() == decays) {
                let count = parameter.count();
                parameter.range = next..next + count;
                next = (next + count).next_multiple_of(ALIGNMENT);
            }
        }
        next
    }
}

/// The parameters of one model: values, gradients, and the leaves of the autograd graph.
pub struct Parameters {
    parameters: Vec<Parameter>,
    /// How many of them the model declares: others may come behind them, for a time.
    declared: usize,
    by_name: HashMap<String, usize>,
    values: Tensor,
    leaves: Vec<Tensor>,
    /// Made when somebody collects gradients.
    gradients: OnceCell<Tensor>,
    /// Made when a pass first computes in bfloat16.
    half: OnceCell<HalfCopy>,
    /// Whether anybody was given the values to change them since [`Parameters::mark_unchanged`].
    changed: Cell<bool>,
}

impl Parameters {
    /// Allocates zeroed values for the declared parameters, on a device that this thread goes on to compute on.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn allocate(mut table: ParameterTable, device: Device) -> Result<Self> {
        use_device(device)?;
        let total = table.place();
        let values = Tensor::f_zeros([total as i64], (Kind::Float, device))?;
        let declared = table.parameters.len();
        Self::over(values, table.parameters, declared)
    }

    /// Makes parameters of values, with leaves and all else that belongs to them.
    fn over(values: Tensor, parameters: Vec<Parameter>, declared: usize) -> Result<Self> {
        let leaf = |parameter: &Parameter| leaf(&values, parameter.range.start, &parameter.shape);
        let leaves = parameters.iter().map(leaf).collect::<Result<_>>()?;
        let by_name =
            parameters.iter().enumerate().map(|(index, parameter)| (parameter.name.clone(), index)).collect();
        let (gradients, half, changed) = (OnceCell::new(), OnceCell::new(), Cell::new(false));
        Ok(Self { parameters, declared, by_name, values, leaves, gradients, half, changed })
    }

    /// Appends zeroed parameters to those that the model declares, until [`Parameters::shrink`]. All values move: leaves and
    /// buffers of before are no longer those of these parameters.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn extend(&mut self, mut further: ParameterTable) -> Result<()> {
        let own = self.buffer_len();
        let values = resized(&self.values, own + further.place())?;
        for parameter in &mut further.parameters {
            parameter.range = own + parameter.range.start..own + parameter.range.end;
        }
        self.rebuild(values, [self.parameters.clone(), further.parameters].concat())
    }

    /// Removes what [`Parameters::extend`] has appended; all values move again.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn shrink(&mut self) -> Result<()> {
        if self.parameters.len() == self.declared {
            return Ok(());
        }
        let own = self.declared().to_vec();
        let length = own.iter().map(|parameter| parameter.range.end.next_multiple_of(ALIGNMENT)).max();
        self.rebuild(resized(&self.values, length.unwrap_or(0))?, own)
    }

    fn rebuild(&mut self, values: Tensor, parameters: Vec<Parameter>) -> Result<()> {
        let changed = self.changed.clone();
        *self = Self { changed, ..Self::over(values, parameters, self.declared)? };
        Ok(())
    }

    /// Returns the parameters that the model itself declares, in the order of declaration.
    pub fn declared(&self) -> &[Parameter] {
        &self.parameters[..self.declared]
    }

    /// Returns whether the model itself declares a parameter.
    pub fn declares(&self, id: ParameterId) -> bool {
        id.0 < self.declared
    }

    /// Iterates over the parameters with their name tags, in the order of declaration.
    pub fn iter(&self) -> impl Iterator<Item = (ParameterId, &Parameter)> {
        self.parameters.iter().enumerate().map(|(index, parameter)| (ParameterId(index), parameter))
    }

    /// Returns the parameter of a name tag.
    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.parameters[id.0]
    }

    /// Looks a parameter up by its transformers name.
    pub fn find(&self, name: &str) -> Option<ParameterId> {
        self.by_name.get(name).copied().map(ParameterId)
    }

    /// Returns the leaf of a parameter: a view of the values that requires a gradient.
    pub fn leaf(&self, id: ParameterId) -> &Tensor {
        &self.leaves[id.0]
    }

    /// Returns the values of all parameters, `[total]` in float32.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Returns the values of all parameters for changing them in place, `[total]` in float32.
    pub fn values_to_change(&self) -> Tensor {
        self.note_changed();
        self.values.shallow_clone()
    }

    /// Notes that the values have changed: a copy of them in bfloat16 is not used any more, and they count as changed.
    pub fn note_changed(&self) {
        if let Some(half) = self.half.get() {
            half.mark_stale();
        }
        self.changed.set(true);
    }

    /// Notes that the present values count as unchanged ([`Parameters::is_changed`]).
    pub fn mark_unchanged(&mut self) {
        self.changed.set(false);
    }

    /// Returns whether the values may have changed since [`Parameters::mark_unchanged`].
    pub fn is_changed(&self) -> bool {
        self.changed.get()
    }

    /// Returns the buffer for the gradients of all parameters, `[total]` in float32; zeros until gradients are collected.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate it, when it is first asked for.
    pub fn gradients(&self) -> Result<&Tensor> {
        if self.gradients.get().is_none() {
            let _ = self.gradients.set(self.values.f_zeros_like()?);
        }
        self.gradients.get().ok_or_else(|| Error::Libtorch("there is no gradient buffer".into()))
    }

    /// Frees the gradient buffer until it is asked for again.
    pub fn free_gradients(&mut self) {
        self.gradients = OnceCell::new();
    }

    /// Returns a parameter's elements in a flat buffer, `[count]`.
    ///
    /// # Errors
    /// Fails if the buffer is shorter than those of the model.
    pub fn part(&self, flat: &Tensor, id: ParameterId) -> Result<Tensor> {
        span(flat, &self.get(id).range)
    }

    /// Copies the values of all parameters, for [`Parameters::restore`].
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn values_copy(&self) -> Result<Tensor> {
        let mut copy = self.values.f_empty_like()?;
        copy.f_copy_(&self.values)?;
        Ok(copy)
    }

    /// Returns the ranges of the parameters that are chosen, treated as in plain fine-tuning.
    pub fn trainable(&self, chosen: impl Fn(&Parameter) -> bool) -> Trainable {
        self.trainable_as(|parameter| chosen(parameter).then(|| Treatment::plain(parameter)))
    }

    /// Returns the ranges of the parameters that are treated in some way; the others do not train.
    pub fn trainable_as(&self, treatment: impl Fn(&Parameter) -> Option<Treatment>) -> Trainable {
        let mut parameters: Vec<(&Parameter, Treatment)> = (self.parameters.iter())
            .filter_map(|parameter| treatment(parameter).map(|treatment| (parameter, treatment)))
            .collect();
        parameters.sort_by_key(|(parameter, _)| parameter.range.start);
        let count = parameters.iter().map(|(parameter, _)| parameter.count()).sum();
        let (mut groups, mut spans) = (Vec::<TrainableGroup>::new(), Vec::<Range<usize>>::new());
        for (parameter, treatment) in parameters {
            // With the gap behind it, which holds zeros and stays zero.
            let (start, end) = (parameter.range.start, parameter.range.end.next_multiple_of(ALIGNMENT));
            match groups.last_mut() {
                Some(group) if group.range.end == start && group.treatment == treatment => {
                    group.range.end = end;
                }
                _ => groups.push(TrainableGroup { range: start..end, treatment }),
            }
            match spans.last_mut() {
                Some(span) if span.end == start => span.end = end,
                _ => spans.push(start..end),
            }
        }
        Trainable { groups, spans, count, idle: Vec::new() }
    }

    /// Returns the length of the flat buffers, gaps included.
    pub fn buffer_len(&self) -> usize {
        self.values.numel()
    }

    /// Returns the number of encoder layers.
    pub fn layers(&self) -> usize {
        layers_of(&self.parameters)
    }

    /// Returns the number of weights, without the gaps of the buffer.
    pub fn count(&self) -> usize {
        self.parameters.iter().map(Parameter::count).sum()
    }

    /// Returns the device of the buffers.
    pub fn device(&self) -> Device {
        self.values.device()
    }

    /// Returns the weights in the type that passes compute in: leaves of the autograd graph, one a parameter.
    ///
    /// In bfloat16 the encoder's are leaves of a copy that is made anew when the values have changed, so that a step casts
    /// once, whatever the number of its micro-batches. Tables of embeddings stay in float32, since a step needs few of
    /// their rows, and so do pooler and head, where the few products cost nothing.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn compute_weights(&self, kind: Kind) -> Result<Vec<Tensor>> {
        if kind == Kind::Float {
            return Ok(self.leaves.iter().map(Tensor::shallow_clone).collect());
        }
        if self.half.get().is_none() {
            let _ = self.half.set(HalfCopy::new(self, kind)?);
        }
        let half =
            self.half.get().ok_or_else(|| Error::Libtorch("there is no copy of the weights".into()))?;
        half.refreshed(&self.values)
    }

    /// Returns the copy of the weights that passes in bfloat16 compute with, if there have been any.
    pub fn half_copy(&self) -> Option<&HalfCopy> {
        self.half.get()
    }

    /// Copies all values from a buffer of the same layout.
    ///
    /// # Errors
    /// Fails if the lengths differ.
    pub fn restore(&mut self, values: &Tensor) -> Result<()> {
        tch::no_grad(|| self.values_to_change().f_copy_(values))?;
        Ok(())
    }

    /// Overwrites one parameter.
    ///
    /// # Errors
    /// Fails if the shapes differ.
    pub fn set(&mut self, id: ParameterId, values: &Tensor) -> Result<()> {
        let parameter = &self.parameters[id.0];
        if values.size() != parameter.shape {
            return Err(Error::Libtorch(format!(
                "{} has shape {:?}, not {:?}",
                parameter.name,
                parameter.shape,
                values.size()
            )));
        }
        let mut part = self.part(&self.values_to_change(), id)?.f_view(parameter.shape.as_slice())?;
        tch::no_grad(|| part.f_copy_(values))?;
        Ok(())
    }

    /// Gives a parameter the initial values that transformers gives a new one: weights and embeddings as [`FreshWeights`] says,
    /// zero biases, unit normalisation scales. The values depend on the seed and the parameter's name only.
    ///
    /// # Errors
    /// Fails if libtorch refuses.
    pub fn initialise(&mut self, id: ParameterId, seed: u64, initializer_range: f64) -> Result<()> {
        let parameter = &self.parameters[id.0];
        let mut values = Tensor::f_zeros(&parameter.shape, (Kind::Float, Device::Cpu))?;
        match parameter.kind {
            ParameterKind::Weight | ParameterKind::Embedding | ParameterKind::Unused => {
                let stream = parameter
                    .name
                    .bytes()
                    .fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
                let key = Key::derive(seed, Purpose::Initialisation, 0);
                values = parameter.fresh.draw(&parameter.shape, initializer_range, key, stream)?;
            }
            ParameterKind::LayerNormWeight => values = values.f_ones_like()?,
            ParameterKind::Bias | ParameterKind::LayerNormBias | ParameterKind::LowRank => {}
        }
        self.set(id, &values)
    }
}

/// Returns the elements of a flat buffer in a range, `[range]`.
///
/// # Errors
/// Fails if the buffer is shorter.
pub fn span(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(flat.f_narrow(0, range.start as i64, range.len() as i64)?)
}

/// Copies a flat buffer to one of another length; what is new in it is zero.
///
/// # Errors
/// Fails if libtorch cannot allocate.
pub(super) fn resized(flat: &Tensor, length: usize) -> Result<Tensor> {
    let both = flat.numel().min(length) as i64;
    let copy = Tensor::f_zeros([length as i64], (flat.kind(), flat.device()))?;
    copy.f_narrow(0, 0, both)?.f_copy_(&flat.f_narrow(0, 0, both)?)?;
    Ok(copy)
}

/// Makes a leaf of the autograd graph out of the elements of a flat buffer from `start` on.
///
/// # Errors
/// Fails if the buffer ends before.
pub(super) fn leaf(flat: &Tensor, start: usize, shape: &[i64]) -> Result<Tensor> {
    let part = flat.f_narrow(0, start as i64, shape.iter().product())?;
    Ok(part.f_view(shape)?.f_detach()?.f_set_requires_grad(true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_trains_is_the_fewest_ranges_with_and_without_decay() {
        let mut table = ParameterTable::default();
        table.declare("body", &[10, 7], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("body bias", &[10], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[2, 10], ParameterKind::Weight, ParameterPlace::Head);
        table.declare("head bias", &[2], ParameterKind::Bias, ParameterPlace::Head);
        let parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        assert_eq!(parameters.buffer_len(), 128 + 64 + 64 + 64);
        let group = |range, decays| TrainableGroup {
            range,
            treatment: Treatment { rate: 1.0, decays, pretrained: true },
        };
        let all = parameters.trainable(|_| true);
        assert_eq!(all.groups, [group(0..192, true), group(192..320, false)]);
        assert_eq!((&all.spans[..], all.count), (std::slice::from_ref(&(0..320)), 70 + 10 + 20 + 2));
        let head = parameters.trainable(|parameter| parameter.place == ParameterPlace::Head);
        assert_eq!(head.groups, [group(128..192, true), group(256..320, false)]);
        assert_eq!((&head.spans[..], head.count), (&[128..192, 256..320][..], 22));
    }

    #[test]
    fn truncated_normal_weights_have_the_moments_of_the_distribution() {
        let mut table = ParameterTable::default();
        let id = table.declare("weight", &[300, 400], ParameterKind::Weight, ParameterPlace::Head);
        table.start_from(id, FreshWeights::TruncatedNormal { standard_deviation: 0.1, cutoff: 2.0 });
        let mut parameters = Parameters::allocate(table, Device::Cpu).unwrap();
        parameters.initialise(id, 7, 123.0).unwrap();
        let values = parameters.leaf(id).detach().to_kind(Kind::Double) / 0.1;
        let mean = |of: &Tensor| of.mean(Kind::Double).double_value(&[]);
        // 1 − 2 c φ(c) / (2 Φ(c) − 1) with c = 2; the bounds are five standard errors.
        let variance = 0.773_741_35;
        assert!(mean(&values).abs() < 5.0 * (variance / 120_000f64).sqrt());
        assert!((mean(&values.square()) - variance).abs() < 0.013, "{}", mean(&values.square()));
        let largest = values.abs().max().double_value(&[]);
        assert!((1.99..=2.000_001).contains(&largest), "{largest}");
        // A share of (Φ(1) − Φ(−1)) / (Φ(2) − Φ(−2)) within one deviation.
        let within = mean(&values.abs().lt(1.0).to_kind(Kind::Double));
        assert!((within - 0.715_233).abs() < 0.0065, "{within}");
    }
}
