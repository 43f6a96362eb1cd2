//! libtorch beyond tch: gradient hooks, kernels of our own, flash attention, typed memory, profiles.
//!
//! The C++ side (`shim.cpp`, `kernels.cpp`, and `cuda_graph.cpp` where CUDA's headers are) has a plain C interface; this module gives each
//! piece a safe type. It is the only place in the crate with `unsafe` code.

mod attention;
mod context;
mod cuda_graph;
mod embedding;
mod ffi;
mod gradient_place;
mod hooks;
mod kernels;
mod linear;
mod matrix_unit;
mod memory;
mod number;
mod own_backward;
mod process;
mod profile;
mod row_sums;
mod rows;

pub use attention::{FlashQueries, PackedLengths, flash_attention, flash_attention_runs};
pub use context::{
    Tf32, cuda_peak_bytes, device_memory, release_cached_memory, reset_cuda_peak, seed_generators,
    synchronize, use_device, version,
};
pub use cuda_graph::{CudaGraph, OwnStream};
pub use embedding::embedding;
pub(crate) use embedding::{add_to_entries, sums_of_entries};
pub use gradient_place::{GradientPlace, Operand};
pub use hooks::{AccumulationHook, GradientHook, panic_message};
// Kernels trust that the places and ends in their arguments are there, which this crate's callers see to.
pub use kernels::RandomMask;
pub(crate) use kernels::{
    AdamWConstants, Chosen, Stretch, collect, collects, mask_in_place, sums_of_squares, update,
};
pub use linear::{LinearOperands, linear, linears};
pub use matrix_unit::{MatrixUnit, SIDE, Step, has_matrix_unit, right_place};
pub use memory::{Element, elements, elements_mut, map_file, upload};
pub use number::Number;
pub use own_backward::{with_backward, with_backward_of_all};
pub use process::{
    OUTER_LIBRARY_PATH, end_now, keep_the_order_of_sums, keeping_ignored_signals, own_settings,
    release_freed_memory, survive_file_size_limits, use_threads, with_a_considerate_environment,
};
pub use profile::{Profile, ProfileRow, profile};
pub(crate) use row_sums::{add_squares_of_parts, lay_out, sums_of_parts};
pub use rows::{
    AddAndNorm, DropoutPattern, DropoutRows, activates, add_and_norm, drop_rows, gelu_after_bias, normalises,
};

use crate::error::Error;

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        // libtorch appends its own C++ stack; the first line is the message.
        let text = error.to_string();
        Error::Libtorch(text.lines().next().unwrap_or_default().to_owned())
    }
}
