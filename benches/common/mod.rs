//! What the benchmarks have in common; the allocator is the program's.

use std::path::Path;

use child_tuning::model::Precision;
use tch::Device;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sets libtorch and the threads up as the program does, and returns the device that `cpu` or `cuda` names.
pub fn set_up(threads: usize, device: &str) -> Device {
    child_tuning::libtorch::with_a_considerate_environment();
    child_tuning::libtorch::keep_the_order_of_sums();
    let device = if device == "cpu" { Device::Cpu } else { Device::Cuda(0) };
    child_tuning::libtorch::use_threads(Some(threads), device);
    device
}

/// Reads token counts, one a line.
pub fn token_counts(path: &Path) -> anyhow::Result<Vec<usize>> {
    let text = std::fs::read_to_string(path)?;
    Ok(text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

/// Reads the name of a precision.
pub fn precision(text: &str) -> Result<Precision, serde_json::Error> {
    serde_json::from_value(text.into())
}
