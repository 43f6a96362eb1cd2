//! libtorch's fused AdamW kernel.

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;
use crate::error::{Error, Result};

/// The constants of one AdamW step.
#[derive(Clone, Copy, Debug)]
pub struct FusedAdamW {
    /// Step size of this step.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the bias-corrected root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay: before the update, this times the step size is taken off each weight.
    pub weight_decay: f64,
}

/// The tensors of one step; all five have the same device, the first four the same shape.
pub struct FusedGroup<'a> {
    /// Weights, changed in place.
    pub parameters: &'a Tensor,
    /// Gradients of the weights.
    pub gradients: &'a Tensor,
    /// First moments, changed in place.
    pub first_moments: &'a Tensor,
    /// Second moments, changed in place.
    pub second_moments: &'a Tensor,
    /// Number of this step, from 1, as a float32 scalar.
    pub step: &'a Tensor,
    /// A float32 scalar that the kernel divides the gradients by; `None` leaves them.
    pub gradient_divisor: Option<&'a Tensor>,
}

impl FusedAdamW {
    /// Applies one step to a group, in place (`at::_fused_adamw_`, the kernel of `torch.optim.AdamW(fused=True)`).
    ///
    /// # Errors
    /// Fails if the tensors do not belong together.
    pub fn apply(&self, group: &FusedGroup) -> Result<()> {
        let count = group.parameters.numel();
        let tensors = [group.parameters, group.gradients, group.first_moments, group.second_moments];
        if tensors.iter().any(|tensor| tensor.numel() != count || !tensor.is_contiguous()) {
            return Err(Error::Libtorch("the tensors of an optimizer step must match in length".into()));
        }
        if count == 0 {
            return Ok(());
        }
        let mut handles = tensors.map(Tensor::shallow_clone);
        let mut step = group.step.shallow_clone();
        let [parameters, gradients, first_moments, second_moments]: [*mut C_tensor; 4] =
            handles.each_mut().map(Tensor::as_mut_ptr);
        let step = step.as_mut_ptr();
        let mut divisor = group.gradient_divisor.map(Tensor::shallow_clone);
        let divisor = divisor.as_mut().map_or(std::ptr::null_mut(), Tensor::as_mut_ptr);
        // SAFETY: all are live tensors, or null where the shim takes null.
        let message = unsafe {
            ffi::child_tuning_fused_adamw(
                parameters,
                gradients,
                first_moments,
                second_moments,
                step,
                self.learning_rate,
                self.betas.0,
                self.betas.1,
                self.weight_decay,
                self.epsilon,
                divisor,
            )
        };
        ffi::check(message)
    }
}
