//! Linear maps of our own in the autograd graph, if they are their own adjoints.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;
use super::hooks::caught;
use crate::error::Result;

type Map = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send>;

/// Applies `map` to a tensor, and in backward to the gradient of the result: right for linear maps whose matrix is
/// symmetric, such as a product with numbers of their own for every element. Nothing is kept for backward but the map.
///
/// # Errors
/// That of `map`; in backward it ends `backward`.
pub fn self_adjoint(
    input: &Tensor,
    map: impl Fn(&Tensor) -> Result<Tensor> + Send + 'static,
) -> Result<Tensor> {
    let mut input = input.shallow_clone();
    let state: *mut Map = Box::into_raw(Box::new(Box::new(map)));
    let mut output = std::ptr::null_mut();
    // SAFETY: `input` is a live tensor and `output` is valid for writing during the call; `state` is a leaked box that the
    // shim releases exactly once through `release`, also when it fails.
    ffi::check(unsafe {
        ffi::child_tuning_self_adjoint(input.as_mut_ptr(), call, state.cast(), release, &mut output)
    })?;
    // SAFETY: the shim wrote a new tensor, which this handle owns.
    Ok(unsafe { Tensor::from_ptr(output) })
}

unsafe extern "C" fn call(
    state: *mut c_void,
    input: *mut C_tensor,
    output: *mut *mut C_tensor,
) -> *mut c_char {
    let outcome = caught("a map of a tensor", || {
        // SAFETY: `input` is a new reference that this call owns.
        let input = unsafe { Tensor::from_ptr(input) };
        // SAFETY: `state` is the box leaked by `self_adjoint`, alive until `release`, and only read.
        let map = unsafe { &*state.cast::<Map>() };
        map(&input)
    });
    match outcome {
        Ok(tensor) => {
            // SAFETY: `at_shallow_clone` makes a second handle, which the shim takes over and frees.
            unsafe { *output = torch_sys::at_shallow_clone(tensor.as_ptr().cast_mut()) };
            std::ptr::null_mut()
        }
        Err(message) => message,
    }
}

unsafe extern "C" fn release(state: *mut c_void) {
    // A panic in a destructor must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the shim calls this once, with the box leaked by `self_adjoint`.
        drop(unsafe { Box::from_raw(state.cast::<Map>()) });
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tch::Kind;

    use super::*;
    use crate::error::Error;

    #[test]
    fn the_gradient_goes_through_the_same_map_and_the_map_is_freed() {
        let counter = Arc::new(());
        let seen = counter.clone();
        let factors = Tensor::from_slice(&[2.0f32, 0.0, -1.0]);
        let weight = Tensor::from_slice(&[1.0f32, 2.0, 3.0]).set_requires_grad(true);
        let output = self_adjoint(&weight, move |input| {
            let _ = &seen;
            Ok(input.f_mul(&factors)?)
        })
        .unwrap();
        assert_eq!(Vec::<f32>::try_from(output.detach()).unwrap(), [2.0, 0.0, -3.0]);
        output.square().sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(weight.grad()).unwrap(), [8.0, 0.0, 6.0]);
        drop(output);
        assert_eq!(Arc::strong_count(&counter), 1);
        // Nothing is recorded where nobody asks for a gradient.
        assert!(!self_adjoint(&weight.detach(), |input| Ok(input.shallow_clone())).unwrap().requires_grad());
    }

    #[test]
    fn errors_and_panics_become_errors() {
        let weight = Tensor::from_slice(&[1.0f32]).set_requires_grad(true);
        let error = self_adjoint(&weight, |_| Err(Error::Diverged("no number".into()))).unwrap_err();
        assert!(error.to_string().contains("no number"), "{error}");
        let error = self_adjoint(&weight, |_| panic!("out of luck")).unwrap_err();
        assert!(error.to_string().contains("out of luck"), "{error}");
    }
}
