//! The weights of model folders in every format, well-formed and hostile.

mod formats;
mod hostile_archives;
mod hostile_pickles;
mod hostile_safetensors;
mod mutations;
mod support;
