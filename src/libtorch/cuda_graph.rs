//! Work of a GPU that is recorded once and started again with one launch.

use std::ffi::c_void;

use super::ffi;
use crate::error::Result;

/// Work on one GPU that was recorded by running it once.
pub struct CudaGraph(*mut c_void);

impl CudaGraph {
    /// Records what `work` asks of the current stream of this thread, which must be one of its own ([`OwnStream`]); nothing
    /// is computed. Memory that `work` allocates stays the graph's; graphs that are never replayed at the same time may share
    /// it by `sharing` one of them.
    ///
    /// Random numbers come from libtorch's generator of the device: a replay draws from where the generator stands then.
    /// `work` must not wait for the device, seed the generator, or read numbers back.
    ///
    /// # Errors
    /// Fails if `work` does, if it does what cannot be recorded, or if the program was built without the headers of CUDA.
    pub fn record<T>(sharing: Option<&Self>, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let mut graph = std::ptr::null_mut();
        let pool_of = sharing.map_or(std::ptr::null_mut(), |other| other.0);
        // SAFETY: `pool_of` is null or a live graph, and `graph` is valid for writing during the call.
        ffi::check(unsafe { ffi::child_tuning_cuda_graph_begin(pool_of, &mut graph) })?;
        let recorded = Self(graph);
        let outcome = work();
        // Recording must end in any case, or nothing else would run on the device.
        // SAFETY: the graph is live and recording.
        let ended = ffi::check(unsafe { ffi::child_tuning_cuda_graph_end(graph) });
        if let Err(error) = ended {
            // By the rule of the shim.
            std::mem::forget(recorded);
            return Err(outcome.err().unwrap_or(error));
        }
        Ok((recorded, outcome?))
    }

    /// Starts the work. The host does not wait for it.
    ///
    /// # Errors
    /// Fails if the device reports an error.
    pub fn replay(&self) -> Result<()> {
        // SAFETY: the graph is live, and its recording ended well.
        ffi::check(unsafe { ffi::child_tuning_cuda_graph_replay(self.0) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: the graph was made by `record` and is freed once. A failure leaves nothing to do.
        let _ = ffi::check(unsafe { ffi::child_tuning_cuda_graph_free(self.0) });
    }
}

/// While this value lives, this thread works on a stream of its own on a GPU: the default stream cannot be recorded.
pub struct OwnStream(usize);

impl OwnStream {
    /// Waits for the device and changes to a stream of its own.
    ///
    /// # Errors
    /// Fails if there is no such device, or if the program was built without the headers of CUDA.
    pub fn enter(device: usize) -> Result<Self> {
        // SAFETY: no pointers are involved.
        ffi::check(unsafe { ffi::child_tuning_cuda_use_stream(device as i32, true) })?;
        Ok(Self(device))
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: as in `enter`. It succeeded before, so there is nothing to do about a failure.
        let _ = ffi::check(unsafe { ffi::child_tuning_cuda_use_stream(self.0 as i32, false) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_a_graph_is_an_error_and_not_a_crash() {
        if tch::Cuda::device_count() == 0 {
            assert!(OwnStream::enter(0).is_err());
            assert!(CudaGraph::record(None, || Ok(())).is_err());
        }
    }
}
