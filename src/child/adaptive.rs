//! DPS: child networks that the gradients of the steps before choose.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use super::masking::{StepMask, add_squares};
use super::network::{ChildNetwork, MaskScope};
use crate::error::Result;
use crate::libtorch::{elements, elements_mut};
use crate::model::{Parameter, Parameters};

/// The masks of a run in stages of equally many steps. In the first, third ... everything trains, and the squares of each step's
/// gradients are added up, anew in each of them. In the stage that follows, the highest share p of the sums of each tensor trains,
/// ties at its end included (`DPSDense` of the released code).
pub struct AdaptiveMask {
    scope: MaskScope,
    p: f64,
    /// Steps of a stage.
    stage: u64,
    state: Mutex<State>,
}

struct State {
    step: u64,
    /// The last that was chosen; the whole network before the first choice.
    child: ChildNetwork,
    /// Whether it masks the current step.
    masks: bool,
    /// The sums of squares of each tensor of the child network, `[count]` in float32.
    sums: Vec<Tensor>,
}

impl AdaptiveMask {
    /// Makes the masks of a run whose stages have `stage` steps.
    ///
    /// # Errors
    /// Fails if the scope covers no parameter, or libtorch cannot allocate.
    pub fn new(parameters: &Parameters, scope: MaskScope, p: f64, stage: u64) -> Result<Self> {
        let child = ChildNetwork::full(parameters, scope)?;
        let options = (Kind::Float, parameters.device());
        let sums = (child.tensors().iter())
            .map(|tensor| Ok(Tensor::f_zeros([tensor.count as i64], options)?))
            .collect::<Result<_>>()?;
        let state = Mutex::new(State { step: 0, child, masks: false, sums });
        Ok(Self { scope, p, stage, state })
    }

    /// Returns the part of the model that is masked.
    pub fn scope(&self) -> MaskScope {
        self.scope
    }

    /// Returns the share of the maskable weights that the last child network has.
    pub fn share(&self) -> f64 {
        self.lock().child.share()
    }

    /// Returns which elements of a parameter train in the current step, as booleans `[count]` on a device; nothing where all
    /// weights do.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn members(&self, parameter: &Parameter, device: Device) -> Result<Option<Tensor>> {
        let state = self.lock();
        state.masks.then(|| state.child.device_mask(parameter.range.clone(), device)).transpose()
    }

    /// Starts a step, numbered from 0; they come in their order.
    ///
    /// # Errors
    /// [`Error::Diverged`](crate::error::Error::Diverged) if a child network is due and gradients were not numbers.
    pub fn begin_step(&self, step: u64) -> Result<()> {
        let mut state = self.lock();
        let State { child, sums, masks, .. } = &mut *state;
        *masks = step / self.stage % 2 == 1;
        if *masks && step.is_multiple_of(self.stage) {
            child.cut_with_ties(sums, self.p)?;
        }
        state.step = step;
        Ok(())
    }

    /// Adds the squares of the current step's gradients, unless they are masked.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn observe(&self, parameters: &Parameters) -> Result<()> {
        let mut state = self.lock();
        let State { step, child, masks, sums } = &mut *state;
        if *masks {
            return Ok(());
        }
        let (gradients, adds) = (parameters.gradients()?, !step.is_multiple_of(self.stage));
        for (tensor, sums) in child.tensors().iter().zip(sums) {
            let gradient = gradients.f_narrow(0, tensor.start as i64, tensor.count as i64)?;
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
    pub fn on_cpu<T>(&self, work: impl FnOnce(StepMask) -> T) -> T {
        let state = self.lock();
        work(if state.masks { state.child.on_cpu() } else { StepMask::Everything })
    }

    /// Returns a parameter's gradient with the mask of the current step, on a GPU.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn on_device(&self, gradient: &Tensor, parameter: &Parameter) -> Result<Tensor> {
        let state = self.lock();
        if state.masks { state.child.on_device(gradient, parameter) } else { Ok(gradient.shallow_clone()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
