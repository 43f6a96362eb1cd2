//! Gradient hooks: Rust functions that see the gradient of a tensor during backward, or take it from a leaf.

use std::any::Any;
use std::ffi::{CString, c_char, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;
use crate::error::Result;

type Function = Box<dyn FnMut(Tensor) -> Result<()> + Send>;

/// A registered hook on the gradient of any tensor; dropping it removes the hook and frees the function.
///
/// Corresponds to `torch.Tensor.register_hook`. The function sees the gradient of each backward pass and must not change
/// it: others may hold the same memory. It runs on autograd's thread of the tensor's device. An error or a panic inside it
/// ends `backward` with an error.
pub struct GradientHook {
    tensor: Tensor,
    handle: c_uint,
}

impl GradientHook {
    /// Registers `function` on `tensor`.
    ///
    /// # Errors
    /// Fails if the tensor does not require a gradient.
    pub fn register(
        tensor: &Tensor,
        function: impl FnMut(Tensor) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let mut tensor = tensor.shallow_clone();
        let mut handle = 0;
        let (tensor_pointer, state) = (tensor.as_mut_ptr(), boxed(function));
        // SAFETY: `tensor` is a live tensor; `state` is a leaked box that the shim releases exactly once through
        // `release`, also when the registration fails.
        let message =
            unsafe { ffi::child_tuning_register_hook(tensor_pointer, call, state, release, &mut handle) };
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

/// The hook that takes each gradient out of a leaf as soon as backward has put it there; dropping it removes the hook and
/// frees the function.
///
/// Corresponds to `torch.Tensor.register_post_accumulate_grad_hook` with a function that sets `.grad` to `None`. The
/// gradient is whole: the sum over all uses of the leaf in one backward pass. The function may keep or change it. A leaf
/// has one such hook; a second one replaces the first.
pub struct AccumulationHook {
    leaf: Tensor,
}

impl AccumulationHook {
    /// Registers `function` on `leaf`.
    ///
    /// # Errors
    /// Fails if the tensor is no leaf or does not require a gradient.
    pub fn register(
        leaf: &Tensor,
        function: impl FnMut(Tensor) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let mut leaf = leaf.shallow_clone();
        let (leaf_pointer, state) = (leaf.as_mut_ptr(), boxed(function));
        // SAFETY: as for `GradientHook::register`.
        ffi::check(unsafe { ffi::child_tuning_take_gradients(leaf_pointer, call, state, release) })?;
        Ok(Self { leaf })
    }
}

impl Drop for AccumulationHook {
    fn drop(&mut self) {
        // SAFETY: the leaf is alive; a failure leaves the hook in place, which is harmless as above.
        let message = unsafe { ffi::child_tuning_leave_gradients(self.leaf.as_mut_ptr()) };
        let _ = ffi::check(message);
    }
}

fn boxed(function: impl FnMut(Tensor) -> Result<()> + Send + 'static) -> *mut c_void {
    let state: *mut Function = Box::into_raw(Box::new(Box::new(function)));
    state.cast()
}

/// Runs a hook for libtorch.
unsafe extern "C" fn call(state: *mut c_void, gradient: *mut C_tensor) -> *mut c_char {
    let outcome = caught("a gradient hook", || {
        // SAFETY: `gradient` is a new reference that this call owns.
        let gradient = unsafe { Tensor::from_ptr(gradient) };
        // SAFETY: `state` is the box leaked by `boxed`, alive until `release`; libtorch runs the hooks of one
        // tensor one after the other, so there is no second reference.
        let function = unsafe { &mut *state.cast::<Function>() };
        function(gradient)
    });
    outcome.map_or_else(|message| message, |()| std::ptr::null_mut())
}

/// Runs a function for libtorch. Nothing unwinds out of it: errors and panics become a message that the shim frees.
pub(super) fn caught<T>(place: &str, function: impl FnOnce() -> Result<T>) -> Result<T, *mut c_char> {
    let message = match catch_unwind(AssertUnwindSafe(function)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("panic in {place}: {}", panic_message(panic.as_ref())),
    };
    let text = CString::new(message.replace('\0', " ")).unwrap_or_default();
    // SAFETY: `strdup` copies the string with the allocator that the shim frees it with.
    Err(unsafe { strdup(text.as_ptr()) })
}

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
}

unsafe extern "C" fn release(state: *mut c_void) {
    // A panic in a destructor must not unwind into C++ either.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the shim calls this once, with the box leaked by `boxed`.
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use tch::{Device, Kind};

    use super::*;
    use crate::error::Error;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    /// The gradients that a hook has seen.
    #[derive(Clone, Default)]
    struct Seen(Arc<Mutex<Vec<Vec<f32>>>>);

    impl Seen {
        fn collector(&self) -> impl FnMut(Tensor) -> Result<()> + Send + 'static {
            let seen = self.clone();
            move |gradient| {
                seen.0.lock().unwrap().push(Vec::try_from(&gradient).unwrap());
                Ok(())
            }
        }

        fn gradients(&self) -> Vec<Vec<f32>> {
            self.0.lock().unwrap().clone()
        }
    }

    #[test]
    fn a_hook_sees_gradients_until_it_is_dropped() {
        let weight = leaf(&[1.0, 2.0, 3.0]);
        let doubled = &weight * 2.0;
        let seen = Seen::default();
        let hook = GradientHook::register(&doubled, seen.collector()).unwrap();
        doubled.square().sum(Kind::Float).f_backward().unwrap();
        assert_eq!(seen.gradients(), [[4.0, 8.0, 12.0]]);
        assert_eq!(Vec::<f32>::try_from(weight.grad()).unwrap(), [8.0, 16.0, 24.0]);
        drop(hook);
        (&weight * 2.0).sum(Kind::Float).backward();
        assert_eq!(seen.gradients().len(), 1);
    }

    #[test]
    fn gradients_are_taken_from_a_leaf_whole() {
        let weight = leaf(&[1.0, 2.0]);
        let seen = Seen::default();
        let hook = AccumulationHook::register(&weight, seen.collector()).unwrap();
        // Two uses of the leaf, one gradient.
        ((&weight * 3.0) + weight.square()).sum(Kind::Float).backward();
        assert_eq!(seen.gradients(), [[5.0, 7.0]]);
        assert!(!weight.grad().defined());
        (&weight * 3.0).sum(Kind::Float).backward();
        assert_eq!(seen.gradients(), [[5.0, 7.0], [3.0, 3.0]]);

        drop(hook);
        (&weight * 3.0).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(weight.grad()).unwrap(), [3.0, 3.0]);
    }

    #[test]
    fn nothing_is_taken_where_no_gradient_comes() {
        let weight = Tensor::from_slice(&[1.0f32]).set_requires_grad(true);
        let _hook = AccumulationHook::register(&weight, |_| panic!("there was none")).unwrap();
        let operation = |_: &Tensor| Ok(vec![Tensor::new()]);
        let output = super::super::with_backward(weight.detach() * 2.0, &[&weight], operation).unwrap();
        output.f_backward().unwrap();
        assert!(!weight.grad().defined());
    }

    #[test]
    fn the_functions_are_freed_when_the_hooks_are_dropped() {
        let counter = Arc::new(AtomicUsize::new(0));
        let weight = leaf(&[1.0]);
        let count = || {
            let seen = counter.clone();
            move |_| {
                seen.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
        };
        let hooks = (
            GradientHook::register(&weight, count()).unwrap(),
            AccumulationHook::register(&weight, count()).unwrap(),
        );
        (&weight * 2.0).sum(Kind::Float).backward();
        assert_eq!((counter.load(Ordering::SeqCst), Arc::strong_count(&counter)), (2, 3));
        drop(hooks);
        assert_eq!(Arc::strong_count(&counter), 1);
    }

    #[test]
    fn errors_and_panics_end_backward_with_an_error() {
        let weight = leaf(&[1.0]);
        let failing = |_| Err(Error::Diverged("no number".into()));
        let hook = AccumulationHook::register(&weight, failing).unwrap();
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
        let seen = || {
            let seen = counter.clone();
            move |_| {
                let _ = &seen;
                Ok(())
            }
        };
        let constant = Tensor::ones([2], (Kind::Float, Device::Cpu));
        assert!(GradientHook::register(&constant, seen()).is_err());
        assert!(AccumulationHook::register(&constant, seen()).is_err());
        assert_eq!(Arc::strong_count(&counter), 1);
    }
}
