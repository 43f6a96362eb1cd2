//! libtorch's global switches and its bookkeeping of device memory.

use std::ffi::CStr;

use super::ffi;
use crate::error::Result;

/// How float32 matrix products are computed on CUDA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float32Precision {
    /// In float32 throughout.
    Highest,
    /// In TF32 where the device has it.
    Tf32,
}

/// Returns the version of the libtorch that this program was compiled against, such as `2.11.0`.
pub fn version() -> String {
    // SAFETY: the shim returns a string literal.
    unsafe { CStr::from_ptr(ffi::child_tuning_libtorch_version()) }.to_string_lossy().into_owned()
}

/// Sets how float32 matrix products are computed, for the whole process.
pub fn set_float32_precision(precision: Float32Precision) -> Result<()> {
    let name = match precision {
        Float32Precision::Highest => c"highest",
        Float32Precision::Tf32 => c"high",
    };
    // SAFETY: the string is NUL-terminated and outlives the call.
    ffi::check(unsafe { ffi::child_tuning_set_float32_precision(name.as_ptr()) })
}

/// Asks libtorch for deterministic kernels where it has them, for the whole process.
pub fn set_deterministic(deterministic: bool) -> Result<()> {
    // SAFETY: no pointers are involved.
    ffi::check(unsafe { ffi::child_tuning_set_deterministic(deterministic) })
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
