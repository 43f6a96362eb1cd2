//! Gradient hooks: a Rust function that sees, and may replace, the gradient of a tensor during backward.

use std::any::Any;
use std::ffi::{CString, c_char, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;
use crate::error::{Error, Result};

/// A gradient on its way to a tensor.
pub struct HookedGradient {
    /// The gradient, with the shape of the hooked tensor.
    pub gradient: Tensor,
    /// True if nobody else holds the gradient or its memory, so that changing it in place is safe.
    pub exclusive: bool,
}

type Function = Box<dyn FnMut(HookedGradient) -> Result<Option<Tensor>> + Send>;

/// A registered gradient hook; dropping it removes the hook and frees the function.
///
/// Corresponds to `torch.Tensor.register_hook`. The function runs on autograd's thread of the tensor's device. It
/// returns a replacement, or `None` to keep the gradient (which it may have changed in place where
/// [`HookedGradient::exclusive`] allows). An error or a panic inside it ends `backward` with an error.
pub struct GradientHook {
    tensor: Tensor,
    handle: c_uint,
}

impl GradientHook {
    /// Registers `function` on `tensor`.
    ///
    /// # Errors
    /// Fails if the tensor does not require a gradient.
    pub fn register<F>(tensor: &Tensor, function: F) -> Result<Self>
    where
        F: FnMut(HookedGradient) -> Result<Option<Tensor>> + Send + 'static,
    {
        let mut tensor = tensor.shallow_clone();
        let state: *mut Function = Box::into_raw(Box::new(Box::new(function)));
        let mut handle = 0;
        // SAFETY: `tensor` is a live tensor; `state` is a leaked box that the shim releases exactly once through
        // `release`, also when the registration fails.
        let message = unsafe {
            ffi::child_tuning_register_hook(
                tensor.as_mut_ptr(),
                call,
                state.cast::<c_void>(),
                release,
                &mut handle,
            )
        };
        ffi::check(message)?;
        Ok(Self { tensor, handle })
    }
}

impl Drop for GradientHook {
    fn drop(&mut self) {
        // SAFETY: the tensor is alive and the handle was returned for it. A failure leaves the hook in place, which
        // is harmless: the state lives as long as the hook.
        let message = unsafe { ffi::child_tuning_remove_hook(self.tensor.as_mut_ptr(), self.handle) };
        let _ = ffi::check(message);
    }
}

/// Makes `gradient` the accumulated gradient of the leaf `leaf`, so that backward adds into its memory.
///
/// # Errors
/// Fails if shapes, types or devices differ.
pub fn set_gradient(leaf: &Tensor, gradient: &Tensor) -> Result<()> {
    if leaf.size() != gradient.size() || leaf.kind() != gradient.kind() || leaf.device() != gradient.device()
    {
        return Err(Error::Libtorch("a gradient must match its leaf in shape, type and device".into()));
    }
    let (mut leaf, mut gradient) = (leaf.shallow_clone(), gradient.shallow_clone());
    // SAFETY: both are live tensors; libtorch takes its own reference to the gradient.
    ffi::check(unsafe { ffi::child_tuning_set_gradient(leaf.as_mut_ptr(), gradient.as_mut_ptr()) })
}

/// Runs a hook for libtorch. Nothing unwinds out of it: errors and panics become a message.
unsafe extern "C" fn call(
    state: *mut c_void,
    gradient: *mut C_tensor,
    exclusive: bool,
    replacement: *mut *mut C_tensor,
) -> *mut c_char {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `gradient` is a new reference that this call owns.
        let gradient = unsafe { Tensor::from_ptr(gradient) };
        // SAFETY: `state` is the box leaked by `register`, alive until `release`; libtorch runs the hooks of one
        // tensor one after the other, so there is no second reference.
        let function = unsafe { &mut *state.cast::<Function>() };
        function(HookedGradient { gradient, exclusive })
    }));
    let message = match outcome {
        Ok(Ok(None)) => return std::ptr::null_mut(),
        Ok(Ok(Some(tensor))) => {
            // SAFETY: `at_shallow_clone` makes a second handle, which the shim takes over and frees.
            unsafe { *replacement = torch_sys::at_shallow_clone(tensor.as_ptr().cast_mut()) };
            return std::ptr::null_mut();
        }
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("panic in a gradient hook: {}", panic_message(panic.as_ref())),
    };
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: `strdup` copies the string with the allocator that the shim frees it with.
    unsafe { strdup(text.as_ptr()) }
}

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
}

unsafe extern "C" fn release(state: *mut c_void) {
    // A panic in a destructor must not unwind into C++ either.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the shim calls this once, with the box leaked by `register`.
        drop(unsafe { Box::from_raw(state.cast::<Function>()) });
    }));
}

/// Returns the text of a caught panic.
pub fn panic_message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    #[test]
    fn a_hook_replaces_the_gradient_until_it_is_dropped() {
        let weight = leaf(&[1.0, 2.0, 3.0]);
        let mask = Tensor::from_slice(&[1.0f32, 0.0, 1.0]);
        let hook =
            GradientHook::register(&weight, move |hooked| Ok(Some(hooked.gradient.f_mul(&mask)?))).unwrap();
        (&weight * 2.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(weight.grad()).unwrap(), [2.0, 0.0, 2.0]);

        drop(hook);
        (&weight * 2.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(weight.grad()).unwrap(), [4.0, 2.0, 4.0]);
    }

    #[test]
    fn the_function_is_freed_when_the_hook_is_dropped() {
        let counter = Arc::new(AtomicUsize::new(0));
        let weight = leaf(&[1.0]);
        let seen = counter.clone();
        let hook = GradientHook::register(&weight, move |_| {
            seen.fetch_add(1, Ordering::SeqCst);
            Ok(None)
        })
        .unwrap();
        (&weight * 2.0).sum(Kind::Float).backward();
        assert_eq!((counter.load(Ordering::SeqCst), Arc::strong_count(&counter)), (1, 2));
        drop(hook);
        assert_eq!(Arc::strong_count(&counter), 1);
    }

    #[test]
    fn errors_and_panics_end_backward_with_an_error() {
        let weight = leaf(&[1.0]);
        let hook = GradientHook::register(&weight, |_| Err(Error::Diverged("no number".into()))).unwrap();
        let error = (&weight * 2.0).sum(Kind::Float).f_backward().unwrap_err();
        assert!(error.to_string().contains("no number"), "{error}");
        drop(hook);

        let _hook = GradientHook::register(&weight, |_| panic!("out of luck")).unwrap();
        let error = (&weight * 2.0).sum(Kind::Float).f_backward().unwrap_err();
        assert!(error.to_string().contains("out of luck"), "{error}");
    }

    #[test]
    fn a_failed_registration_frees_the_function() {
        let counter = Arc::new(());
        let seen = counter.clone();
        let constant = Tensor::ones([2], (Kind::Float, Device::Cpu));
        let outcome = GradientHook::register(&constant, move |_| {
            let _ = &seen;
            Ok(None)
        });
        assert!(outcome.is_err());
        assert_eq!(Arc::strong_count(&counter), 1);
    }

    #[test]
    fn a_gradient_shared_by_two_tensors_is_not_exclusive() {
        let (first, second) = (leaf(&[1.0, 1.0]), leaf(&[1.0, 1.0]));
        let exclusive = Arc::new(AtomicUsize::new(0));
        let hooks: Vec<_> = [&first, &second]
            .into_iter()
            .map(|tensor| {
                let exclusive = exclusive.clone();
                GradientHook::register(tensor, move |mut hooked| {
                    exclusive.fetch_add(hooked.exclusive as usize, Ordering::SeqCst);
                    if hooked.exclusive {
                        let _ = hooked.gradient.f_mul_scalar_(0.0)?;
                    }
                    Ok(None)
                })
                .unwrap()
            })
            .collect();
        // The addition hands one and the same gradient tensor to both of its inputs.
        let scale = Tensor::from_slice(&[2.0f32, 3.0]);
        ((&first + &second) * scale).sum(Kind::Float).backward();
        let gradients: Vec<Vec<f32>> =
            [&first, &second].iter().map(|tensor| tensor.grad().try_into().unwrap()).collect();
        let exclusive = exclusive.load(Ordering::SeqCst);
        assert!(exclusive <= 1, "both inputs were told that they alone hold the gradient");
        assert_eq!(gradients.iter().filter(|gradient| **gradient == [2.0, 3.0]).count(), 2 - exclusive);
        drop(hooks);
    }

    #[test]
    fn backward_adds_into_the_given_gradient() {
        let weight = leaf(&[1.0, 2.0]);
        let arena = Tensor::zeros([4], (Kind::Float, Device::Cpu));
        set_gradient(&weight, &arena.narrow(0, 1, 2)).unwrap();
        (&weight * 3.0).sum(Kind::Float).backward();
        (&weight * 3.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(&arena).unwrap(), [0.0, 6.0, 6.0, 0.0]);
        assert!(set_gradient(&weight, &arena).is_err());
    }
}
