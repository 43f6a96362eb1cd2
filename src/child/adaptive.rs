//! DPS: child networks that the gradients of the steps before choose.

use std::ops::Range;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::masking::{StepMask, add_squares};
use super::network::{ChildNetwork, MaskScope};
use crate::error::Result;
use crate::libtorch::{elements, elements_mut};
use crate::locking::locked;
use crate::model::{Parameter, Parameters};

/// The masks of a run in stages of equally many steps. In the first, third ... everything trains, and the squares of each step's
/// gradients are added up, anew in each of them. In the stage that follows, the weights of each tensor that are among its highest
/// share p train, ties at its end included (`DPSDense` of the released code).
pub struct AdaptiveMask {
    scope: MaskScope,
    p: f64,
    /// Steps of a stage.
    stage: u64,
    uses: Option<Uses>,
    state: Mutex<State>,
}

/// Returns how often some steps used each element of a tensor, given by its number among those that the mask reaches: in float32,
/// in the shape of the tensor or one that is extended to it.
pub type Uses = Box<dyn Fn(usize, Range<u64>) -> Result<Tensor> + Send + Sync>;

/// From stages of so many steps on, elements that were used often count less.
const DISCOUNTED: u64 = 50;

struct State {
    step: u64,
    /// The last that was chosen; the whole network before the first choice.
    child: ChildNetwork,
    /// Whether it masks the current step.
    masks: bool,
    /// The sums of squares of each tensor of the child network, `[count]` in float32.
    sums: Vec<Tensor>,
    /// Whether each of these tensors trains, as far as gradients have been observed.
    trains: Vec<bool>,
}

impl AdaptiveMask {
    /// Makes the masks of a run whose stages have `stage` steps. Where steps use a part of the weights, the sums are divided by
    /// how often these were used, or by 1, and in stages of 50 steps and more multiplied by e to the power of minus that over the
    /// number of steps (`DPSMix` of the released code).
    ///
    /// # Errors
    /// Fails if the scope covers no parameter, or libtorch cannot allocate.
    pub fn new(
        parameters: &Parameters,
        scope: MaskScope,
        p: f64,
        stage: u64,
        uses: Option<Uses>,
    ) -> Result<Self> {
        let child = ChildNetwork::full(parameters, scope)?;
        let options = (Kind::Float, parameters.device());
        let sums = (child.tensors().iter())
            .map(|tensor| Ok(Tensor::f_zeros([tensor.count as i64], options)?))
            .collect::<Result<_>>()?;
        let trains = vec![true; child.tensors().len()];
        let state = Mutex::new(State { step: 0, child, masks: false, sums, trains });
        Ok(Self { scope, p, stage, uses, state })
    }

    /// Returns the part of the model that is masked.
    pub fn scope(&self) -> MaskScope {
        self.scope
    }

    /// Returns the share that the last child network has of the maskable weights that train.
    pub fn share(&self) -> f64 {
        let state = locked(&self.state);
        let tensors = state.child.tensors().iter().zip(&state.trains).filter(|(_, trains)| **trains);
        let (kept, count) =
            tensors.fold((0, 0), |(kept, count), (own, _)| (kept + own.kept, count + own.count));
        if count == 0 { 0.0 } else { kept as f64 / count as f64 }
    }

    /// Returns the step in which the current step's child network was chosen; nothing where everything trains.
    pub fn chosen_in(&self) -> Option<u64> {
        let state = locked(&self.state);
        state.masks.then(|| state.step - state.step % self.stage)
    }

    /// Returns which elements of a parameter train in the current step, as booleans `[count]` on a device; nothing where all
    /// weights do.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn members(&self, parameter: &Parameter, device: Device) -> Result<Option<Tensor>> {
        let state = locked(&self.state);
        state.masks.then(|| state.child.device_mask(parameter.range.clone(), device)).transpose()
    }

    /// Starts a step, numbered from 0; they come in their order.
    ///
    /// # Errors
    /// [`Error::Diverged`](crate::error::Error::Diverged) if a child network is due and gradients were not numbers.
    pub fn begin_step(&self, step: u64) -> Result<()> {
        let mut state = locked(&self.state);
        let State { child, sums, masks, .. } = &mut *state;
        *masks = step / self.stage % 2 == 1;
        if *masks && step.is_multiple_of(self.stage) {
            if let Some(uses) = &self.uses {
                for (index, (tensor, sums)) in child.tensors().iter().zip(sums.iter()).enumerate() {
                    let uses = uses(index, step - self.stage..step)?.f_clamp_min(1.0)?;
                    self.per_use(&sums.f_view(tensor.shape.as_slice())?, &uses)?;
                }
            }
            child.cut_with_ties(sums, self.p)?;
        }
        state.step = step;
        Ok(())
    }

    /// Makes scores of sums, in place.
    fn per_use(&self, sums: &Tensor, uses: &Tensor) -> Result<()> {
        let mut scores = sums.f_div(uses)?;
        if self.stage >= DISCOUNTED {
            let discount = uses.f_div_scalar(-(self.stage as f64))?.f_exp()?;
            scores = scores.f_mul(&discount)?;
        }
        sums.shallow_clone().f_copy_(&scores)?;
        Ok(())
    }

    /// Adds the squares of the current step's gradients, unless they are masked, of the parameters that train.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn observe(&self, parameters: &Parameters, trains: impl Fn(&Parameter) -> bool) -> Result<()> {
        let mut state = locked(&self.state);
        let State { step, masks, sums, trains: observed, .. } = &mut *state;
        if *masks {
            return Ok(());
        }
        let (gradients, adds) = (parameters.gradients()?, !step.is_multiple_of(self.stage));
        let tensors = parameters.iter().filter(|(_, parameter)| self.scope.covers(parameter));
        for (((id, parameter), sums), observed) in tensors.zip(sums).zip(observed) {
            *observed = trains(parameter);
            if !*observed {
                continue;
            }
            let gradient = parameters.part(gradients, id)?;
            if !gradient.device().is_cuda() {
                add_squares(elements_mut(sums)?, elements(&gradient)?, adds);
            } else if adds {
                let _ = sums.f_addcmul_(&gradient, &gradient)?;
            } else {
                *sums = gradient.f_square()?;
            }
        }
        Ok(())
    }

    /// Hands out the mask of the current step, for the CPU.
    pub fn with_cpu_mask<T>(&self, work: impl FnOnce(StepMask) -> T) -> T {
        let state = locked(&self.state);
        work(if state.masks { state.child.on_cpu() } else { StepMask::Everything })
    }

    /// Returns a parameter's gradient with the mask of the current step, on a GPU.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn masked_on_device(&self, gradient: &Tensor, parameter: &Parameter) -> Result<Tensor> {
        let state = locked(&self.state);
        if state.masks {
            state.child.masked_on_device(gradient, parameter)
        } else {
            Ok(gradient.shallow_clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ParameterKind, ParameterPlace, ParameterTable};

    fn parameters() -> Parameters {
        let mut table = ParameterTable::default();
        table.declare("matrix", &[2, 5], ParameterKind::Weight, ParameterPlace::EncoderLayer(0));
        table.declare("bias", &[5], ParameterKind::Bias, ParameterPlace::EncoderLayer(0));
        table.declare("head", &[3, 1], ParameterKind::Weight, ParameterPlace::Head);
        Parameters::allocate(table, Device::Cpu).unwrap()
    }

    /// Takes steps whose gradients are the numbers of `gradient`, times the number of the step and one; returns the members of the
    /// matrix in each.
    fn steps(mask: &AdaptiveMask, gradient: [f32; 10], count: u64) -> Vec<Option<Vec<bool>>> {
        let parameters = parameters();
        let id = parameters.find("matrix").unwrap();
        let step = |step: u64| {
            mask.begin_step(step).unwrap();
            let place = parameters.part(parameters.gradients().unwrap(), id).unwrap();
            place.shallow_clone().copy_(&(Tensor::from_slice(&gradient) * (step as f64 + 1.0)));
            mask.observe(&parameters, |_| true).unwrap();
            let members = mask.members(parameters.get(id), Device::Cpu).unwrap();
            members.map(|members| Vec::try_from(members).unwrap())
        };
        (0..count).map(step).collect()
    }

    #[test]
    fn the_highest_sums_of_a_stage_train_in_the_next_with_all_ties() {
        let mask = AdaptiveMask::new(&parameters(), MaskScope::AllLinear, 0.35, 2, None).unwrap();
        assert_eq!(mask.share(), 1.0);
        // Four of ten, and a fifth that is equal to the fourth.
        let gradient = [1.0, -9.0, 3.0, 0.0, -3.0, 8.0, 2.0, 0.5, 7.0, 1.0];
        let kept: Vec<bool> = gradient.iter().map(|value| f32::abs(*value) >= 3.0).collect();
        let (all, some) = (None, Some(kept));
        let expected = [&all, &all, &some, &some, &all, &all, &some].map(Clone::clone);
        assert_eq!(steps(&mask, gradient, 7), expected);
        // And all of the head, whose gradient is zero.
        assert_eq!(mask.share(), 8.0 / 13.0);
        assert_eq!(mask.chosen_in(), Some(6));
        let bias = mask.members(parameters().get(parameters().find("bias").unwrap()), Device::Cpu);
        assert!(bias.unwrap().unwrap().all().int64_value(&[]) == 1, "a bias trains always");
    }

    #[test]
    fn what_does_not_train_does_not_count() {
        let mask = AdaptiveMask::new(&parameters(), MaskScope::AllLinear, 0.2, 1, None).unwrap();
        let parameters = parameters();
        let values = Tensor::arange(parameters.buffer_len() as i64, (Kind::Float, Device::Cpu));
        parameters.gradients().unwrap().shallow_clone().copy_(&values);
        mask.begin_step(0).unwrap();
        mask.observe(&parameters, |parameter| parameter.name == "matrix").unwrap();
        mask.begin_step(1).unwrap();
        assert_eq!(mask.share(), 0.2);
    }

    /// Sums are those of the last first stage alone, and of whole steps.
    #[test]
    fn sums_begin_anew() {
        let mask = AdaptiveMask::new(&parameters(), MaskScope::AllLinear, 0.1, 1, None).unwrap();
        let one_hot = |place: usize| std::array::from_fn(|index| f32::from(u8::from(index == place)));
        let _ = steps(&mask, one_hot(3).map(|value: f32| 100.0 * value), 2);
        let members = steps(&mask, one_hot(6), 2).remove(1).unwrap();
        assert_eq!(members, one_hot(6).map(|value: f32| value == 1.0));
    }

    #[test]
    fn scores_are_sums_per_use_and_in_long_stages_discounted() {
        for stage in [49, 50] {
            // Input 0 is never used, and input i in i steps of ten.
            let uses: Uses = Box::new(move |tensor, steps| {
                assert_eq!(steps, 0..stage);
                let inputs = if tensor == 0 { 5 } else { 1 };
                Ok(Tensor::arange(inputs, (Kind::Float, Device::Cpu)) * (stage as f64 / 10.0))
            });
            let mask =
                AdaptiveMask::new(&parameters(), MaskScope::AllLinear, 0.5, stage, Some(uses)).unwrap();
            let gradient = [0.1, 1.0, 1.5, 1.8, 2.1, 0.1, 1.1, 1.4, 1.7, 1.9];
            let members = steps(&mask, gradient, stage + 1).pop().unwrap().unwrap();
            let score = |index: usize| {
                let uses = ((index % 5) as f64 * stage as f64 / 10.0).max(1.0);
                let discount = if stage < 50 { 1.0 } else { (-uses / stage as f64).exp() };
                f64::from(gradient[index]).powi(2) / uses * discount
            };
            let mut order: Vec<usize> = (0..10).collect();
            order.sort_by(|left, right| score(*right).total_cmp(&score(*left)));
            let expected: Vec<bool> = (0..10).map(|index| order[..5].contains(&index)).collect();
            assert_eq!(members, expected, "{stage}");
        }
    }

    #[test]
    fn gradients_that_are_not_numbers_are_noticed() {
        let mask = AdaptiveMask::new(&parameters(), MaskScope::AllLinear, 0.5, 1, None).unwrap();
        let _ = steps(&mask, [f32::NAN; 10], 1);
        assert!(matches!(mask.begin_step(1), Err(crate::error::Error::Diverged(_))));
    }
}
