//! What libtorch ran on behalf of a piece of code: operator calls on the host, kernels on a GPU, and their times.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::time::Duration;

use tch::Device;

use super::context::synchronize;
use super::ffi;
use crate::error::Result;
use crate::locking::locked;

/// libtorch has one recorder for the whole process; whoever comes second waits.
static RECORDER: Mutex<()> = Mutex::new(());

/// What one operator or kernel added up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfileRow {
    /// The operator's name, such as `aten::addmm`, or the kernel's.
    pub name: String,
    /// How often it ran.
    pub calls: u64,
    /// The time from its begin to its end, what it called included.
    pub total: Duration,
    /// The time that it spent itself; for a kernel all of it.
    pub own: Duration,
}

/// What ran, by name, the longest own time first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Operators, those of backward included (`MmBackward0`, `autograd::engine::evaluate_function: …`, whose own time
    /// holds what gradient hooks do outside libtorch).
    pub operators: Vec<ProfileRow>,
    /// Kernels, copies and fills on a GPU; empty on a machine without one.
    pub kernels: Vec<ProfileRow>,
}

impl Profile {
    /// Returns how often an operator was called, by itself or by another operator.
    pub fn calls(&self, operator: &str) -> u64 {
        self.operators.iter().filter(|row| row.name == operator).map(|row| row.calls).sum()
    }

    /// Returns the number of all operator calls.
    pub fn operator_calls(&self) -> u64 {
        self.operators.iter().map(|row| row.calls).sum()
    }

    /// Returns the number of kernels, copies and fills that ran on a GPU, those of recorded work included.
    pub fn kernel_runs(&self) -> u64 {
        self.kernels.iter().map(|row| row.calls).sum()
    }
}

/// Runs a piece of code that computes on a device under libtorch's profiler, waits for the device, and returns what ran.
///
/// Sees the operators that this thread calls and those of the backward passes that it starts. One recording runs at a
/// time, and `work` must not start another.
///
/// # Errors
/// What `work` returns, or that the profiler cannot start.
pub fn profile<T>(device: Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Profile)> {
    let _alone = locked(&RECORDER);
    // SAFETY: no pointers are involved.
    ffi::check(unsafe { ffi::child_tuning_profile_start() })?;
    // Whatever happens inside, the recording ends in the thread that began it.
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let waited = synchronize(device);
    let mut profile = Profile::default();
    let state: *mut Profile = &mut profile;
    // SAFETY: `add_row` is called during this call only, with the profile that `state` points to.
    let stopped = ffi::check(unsafe { ffi::child_tuning_profile_stop(state.cast::<c_void>(), add_row) });
    let value = outcome.unwrap_or_else(|panic| resume_unwind(panic))?;
    waited.and(stopped)?;
    for rows in [&mut profile.operators, &mut profile.kernels] {
        rows.sort_by_key(|row| std::cmp::Reverse(row.own));
    }
    Ok((value, profile))
}

/// Takes one row over from C++.
unsafe extern "C" fn add_row(
    state: *mut c_void,
    name: *const c_char,
    on_device: bool,
    calls: u64,
    total: u64,
    own: u64,
) {
    // SAFETY: `state` is the profile that `profile` passed on and nobody else uses meanwhile.
    let profile = unsafe { &mut *state.cast::<Profile>() };
    // SAFETY: the name is a NUL-terminated string that lives during this call.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    let rows = if on_device { &mut profile.kernels } else { &mut profile.operators };
    rows.push(ProfileRow { name, calls, total: Duration::from_nanos(total), own: Duration::from_nanos(own) });
}

#[cfg(test)]
mod tests {
    use tch::{Cuda, Kind, Tensor};

    use super::*;
    use crate::error::Error;

    #[test]
    fn counts_the_operators_of_a_known_computation() {
        let weight = Tensor::ones([8, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let input = Tensor::ones([3, 4], (Kind::Float, Device::Cpu));
        let (sum, profile) = profile(Device::Cpu, || {
            let output = input.f_linear(&weight, None::<Tensor>)?.f_relu()?.f_relu()?;
            let sum = output.f_sum(Kind::Float)?;
            sum.f_backward()?;
            Ok(f64::try_from(sum.f_detach()?)?)
        })
        .unwrap();
        assert_eq!(sum, 3.0 * 8.0 * 4.0);
        let calls = |name| profile.calls(name);
        assert_eq!([calls("aten::linear"), calls("aten::relu"), calls("SumBackward0")], [1, 2, 1]);
        // One product forward, and backward one for the weight only: the input needs no gradient.
        assert_eq!([calls("aten::mm"), calls("ReluBackward0"), calls("MmBackward0")], [2, 2, 1]);
        assert!(profile.operator_calls() > 10);
        if !Cuda::is_available() {
            assert_eq!(profile.kernel_runs(), 0);
        }
        for row in &profile.operators {
            assert!(row.own <= row.total, "{row:?}");
        }
        let linear = profile.operators.iter().find(|row| row.name == "aten::linear").unwrap();
        assert!(linear.own < linear.total, "what it calls is not its own time: {linear:?}");
    }

    #[test]
    fn an_error_or_a_panic_ends_the_recording() {
        let error = profile::<()>(Device::Cpu, || Err(Error::Diverged("no number".into()))).unwrap_err();
        assert!(error.to_string().contains("no number"), "{error}");
        assert!(catch_unwind(|| profile::<()>(Device::Cpu, || panic!("out of luck"))).is_err());
        let (_, after) =
            profile(Device::Cpu, || Ok(Tensor::f_zeros([2], (Kind::Float, Device::Cpu))?)).unwrap();
        assert_eq!((after.calls("aten::zeros"), after.calls("aten::linear")), (1, 0));
    }
}
