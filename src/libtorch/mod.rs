//! libtorch beyond tch: gradient hooks, the fused AdamW kernel, typed memory.
//!
//! The C++ side is one translation unit (`shim.cpp`) with a plain C interface; this module gives each piece a safe
//! type. It is the only place in the crate with `unsafe` code.

mod context;
mod ffi;
mod hooks;
mod memory;
mod optimizer;
mod process;

pub use context::{cuda_peak_bytes, reset_cuda_peak, version};
pub use hooks::{GradientHook, HookedGradient, panic_message, set_gradient};
pub use memory::{elements, elements_mut, map_file};
pub use optimizer::{FusedAdamW, FusedGroup};
pub use process::{keep_freed_memory, keep_the_order_of_sums, with_a_considerate_environment};

use crate::error::Error;

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        // libtorch appends its own C++ stack; the first line is the message.
        let text = error.to_string();
        Error::Libtorch(text.lines().next().unwrap_or_default().to_owned())
    }
}
