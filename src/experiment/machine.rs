//! The machine that a run runs on: its name and its memory.

use std::fs;
use std::sync::OnceLock;

use tch::Device;

use crate::libtorch;

/// Returns the device with the name of its processor, such as `cpu (AMD EPYC, 2 threads)`.
pub fn device_name(device: Device) -> String {
    /// NVIDIA's tool takes up to seconds, and every row names the device.
    static CARDS: OnceLock<Vec<String>> = OnceLock::new();
    match device {
        Device::Cuda(index) => match CARDS.get_or_init(graphics_cards).get(index) {
            Some(name) => format!("cuda:{index} ({name})"),
            None => format!("cuda:{index}"),
        },
        _ => {
            let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let model = text
                .lines()
                .find(|line| line.starts_with("model name"))
                .and_then(|line| line.split(':').nth(1));
            format!("cpu ({}, {} threads)", model.unwrap_or("unknown").trim(), tch::get_num_threads())
        }
    }
}

/// Returns a device's name without its number, which says nothing about its speed.
pub fn device_kind(name: &str) -> &str {
    name.split_once(" (").map_or(name, |(_, kind)| kind)
}

/// Returns the names of the graphics cards that CUDA sees, as NVIDIA's tool lists them; empty without driver or tool.
pub fn graphics_cards() -> Vec<String> {
    let mut question = std::process::Command::new("nvidia-smi");
    question.args(["--query-gpu=name", "--format=csv,noheader"]);
    // The tool itself lists all.
    if let Ok(visible) = std::env::var("CUDA_VISIBLE_DEVICES") {
        question.arg(format!("--id={visible}"));
    }
    match question.output() {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_owned()).collect()
        }
        _ => Vec::new(),
    }
}

/// Starts a new measurement for [`peak_memory`], where the system allows it.
pub fn reset_peak_memory(device: Device) {
    match device {
        Device::Cuda(index) => {
            // Only a measurement is at stake: where this fails, the peak is that of the process so far.
            let _ = libtorch::reset_cuda_peak(index);
        }
        _ => {
            // Writing 5 makes Linux forget the process's high-water mark.
            let _ = fs::write("/proc/self/clear_refs", "5");
        }
    }
}

/// Returns the largest amount of memory in use since the last [`reset_peak_memory`], in bytes: of the device on CUDA, of
/// the process on the CPU.
pub fn peak_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cuda(index) => libtorch::cuda_peak_bytes(index).ok(),
        _ => of_process("VmHWM:"),
    }
}

/// Returns the memory that this process holds now, in bytes.
pub fn resident_memory() -> Option<u64> {
    of_process("VmRSS:")
}

fn of_process(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}
