//! How much memory training takes, and how much there is.

use std::fs;

use tch::Device;

use super::hyperparameters::{Checkpoint, Freeze, Hyperparameters, OptimizerRule};
use crate::error::Result;
use crate::libtorch::device_memory;
use crate::model::{ModelShape, Precision};

/// Bytes of a float32 number.
const FLOAT: f64 = 4.0;

/// What of a run takes memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryUse {
    /// Weights, gradients, moments and copies of weights, whatever the batch.
    pub fixed: f64,
    /// What backward needs of one token: a number for each hidden unit and each time that something is kept of it.
    per_token: f64,
    /// What attention keeps of one pair of positions of one example.
    per_pair: f64,
}

impl MemoryUse {
    /// Estimates the memory of a run. `trained` is the number of weights with moments.
    pub fn new(shape: &ModelShape, settings: &Hyperparameters, trained: usize, device: Device) -> Self {
        let frozen = settings.freeze == Freeze::Encoder;
        let half = settings.precision == Precision::Bf16 && !frozen;
        let (weights, size) = (shape.weights as f64, if half { 2.0 } else { FLOAT });
        // The values, and those to start from for the next seed.
        let mut fixed = 2.0 * FLOAT * weights;
        if settings.optimizer == OptimizerRule::Adamw {
            fixed += 2.0 * FLOAT * trained as f64;
        }
        if settings.checkpoint == Checkpoint::Best {
            fixed += FLOAT * weights;
        }
        if half {
            fixed += 2.0 * shape.layer_weights as f64;
        }
        if frozen {
            return Self { fixed, per_token: 0.0, per_pair: 0.0 };
        }
        if !settings.release_gradients {
            fixed += FLOAT * weights;
        }
        // The largest gradient on its way: that of the embedding table, which backward makes anew.
        fixed += FLOAT * shape.embedding_weights as f64;
        let (hidden, intermediate) = (shape.hidden as f64, shape.intermediate as f64);
        let flash = device.is_cuda() && half;
        // Of a layer: its input, query, key, value, context and its projection's dropout, two inputs and an output of
        // normalisations, the feed-forward layer before and after its activation, and its dropout. On the CPU query,
        // key and value are kept padded, which is counted here as half as many tokens again.
        let padded = if flash { 4.0 } else { 6.0 };
        let layer = size * (hidden * (7.0 + padded) + 2.0 * intermediate);
        // Of attention in the open: probabilities, the pattern of dropout, and their product.
        let pair = if device.is_cuda() { 0.0 } else { 3.0 * size * shape.heads as f64 };
        let layers = shape.layers as f64;
        let (kept, whole) = match settings.gradient_checkpointing {
            true => (size * hidden * layers, 1.0),
            false => (0.0, layers),
        };
        Self { fixed, per_token: kept + whole * layer, per_pair: whole * pair }
    }

    /// Returns the bytes of activations of a pass over examples of the given lengths.
    pub fn of_pass(&self, lengths: &[usize]) -> f64 {
        let longest = lengths.iter().copied().max().unwrap_or(0) as f64;
        let tokens = lengths.iter().sum::<usize>() as f64;
        tokens * self.per_token + lengths.len() as f64 * longest * longest * self.per_pair
    }

    /// Returns the largest number of examples, at most `batch_size`, whose activations fit into `bytes` whichever
    /// examples they are, halving from `batch_size` down; at least one.
    pub fn micro_batch(&self, lengths: &[usize], batch_size: usize, bytes: f64) -> usize {
        let mut longest = lengths.to_vec();
        longest.sort_unstable_by(|left, right| right.cmp(left));
        let mut examples = batch_size.min(longest.len()).max(1);
        while examples > 1 && self.of_pass(&longest[..examples]) > bytes {
            examples = examples.div_ceil(2);
        }
        examples
    }
}

/// Returns the bytes of memory that this process may still take: of the device on CUDA; elsewhere of the machine, within
/// the limit of the control group. `None` where the system does not say.
///
/// # Errors
/// Fails if libtorch cannot ask the device.
pub fn available_memory(device: Device) -> Result<Option<u64>> {
    if let Device::Cuda(index) = device {
        return Ok(Some(device_memory(index)?.0));
    }
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .zip(number("/sys/fs/cgroup/memory.current"))
        .map(|(limit, used)| limit.saturating_sub(used));
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    Ok([group, machine].into_iter().flatten().min())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ModelShape = ModelShape {
        weights: 1000,
        embedding_weights: 100,
        layer_weights: 800,
        matrix_weights: 700,
        layers: 2,
        hidden: 8,
        intermediate: 32,
        heads: 2,
    };

    #[test]
    fn the_longest_examples_decide_the_micro_batch() {
        let memory = MemoryUse::new(&SHAPE, &Hyperparameters::default(), 1000, Device::Cpu);
        let lengths = [3, 50, 4, 100, 5];
        let enough = |examples: &[usize]| memory.of_pass(examples) + 1.0;
        assert_eq!(memory.micro_batch(&lengths, 4, enough(&[100, 50, 5, 4])), 4);
        assert_eq!(memory.micro_batch(&lengths, 4, enough(&[100, 50, 5])), 2);
        assert_eq!(memory.micro_batch(&lengths, 4, enough(&[100])), 1);
        assert_eq!(memory.micro_batch(&lengths, 4, 0.0), 1, "one example always runs, or fails");
        assert_eq!(memory.micro_batch(&lengths, 16, f64::INFINITY), 5);
    }

    #[test]
    fn what_saves_memory_takes_less() {
        let settings = Hyperparameters::default();
        let of = |settings: &Hyperparameters, trained| MemoryUse::new(&SHAPE, settings, trained, Device::Cpu);
        let whole = of(&settings, 1000);
        let released = of(&Hyperparameters { release_gradients: true, ..settings.clone() }, 1000);
        assert_eq!(whole.fixed - released.fixed, 4000.0);
        assert_eq!(whole.fixed - of(&settings, 300).fixed, 8.0 * 700.0);
        let checkpointed = of(&Hyperparameters { gradient_checkpointing: true, ..settings }, 1000);
        assert!(checkpointed.of_pass(&[10, 20]) < whole.of_pass(&[10, 20]));
        assert_eq!(checkpointed.fixed, whole.fixed);
    }
}
