//! The C interface of `shim.cpp`, and the one place where its messages become errors.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use torch_sys::C_tensor;

use crate::error::{Error, Result};

pub(super) type HookFunction =
    unsafe extern "C" fn(state: *mut c_void, gradient: *mut C_tensor) -> *mut c_char;

pub(super) type BackwardFunction = unsafe extern "C" fn(
    state: *mut c_void,
    gradients: *const *mut C_tensor,
    count: usize,
    results: *mut *mut C_tensor,
) -> *mut c_char;

pub(super) type ReleaseFunction = unsafe extern "C" fn(state: *mut c_void);

unsafe extern "C" {
    fn child_tuning_free_message(message: *mut c_char);

    pub(super) fn child_tuning_libtorch_version() -> *const c_char;

    pub(super) fn child_tuning_seed(seed: u64) -> *mut c_char;

    pub(super) fn child_tuning_synchronize(device: c_int) -> *mut c_char;

    pub(super) fn child_tuning_register_hook(
        tensor: *mut C_tensor,
        function: HookFunction,
        state: *mut c_void,
        release: ReleaseFunction,
        handle: *mut c_uint,
    ) -> *mut c_char;

    pub(super) fn child_tuning_remove_hook(tensor: *mut C_tensor, handle: c_uint) -> *mut c_char;

    pub(super) fn child_tuning_take_gradients(
        leaf: *mut C_tensor,
        function: HookFunction,
        state: *mut c_void,
        release: ReleaseFunction,
    ) -> *mut c_char;

    pub(super) fn child_tuning_leave_gradients(leaf: *mut C_tensor) -> *mut c_char;

    pub(super) fn child_tuning_own_backward(
        outputs: *const *mut C_tensor,
        output_count: usize,
        inputs: *const *mut C_tensor,
        input_count: usize,
        function: BackwardFunction,
        state: *mut c_void,
        release: ReleaseFunction,
    ) -> *mut c_char;

    pub(super) fn child_tuning_onednn_linear(
        input: *mut C_tensor,
        weight: *mut C_tensor,
        bias: *mut C_tensor,
        output: *mut *mut C_tensor,
    ) -> *mut c_char;

    pub(super) fn child_tuning_is_exclusive(tensor: *const C_tensor) -> bool;

    pub(super) fn child_tuning_launch(
        device: c_int,
        source: *const c_char,
        name: *const c_char,
        blocks: c_uint,
        threads: c_uint,
        arguments: *mut c_void,
    ) -> *mut c_char;

    pub(super) fn child_tuning_cuda_peak_bytes(device: c_int, bytes: *mut i64) -> *mut c_char;

    pub(super) fn child_tuning_cuda_reset_peak(device: c_int) -> *mut c_char;
}

/// Turns what a shim function returned into a result, and frees the message.
pub(super) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null message is a NUL-terminated string that the shim allocated for us.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: the message came from the shim and is not used after this line.
    unsafe { child_tuning_free_message(message) };
    Err(Error::Libtorch(text.lines().next().unwrap_or_default().to_owned()))
}

// ---- Measuring ----

/// Called once a name; times in nanoseconds.
pub(super) type ProfileRowFunction = unsafe extern "C" fn(
    state: *mut c_void,
    name: *const c_char,
    on_device: bool,
    calls: u64,
    total: u64,
    own: u64,
);

unsafe extern "C" {
    pub(super) fn child_tuning_profile_start() -> *mut c_char;

    pub(super) fn child_tuning_profile_stop(state: *mut c_void, row: ProfileRowFunction) -> *mut c_char;

    pub(super) fn child_tuning_device_memory(
        device: c_int,
        free_bytes: *mut u64,
        total_bytes: *mut u64,
    ) -> *mut c_char;

    pub(super) fn child_tuning_use_device(device: c_int) -> *mut c_char;

    pub(super) fn child_tuning_release_cached_memory(device: c_int) -> *mut c_char;
}

// ---- Computing on a GPU ----

unsafe extern "C" {
    pub(super) fn child_tuning_flash_attention(
        query: *mut C_tensor,
        key: *mut C_tensor,
        value: *mut C_tensor,
        query_counts: *mut C_tensor,
        token_counts: *mut C_tensor,
        most_queries: i64,
        most_tokens: i64,
        window: i64,
        dropout: f64,
        scale: f64,
        context: *mut *mut C_tensor,
    ) -> *mut c_char;

    pub(super) fn child_tuning_allow_tf32(allowed: bool, before: *mut bool) -> *mut c_char;

    pub(super) fn child_tuning_upload(
        host: *mut C_tensor,
        device: c_int,
        copy: *mut *mut C_tensor,
    ) -> *mut c_char;
}

// ---- CUDA graphs (cuda_graph.cpp) ----

unsafe extern "C" {
    pub(super) fn child_tuning_cuda_use_stream(device: c_int, own: bool) -> *mut c_char;

    pub(super) fn child_tuning_cuda_graph_begin(pool_of: *mut c_void, graph: *mut *mut c_void)
    -> *mut c_char;

    pub(super) fn child_tuning_cuda_graph_end(graph: *mut c_void) -> *mut c_char;

    pub(super) fn child_tuning_cuda_graph_replay(graph: *mut c_void) -> *mut c_char;

    pub(super) fn child_tuning_cuda_graph_free(graph: *mut c_void) -> *mut c_char;
}
