//! libtorch's version and the memory of devices.

use std::ffi::CStr;
use std::sync::Mutex;

use tch::Device;

use super::ffi;
use crate::error::Result;
use crate::locking::locked;

/// Returns the version of the libtorch that this program was compiled against, such as `2.11.0`.
pub fn version() -> String {
    // SAFETY: the shim returns a string literal.
    unsafe { CStr::from_ptr(ffi::child_tuning_libtorch_version()) }.to_string_lossy().into_owned()
}

/// Returns the largest number of bytes in use on a CUDA device since the last [`reset_cuda_peak`].
pub fn cuda_peak_bytes(device: usize) -> Result<u64> {
    let mut bytes = 0;
    // SAFETY: `bytes` is valid for writing during the call.
    ffi::check(unsafe { ffi::child_tuning_cuda_peak_bytes(device as i32, &mut bytes) })?;
    Ok(bytes.max(0) as u64)
}

/// Starts a new measurement for [`cuda_peak_bytes`].
pub fn reset_cuda_peak(device: usize) -> Result<()> {
    // SAFETY: no pointers are involved.
    ffi::check(unsafe { ffi::child_tuning_cuda_reset_peak(device as i32) })
}

/// Returns the bytes of a CUDA device that are free for any process, and all its bytes.
///
/// What libtorch keeps for later counts as used; [`release_cached_memory`] first gives the number that a new model can
/// count on.
///
/// # Errors
/// Fails if there is no such device.
pub fn device_memory(device: usize) -> Result<(u64, u64)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both numbers are valid for writing during the call.
    ffi::check(unsafe { ffi::child_tuning_device_memory(device as i32, &mut free, &mut total) })?;
    Ok((free, total))
}

/// Makes a device the one of this thread that what names no device goes to, such as pinned memory: otherwise it is the first
/// GPU, on which every process would take memory. Without effect for the CPU.
///
/// # Errors
/// Fails if there is no such device.
pub fn use_device(device: Device) -> Result<()> {
    match device {
        // SAFETY: no pointers are involved.
        Device::Cuda(index) => ffi::check(unsafe { ffi::child_tuning_use_device(index as i32) }),
        _ => Ok(()),
    }
}

/// Waits for a CUDA device, and gives memory of freed tensors, which libtorch keeps for the next ones, back to it. Without
/// effect for the CPU.
///
/// # Errors
/// Fails if the device reports an error from an earlier kernel.
pub fn release_cached_memory(device: Device) -> Result<()> {
    match device {
        // SAFETY: no pointers are involved.
        Device::Cuda(index) => ffi::check(unsafe { ffi::child_tuning_release_cached_memory(index as i32) }),
        _ => Ok(()),
    }
}

/// Seeds libtorch's generators of all devices (`torch.manual_seed`).
///
/// # Errors
/// Fails while work is recorded, and after an error of a device.
pub fn seed_generators(seed: u64) -> Result<()> {
    // SAFETY: no pointers are involved.
    ffi::check(unsafe { ffi::child_tuning_seed(seed) })
}

/// Waits until a CUDA device has done all that was asked of it; the CPU does it at once.
///
/// # Errors
/// Fails if there is no such device, or if it reports an error.
pub fn synchronize(device: Device) -> Result<()> {
    match device {
        // SAFETY: no pointers are involved.
        Device::Cuda(index) => ffi::check(unsafe { ffi::child_tuning_synchronize(index as i32) }),
        _ => Ok(()),
    }
}

/// Whether products of float32 matrices on a GPU may use TF32 while this value lives; afterwards it is as before.
///
/// TF32 rounds the factors to 10 bits of fraction and adds in float32 (`torch.backends.cuda.matmul.allow_tf32`). The
/// setting is libtorch's and holds for all GPUs of the process: threads that compute on them at once must agree on it.
/// Products on the CPU are float32 always, so there the setting stays as it is.
pub struct Tf32 {
    before: Option<bool>,
}

impl Tf32 {
    /// Allows TF32 for what runs on `device`, or forbids it also where the environment allows it.
    ///
    /// # Errors
    /// Fails if the process has set TF32 by two interfaces that contradict each other.
    pub fn allow(allowed: bool, device: Device) -> Result<Self> {
        let before = device.is_cuda().then(|| switch_tf32(allowed)).transpose()?;
        Ok(Self { before })
    }
}

impl Drop for Tf32 {
    fn drop(&mut self) {
        // The same switch worked before, so there is nothing to do about a failure.
        let _ = self.before.map(switch_tf32);
    }
}

/// Sets libtorch's switch and returns what it was. One thread at a time: libtorch changes several variables, and refuses
/// to read them while they differ.
fn switch_tf32(allowed: bool) -> Result<bool> {
    static SWITCH: Mutex<()> = Mutex::new(());
    let _alone = locked(&SWITCH);
    let mut before = false;
    // SAFETY: `before` is valid for writing during the call.
    ffi::check(unsafe { ffi::child_tuning_allow_tf32(allowed, &mut before) })?;
    Ok(before)
}

#[cfg(test)]
mod tests {
    use tch::{Cuda, Device, Kind, Tensor};

    use super::*;

    #[test]
    fn a_tensor_that_is_too_large_is_known_as_out_of_memory() {
        let too_large = Tensor::f_zeros([1 << 56], (Kind::Float, Device::Cpu)).unwrap_err();
        let error = crate::error::Error::from(too_large);
        assert!(error.is_out_of_memory(), "{error}");
        let mismatch = Tensor::zeros([2], (Kind::Float, Device::Cpu)).f_view([3]).unwrap_err();
        assert!(!crate::error::Error::from(mismatch).is_out_of_memory());
    }

    #[test]
    fn tf32_is_allowed_while_the_guard_lives() {
        let allowed = || {
            let before = switch_tf32(true).unwrap();
            switch_tf32(before).unwrap();
            before
        };
        // libtorch has the switch also where it finds no GPU.
        let gpu = Device::Cuda(0);
        let at_first = allowed();
        let outer = Tf32::allow(true, gpu).unwrap();
        assert!(allowed());
        let inner = Tf32::allow(false, gpu).unwrap();
        assert!(!allowed());
        let _on_the_cpu = Tf32::allow(true, Device::Cpu).unwrap();
        assert!(!allowed());
        drop(inner);
        assert!(allowed());
        drop(outer);
        assert_eq!(allowed(), at_first);
    }

    #[test]
    fn memory_of_a_device_that_is_not_there_is_an_error_and_not_a_crash() {
        let devices = Cuda::device_count() as usize;
        for device in 0..devices {
            let (free, total) = device_memory(device).unwrap();
            assert!(free <= total && total > 0);
        }
        assert!(device_memory(devices).is_err());
        release_cached_memory(Device::Cpu).unwrap();
        use_device(Device::Cpu).unwrap();
        assert!(use_device(Device::Cuda(devices)).is_err());
    }
}
