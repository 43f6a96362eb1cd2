//! Operations of our own in the autograd graph.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Tensor;
use torch_sys::C_tensor;

use super::ffi;
use super::hooks::caught;
use crate::error::{Error, Result};

type Function = Box<dyn FnMut(&[Tensor]) -> Result<Vec<Tensor>> + Send>;

struct Backward {
    function: Function,
    inputs: usize,
}

/// Makes a tensor the differentiable result of an operation on `inputs`: `backward` computes their gradients, one for each,
/// from that of the result. It is freed once backward has gone through, with what it holds, or at once where nobody asks for
/// gradients.
///
/// `output` must be new and without a graph of its own, and `backward` must not hold it or the graph of the inputs.
///
/// # Errors
/// Fails if libtorch refuses; what `backward` returns ends libtorch's backward.
pub fn with_backward(
    output: Tensor,
    inputs: &[&Tensor],
    mut backward: impl FnMut(&Tensor) -> Result<Vec<Tensor>> + Send + 'static,
) -> Result<Tensor> {
    let outputs = with_backward_of_all(vec![output], inputs, move |gradients| backward(&gradients[0]));
    Ok(outputs?.swap_remove(0))
}

/// Makes tensors the differentiable results of one operation on `inputs`, as [`with_backward`] does one: `backward` gets the
/// gradients of all, zeros where a result was not used.
///
/// # Errors
/// As for [`with_backward`].
pub fn with_backward_of_all(
    mut outputs: Vec<Tensor>,
    inputs: &[&Tensor],
    backward: impl FnMut(&[Tensor]) -> Result<Vec<Tensor>> + Send + 'static,
) -> Result<Vec<Tensor>> {
    let mut handles: Vec<Tensor> = inputs.iter().map(|input| input.shallow_clone()).collect();
    let [results, pointers] = [&mut outputs, &mut handles]
        .map(|tensors| tensors.iter_mut().map(Tensor::as_mut_ptr).collect::<Vec<*mut C_tensor>>());
    let state = Box::new(Backward { function: Box::new(backward), inputs: inputs.len() });
    // SAFETY: all are live tensors, and the lists have as many of them as is said, during the call; `state` is a leaked box
    // that the shim releases exactly once through `release`, also when it fails.
    ffi::check(unsafe {
        ffi::child_tuning_own_backward(
            results.as_ptr(),
            results.len(),
            pointers.as_ptr(),
            pointers.len(),
            call,
            Box::into_raw(state).cast(),
            release,
        )
    })?;
    Ok(outputs)
}

/// Returns whether nobody else has a tensor or its memory, so that a backward function may write its result there; not if it is
/// undefined.
pub fn is_exclusive(tensor: &Tensor) -> bool {
    // SAFETY: the tensor is alive; the shim only looks at it.
    unsafe { ffi::child_tuning_is_exclusive(tensor.as_ptr()) }
}

unsafe extern "C" fn call(
    state: *mut c_void,
    gradients: *const *mut C_tensor,
    count: usize,
    results: *mut *mut C_tensor,
) -> *mut c_char {
    let outcome = caught("the backward of an operation", || {
        // SAFETY: the shim has `count` new references there, which this call owns.
        let gradients: Vec<Tensor> =
            (0..count).map(|place| unsafe { Tensor::from_ptr(*gradients.add(place)) }).collect();
        // SAFETY: `state` is the box leaked by `with_backward`, alive until `release`; the engine runs a node by one thread
        // at a time, so there is no second reference.
        let backward = unsafe { &mut *state.cast::<Backward>() };
        let found = (backward.function)(&gradients)?;
        if found.len() != backward.inputs {
            let (found, inputs) = (found.len(), backward.inputs);
            return Err(Error::Libtorch(format!("{found} gradients came for {inputs} inputs")));
        }
        Ok(found)
    });
    match outcome {
        Ok(found) => {
            for (place, tensor) in found.iter().enumerate() {
                // SAFETY: the shim has a place for each input; `at_shallow_clone` makes a second handle, which the shim
                // takes over and frees.
                unsafe { *results.add(place) = torch_sys::at_shallow_clone(tensor.as_ptr().cast_mut()) };
            }
            std::ptr::null_mut()
        }
        Err(message) => message,
    }
}

unsafe extern "C" fn release(state: *mut c_void) {
    // A panic in a destructor must not unwind into C++.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the shim calls this once, with the box leaked by `with_backward`.
        drop(unsafe { Box::from_raw(state.cast::<Backward>()) });
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tch::Kind;

    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.detach()).unwrap()
    }

    #[test]
    fn gradients_reach_the_inputs_and_what_backward_holds_is_freed_by_it() {
        let held = Arc::new(());
        let seen = held.clone();
        let (one, other) = (leaf(&[1.0, 2.0]), leaf(&[3.0, 5.0]));
        let values = [one.detach(), other.detach()];
        let product = with_backward(one.detach() * other.detach(), &[&one, &other], move |gradient| {
            let _ = &seen;
            Ok(vec![gradient * &values[1], gradient * &values[0]])
        })
        .unwrap();
        let loss = product.square().sum(Kind::Float);
        loss.backward();
        assert_eq!(numbers(&one.grad()), [18.0, 100.0]);
        assert_eq!(numbers(&other.grad()), [6.0, 40.0]);
        assert_eq!(Arc::strong_count(&held), 1, "the graph is still there");
        assert!(loss.f_backward().is_err(), "backward goes through once");
    }

    #[test]
    fn results_that_are_not_used_have_gradients_of_zero() {
        let weight = leaf(&[1.0, 2.0]);
        let outputs = vec![weight.detach() * 3.0, weight.detach() * 5.0];
        let outputs = with_backward_of_all(outputs, &[&weight], |gradients| {
            Ok(vec![&gradients[0] * 3.0 + &gradients[1] * 5.0])
        });
        let [used, _unused] = &outputs.unwrap()[..] else { panic!("two were made") };
        used.sum(Kind::Float).backward();
        assert_eq!(numbers(&weight.grad()), [3.0, 3.0]);
    }

    #[test]
    fn nothing_is_recorded_where_nobody_asks_for_a_gradient() {
        let weight = leaf(&[1.0]);
        let operation = |input: &Tensor| {
            with_backward(input.detach() * 2.0, &[input], |gradient| Ok(vec![gradient * 2.0])).unwrap()
        };
        assert!(operation(&weight).requires_grad());
        assert!(!operation(&weight.detach()).requires_grad());
        assert!(!tch::no_grad(|| operation(&weight)).requires_grad());
    }

    #[test]
    fn errors_and_panics_become_errors() {
        type Outcome = fn() -> Result<Vec<Tensor>>;
        let cases: [(Outcome, &str); 3] = [
            (|| Err(Error::Diverged("no number".into())), "no number"),
            (|| panic!("out of luck"), "out of luck"),
            (|| Ok(Vec::new()), "0 gradients came for 1 inputs"),
        ];
        for (outcome, message) in cases {
            let weight = leaf(&[1.0]);
            let output = with_backward(weight.detach(), &[&weight], move |_| outcome()).unwrap();
            let error = output.f_backward().unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
