//! libtorch's version and its bookkeeping of device memory.

use std::ffi::CStr;

use super::ffi;
use crate::error::Result;

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
