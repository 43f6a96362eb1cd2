//! Masks at work: a gradient hook on every parameter.

use std::sync::{Arc, Mutex};

use tch::{Kind, Tensor};

use super::adaptive::AdaptiveMask;
use super::bernoulli::BernoulliMask;
use super::masking::{self, Gradient, StepMask, mask_in_place};
use super::network::{ChildNetwork, MaskScope};
use crate::error::Result;
use crate::libtorch::{self, AccumulationHook, GradientPlace, RandomMask, Stretch, elements, elements_mut};
use crate::locking::locked;
use crate::model::{Parameter, Parameters};
use crate::random::GROUP;

/// The mask that a run multiplies its gradients by.
pub enum GradientMask {
    /// Another random mask at every step (Child-Tuning_F).
    Bernoulli(BernoulliMask),
    /// One mask for the whole run (Child-Tuning_D, and whatever else chooses once).
    Fixed(Arc<ChildNetwork>),
    /// A mask that gradients choose anew now and again (DPS).
    Adaptive(AdaptiveMask),
}

impl GradientMask {
    /// Starts an optimizer step, numbered from 0.
    ///
    /// # Errors
    /// [`Error::Diverged`](crate::error::Error::Diverged) if a mask is due whose scores are not numbers.
    pub fn begin_step(&self, step: u64) -> Result<()> {
        match self {
            GradientMask::Bernoulli(mask) => mask.begin_step(step),
            GradientMask::Fixed(_) => {}
            GradientMask::Adaptive(mask) => mask.begin_step(step)?,
        }
        Ok(())
    }

    /// Looks at the gradients of the loss that the step has collected, of the parameters that train, as far as the mask has let
    /// them through.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn observe(&self, parameters: &Parameters, trains: impl Fn(&Parameter) -> bool) -> Result<()> {
        match self {
            GradientMask::Adaptive(mask) => mask.observe(parameters, trains),
            GradientMask::Bernoulli(_) | GradientMask::Fixed(_) => Ok(()),
        }
    }

    /// Returns the part of the model that the mask reaches.
    pub fn scope(&self) -> MaskScope {
        match self {
            GradientMask::Bernoulli(mask) => mask.scope(),
            GradientMask::Fixed(child) => child.scope(),
            GradientMask::Adaptive(mask) => mask.scope(),
        }
    }

    /// Returns the share of the maskable weights that trains: on average over the steps, or exactly; of an adaptive mask that of
    /// the last child network.
    pub fn share(&self) -> f64 {
        match self {
            GradientMask::Bernoulli(mask) => mask.probability(),
            GradientMask::Fixed(child) => child.share(),
            GradientMask::Adaptive(mask) => mask.share(),
        }
    }

    /// Returns the fixed child network, if there is one.
    pub fn child(&self) -> Option<&Arc<ChildNetwork>> {
        match self {
            GradientMask::Bernoulli(_) | GradientMask::Adaptive(_) => None,
            GradientMask::Fixed(child) => Some(child),
        }
    }

    /// Returns the fixed child network unless it is the whole network, which counts as none: so p = 1 is vanilla bit for bit.
    pub fn restriction(&self) -> Option<&Arc<ChildNetwork>> {
        self.child().filter(|child| !child.is_full())
    }

    /// Hands out the mask of the current step, for the CPU.
    fn with_cpu_mask<T>(&self, work: impl FnOnce(StepMask) -> T) -> T {
        match self {
            GradientMask::Bernoulli(mask) => work(mask.on_cpu()),
            GradientMask::Fixed(child) => work(child.on_cpu()),
            GradientMask::Adaptive(mask) => mask.with_cpu_mask(work),
        }
    }

    /// Returns the mask of the current step for kernels that read gradients through it, if it is a random one.
    pub fn as_random(&self) -> Option<RandomMask> {
        match self {
            GradientMask::Bernoulli(mask) => Some(mask.for_kernels()),
            GradientMask::Fixed(_) | GradientMask::Adaptive(_) => None,
        }
    }

    /// Returns a parameter's gradient with the mask of the current step, on a GPU, `[count]`.
    fn masked_on_device(&self, gradient: &Tensor, parameter: &Parameter) -> Result<Tensor> {
        match self {
            GradientMask::Bernoulli(mask) => {
                let mut masked = Tensor::f_empty(gradient.size(), (Kind::Float, gradient.device()))?;
                masked.f_copy_(gradient)?;
                let first_group = parameter.range.start / GROUP;
                let stretch = Stretch { first_group, chosen: None, mask: Some(mask.for_kernels()) };
                libtorch::mask_in_place(stretch, &masked)?;
                Ok(masked)
            }
            GradientMask::Fixed(child) => child.masked_on_device(gradient, parameter),
            GradientMask::Adaptive(mask) => mask.masked_on_device(gradient, parameter),
        }
    }

    /// Masks the gradients that a step has collected, for the released code's order: clip first, then mask.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn apply_to_all(&self, parameters: &Parameters) -> Result<()> {
        for (id, parameter) in parameters.iter().filter(|(_, parameter)| self.scope().covers(parameter)) {
            let mut gradient = parameters.part(parameters.gradients()?, id)?;
            if gradient.device().is_cuda() {
                deposit_on_device(&mut gradient.shallow_clone(), &gradient, Some(self), parameter, false)?;
            } else {
                let (gradient, first_group) = (elements_mut(&mut gradient)?, parameter.range.start / GROUP);
                self.with_cpu_mask(|mask| mask_in_place(gradient, mask, first_group));
            }
        }
        Ok(())
    }
}

/// What becomes of the gradients that backward makes, until this is dropped: a hook on every parameter takes its gradient
/// as soon as it is there, multiplies it by the mask and puts it to its place in the flat gradient buffer, beside what
/// earlier micro-batches of the step left there.
///
/// Nothing needs to be zeroed before a step, and no gradient exists twice for longer than its layer's backward.
pub struct GradientHooks {
    slots: Vec<Slot>,
    /// The places that operations may bring gradients to themselves, by parameter.
    places: Vec<Option<GradientPlace>>,
    _hooks: Vec<AccumulationHook>,
}

/// The place of one parameter's gradient.
struct Slot {
    place: GradientPlace,
    known: Arc<Mutex<Known>>,
}

/// What is known of the numbers at a place; on the CPU only.
#[derive(Default)]
struct Known {
    /// Sum of the squares of what the micro-batches so far add up to.
    squares: f64,
    /// Of a table, the rows that may hold something else than zeros, from one step to the next; `None` where any may.
    rows: Option<Vec<usize>>,
}

impl GradientHooks {
    /// Collects the gradients of the parameters that train. `weights` are those that passes use, of all parameters.
    ///
    /// # Errors
    /// Fails if libtorch refuses a hook or cannot allocate the buffer.
    pub fn collect(
        parameters: &Parameters,
        weights: &[Tensor],
        trains: impl Fn(&Parameter) -> bool,
        mask: Option<&Arc<GradientMask>>,
    ) -> Result<Self> {
        let (mut slots, mut hooks) = (Vec::new(), Vec::new());
        let is_device = parameters.device().is_cuda();
        let mut places: Vec<Option<GradientPlace>> =
            weights.iter().filter(|_| is_device).map(|_| None).collect();
        for (id, parameter) in parameters.iter().filter(|(_, parameter)| trains(parameter)) {
            let mask = reaching(mask, parameter);
            let place = GradientPlace::new(parameters.part(parameters.gradients()?, id)?);
            if let Some(own) = places.get_mut(id.index()).filter(|_| mask.is_none()) {
                *own = Some(place.shallow_clone());
            }
            let known = Arc::new(Mutex::new(Known::default()));
            slots.push(Slot { place: place.shallow_clone(), known: known.clone() });
            let parameter = parameter.clone();
            hooks.push(AccumulationHook::register(&weights[id.index()], move |gradient| {
                let mut numbers = place.numbers().shallow_clone();
                let (adds, mut known) = (place.claim(), locked(&known));
                deposit(&mut numbers, &gradient, mask.as_deref(), &parameter, adds, &mut known)
            })?);
        }
        Ok(Self { slots, places, _hooks: hooks })
    }

    /// Returns where operations may bring gradients without a hook, by parameter: on a GPU, of parameters that no mask of these
    /// hooks reaches.
    pub fn places(&self) -> &[Option<GradientPlace>] {
        &self.places
    }

    /// Hands each gradient of a parameter that trains to `update` as soon as it is whole, masked and in float32, `[count]`,
    /// and keeps none: for steps of one micro-batch and without a norm. `weights` are as for
    /// [`GradientHooks::collect`].
    ///
    /// # Errors
    /// Fails if libtorch refuses a hook.
    pub fn hand_on(
        parameters: &Parameters,
        weights: &[Tensor],
        trains: impl Fn(&Parameter) -> bool,
        mask: Option<&Arc<GradientMask>>,
        update: impl FnMut(&Parameter, &Tensor) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let update = Arc::new(Mutex::new(update));
        let mut hooks = Vec::new();
        for (id, parameter) in parameters.iter().filter(|(_, parameter)| trains(parameter)) {
            let (mask, parameter, update) = (reaching(mask, parameter), parameter.clone(), update.clone());
            hooks.push(AccumulationHook::register(&weights[id.index()], move |gradient| {
                let options = (Kind::Float, gradient.device());
                let mut masked = Tensor::f_empty([parameter.count() as i64], options)?;
                deposit(&mut masked, &gradient, mask.as_deref(), &parameter, false, &mut Known::default())?;
                locked(&update)(&parameter, &masked)
            })?);
        }
        Ok(Self { slots: Vec::new(), places: Vec::new(), _hooks: hooks })
    }

    /// Starts a step: the next gradients take the place of what is there.
    pub fn begin_step(&self) {
        for slot in &self.slots {
            slot.place.note(false);
            locked(&slot.known).squares = 0.0;
        }
    }

    /// Ends a step: parameters that the loss did not reach have a gradient of zero.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn end_step(&self) -> Result<()> {
        for slot in self.slots.iter().filter(|slot| !slot.place.holds()) {
            let _ = slot.place.numbers().shallow_clone().f_zero_()?;
        }
        Ok(())
    }

    /// Returns which parameters the step has collected a gradient of.
    pub fn collected(&self) -> Vec<bool> {
        self.slots.iter().map(|slot| slot.place.holds()).collect()
    }

    /// Notes that the buffer holds the gradients of the parameters that [`GradientHooks::collected`] named, although no hook
    /// has run: what they do on a GPU was started again from a record.
    pub fn note_collected(&self, collected: &[bool]) {
        for (slot, &any) in self.slots.iter().zip(collected) {
            slot.place.note(any);
        }
    }

    /// Returns the norm of all that the step has collected, on the CPU; nothing on a GPU, where the buffer is at hand.
    pub fn norm(&self) -> f64 {
        self.slots.iter().map(|slot| locked(&slot.known).squares).sum::<f64>().sqrt()
    }

    /// Notes that somebody else has added to the gradients.
    pub fn note_changed(&self) {
        self.slots.iter().for_each(|slot| locked(&slot.known).rows = None);
    }
}

/// Returns the mask, if it reaches a parameter.
fn reaching(mask: Option<&Arc<GradientMask>>, parameter: &Parameter) -> Option<Arc<GradientMask>> {
    mask.filter(|mask| mask.scope().covers(parameter)).cloned()
}

/// Puts a masked gradient to its place, or adds it to what is there, and notes what is there then.
fn deposit(
    place: &mut Tensor,
    gradient: &Tensor,
    mask: Option<&GradientMask>,
    parameter: &Parameter,
    adds: bool,
    known: &mut Known,
) -> Result<()> {
    if gradient.device().is_cuda() {
        return deposit_on_device(place, gradient, mask, parameter, adds);
    }
    let first_group = parameter.range.start / GROUP;
    let place = elements_mut(place)?;
    let mut put = |mask: StepMask| {
        if gradient.is_sparse() {
            // The rows of an embedding table that tokens have used.
            let rows = gradient.f_internal_indices()?.f_view([-1])?;
            let (rows, held) = (elements(&rows)?, &mut known.rows);
            return with_elements(&gradient.f_internal_values()?, |values| {
                Ok(masking::deposit_rows(place, rows, values, mask, first_group, adds, held))
            });
        }
        known.rows = None;
        with_elements(gradient, |values| Ok(masking::deposit(place, values, mask, first_group, adds)))
    };
    known.squares = match mask {
        Some(mask) => mask.with_cpu_mask(put),
        None => put(StepMask::Everything),
    }?;
    Ok(())
}

/// Puts a masked gradient to its place, or adds it to what is there, on a GPU; `place` may be the gradient itself.
fn deposit_on_device(
    place: &mut Tensor,
    gradient: &Tensor,
    mask: Option<&GradientMask>,
    parameter: &Parameter,
    adds: bool,
) -> Result<()> {
    let gradient = gradient.f_contiguous()?.f_view([-1])?;
    let masked = match mask {
        Some(mask) => mask.masked_on_device(&gradient, parameter)?,
        None => gradient,
    };
    if libtorch::collects(&masked) {
        return libtorch::collect(&masked, place, adds);
    }
    match adds {
        false => place.f_copy_(&masked)?,
        true => *place = place.f_add_(&masked)?,
    }
    Ok(())
}

/// Reads a gradient's numbers in float32 or bfloat16.
fn with_elements<T>(gradient: &Tensor, read: impl FnOnce(Gradient) -> Result<T>) -> Result<T> {
    let gradient = gradient.f_contiguous()?;
    match gradient.kind() {
        Kind::BFloat16 => read(Gradient::Half(elements(&gradient)?)),
        _ => read(Gradient::Float(elements(&gradient)?)),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::super::{Cut, Threshold};
    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("body", &[1000], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[10], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    /// Backward through a loss whose gradient is 3 everywhere; returns what has been collected of body and head.
    fn backward(parameters: &Parameters) -> [Vec<f32>; 2] {
        let names = ["body", "head"].map(|name| parameters.find(name).unwrap());
        names.iter().for_each(|&id| (parameters.leaf(id) * 3.0).sum(Kind::Float).backward());
        collected(parameters)
    }

    fn collected(parameters: &Parameters) -> [Vec<f32>; 2] {
        let flat = parameters.gradients().unwrap();
        ["body", "head"].map(|name| {
            Vec::try_from(parameters.part(flat, parameters.find(name).unwrap()).unwrap()).unwrap()
        })
    }

    fn hooks(parameters: &Parameters, mask: GradientMask) -> (Arc<GradientMask>, GradientHooks) {
        let mask = Arc::new(mask);
        let weights = parameters.compute_weights(Kind::Float).unwrap();
        let hooks = GradientHooks::collect(parameters, &weights, |_| true, Some(&mask)).unwrap();
        (mask, hooks)
    }

    #[test]
    fn micro_batches_of_a_step_share_a_mask_and_steps_do_not() {
        let parameters = parameters();
        let mask = BernoulliMask::new(MaskScope::EncoderLayers, 0.5, true, 1);
        let (mask, hooks) = hooks(&parameters, GradientMask::Bernoulli(mask));

        mask.begin_step(0).unwrap();
        hooks.begin_step();
        let [once, head] = backward(&parameters);
        let norm = |values: &[f32]| values.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>();
        assert!((hooks.norm() - (norm(&once) + norm(&head)).sqrt()).abs() < 1e-3);
        let [twice, _] = backward(&parameters);
        assert!(once.iter().all(|&value| value == 0.0 || value == 6.0));
        assert!(once.iter().zip(&twice).all(|(once, twice)| *twice == 2.0 * once));
        assert_eq!(head, [3.0; 10], "the head is outside the scope");

        mask.begin_step(1).unwrap();
        hooks.begin_step();
        assert_ne!(backward(&parameters)[0], once);
    }

    #[test]
    fn a_parameter_that_the_loss_does_not_reach_has_a_gradient_of_zero() {
        let parameters = parameters();
        let weights = parameters.compute_weights(Kind::Float).unwrap();
        let hooks = GradientHooks::collect(&parameters, &weights, |_| true, None).unwrap();
        hooks.begin_step();
        assert_eq!(backward(&parameters), [vec![3.0; 1000], vec![3.0; 10]]);
        hooks.begin_step();
        (parameters.leaf(parameters.find("head").unwrap()) * 2.0).sum(Kind::Float).backward();
        hooks.end_step().unwrap();
        assert_eq!(collected(&parameters), [vec![0.0; 1000], vec![2.0; 10]]);
    }

    #[test]
    fn a_fixed_mask_lets_exactly_its_members_through() {
        let parameters = parameters();
        let scores = Tensor::arange(parameters.buffer_len() as i64, (Kind::Float, Device::Cpu));
        let child = ChildNetwork::from_scores(
            &parameters,
            &scores,
            &Cut::highest(0.25, MaskScope::EncoderLayers, Threshold::Global),
        )
        .unwrap();
        assert_eq!((child.kept(), child.maskable()), (250, 1000));
        let (_, hooks) = hooks(&parameters, GradientMask::Fixed(Arc::new(child)));
        hooks.begin_step();
        let [body, head] = backward(&parameters);
        assert!(body.iter().enumerate().all(|(index, &value)| value == if index >= 750 { 3.0 } else { 0.0 }));
        assert_eq!(head, [3.0; 10]);
    }

    /// What libtorch does on a GPU, on the CPU. Each draw is looked at by itself, since other tests share libtorch's generator;
    /// that draws are the same where they must be is in `tests/generator.rs`.
    #[test]
    fn on_a_device_f_masks_gradients_of_any_type_and_scales_them_in_float32() {
        let mut table = ParameterTable::default();
        let id = table.declare("body", &[40, 250], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        let parameter = table.as_slice()[id.index()].clone();
        let half = Tensor::randn([40, 250], (Kind::BFloat16, Device::Cpu));
        let float = half.to_kind(Kind::Float).view([-1]);
        for rescale in [true, false] {
            let mask = GradientMask::Bernoulli(BernoulliMask::new(MaskScope::All, 0.3, rescale, 1));
            let whole = &float * if rescale { f64::from((1.0 / 0.3) as f32) } else { 1.0 };
            let check = |found: &Tensor, tolerance: f64| {
                let kept = found.abs().gt(tolerance);
                assert!(found.allclose(&(&whole * &kept), 0.0, tolerance, false));
                let share = kept.sum(Kind::Int64).int64_value(&[]) as f64 / 10_000.0;
                assert!((share - 0.3).abs() < 5.0 * (0.3f64 * 0.7 / 10_000.0).sqrt(), "{share}");
            };
            for gradient in [&half, &float] {
                let mut place = Tensor::full([10_000], 0.5, (Kind::Float, Device::Cpu));
                deposit_on_device(&mut place, gradient, Some(&mask), &parameter, false).unwrap();
                check(&place, 0.0);
                let _ = place.fill_(0.5);
                deposit_on_device(&mut place, gradient, Some(&mask), &parameter, true).unwrap();
                check(&(place - 0.5), 2e-6);
            }
            // In its own place, as where clipping comes first.
            let own = float.copy();
            deposit_on_device(&mut own.shallow_clone(), &own, Some(&mask), &parameter, false).unwrap();
            check(&own, 0.0);
        }
    }
}
