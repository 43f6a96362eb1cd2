//! How much memory training takes, and how much there is.

use std::fs;

use tch::Device;

use super::hyperparameters::{Checkpoint, Freeze, Hyperparameters, MicroBatch, OptimizerRule};
use crate::data::{AttentionLayout, EncodedDataset};
use crate::error::Result;
use crate::libtorch::{device_memory, release_cached_memory};
use crate::model::{Classifier, ModelShape, Precision};

/// Bytes of a float32 number.
const FLOAT: f64 = 4.0;

/// What of a run takes memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MemoryUse {
    /// Weights, gradients, moments and copies of weights, whatever the batch.
    pub fixed: f64,
    /// Bytes that backward needs of one token.
    per_token: f64,
    /// Bytes that attention keeps of one position of its rectangles.
    per_position: f64,
    /// Bytes that attention keeps of one pair of positions of one example.
    per_pair: f64,
    /// The width of the states that attention reads.
    hidden: usize,
    device: Device,
}

impl MemoryUse {
    /// Estimates the memory of training. `trained` is the number of weights with moments.
    pub fn new(shape: &ModelShape, settings: &Hyperparameters, trained: usize, device: Device) -> Self {
        let frozen = settings.freeze == Freeze::Encoder;
        let half = settings.precision == Precision::Bf16 && !frozen;
        let weights = FLOAT * shape.weights as f64;
        let mut fixed = held(shape, half);
        if settings.optimizer == OptimizerRule::Adamw {
            fixed += 2.0 * FLOAT * trained as f64;
        }
        if settings.checkpoint == Checkpoint::Best {
            fixed += weights;
        }
        if frozen {
            let (per_token, per_position, per_pair) = (0.0, 0.0, 0.0);
            return Self { fixed, per_token, per_position, per_pair, hidden: shape.hidden, device };
        }
        if !settings.release_gradients {
            fixed += weights;
        }
        if device.is_cuda() {
            // Gradients on their way, of which that of the embedding table is the largest where it does not go to its place, and what
            // products work with: with it forecasts are 0.97 to 1.01 of what an H100 had in use. On the CPU that gradient consists
            // of the rows that the batch uses.
            fixed += FLOAT * shape.embedding_weights as f64;
        }
        Self::with_activations(shape, fixed, half, settings.gradient_checkpointing, device)
    }

    /// Adds what a method keeps, and the activations of as many passes as a step goes backward through at once.
    pub fn with_method(self, bytes: usize, passes: usize) -> Self {
        let passes = passes as f64;
        Self {
            fixed: self.fixed + bytes as f64,
            per_token: passes * self.per_token,
            per_position: passes * self.per_position,
            per_pair: passes * self.per_pair,
            ..self
        }
    }

    /// Estimates the memory of a pass for the Fisher information of single examples.
    pub fn of_fisher_pass(shape: &ModelShape, precision: Precision, device: Device) -> Self {
        let half = precision == Precision::Bf16;
        let sums = FLOAT * shape.weights as f64;
        Self::with_activations(shape, held(shape, half) + sums, half, false, device)
    }

    fn with_activations(
        shape: &ModelShape,
        fixed: f64,
        half: bool,
        checkpointed: bool,
        device: Device,
    ) -> Self {
        let (hidden, intermediate) = (shape.hidden as f64, shape.intermediate as f64);
        let (heads, layers, whole) = (shape.heads as f64, shape.layers as f64, shape.whole_layers as f64);
        let size = if half { 2.0 } else { FLOAT };
        let flash = device.is_cuda() && half && shape.reads_packed_tokens;
        // Of a layer: its input, the context that its projection reads, an input and an output of the normalisation
        // between, the input of the one at the end, and the feed-forward layer before and after its activation.
        let token = size * (hidden * 5.0 + 2.0 * intermediate);
        // Query, key and value, laid out in rectangles unless attention reads packed tokens.
        let (token, position) = match flash {
            true => (token + size * 3.0 * hidden, 0.0),
            // Beside what libtorch's attention returns and the bias, some that it does not show: measured on an H100.
            false if device.is_cuda() && shape.reads_packed_tokens => (token, size * 8.5 * hidden),
            false => (token, size * 3.0 * hidden),
        };
        // Of attention in the open: the probabilities before and after dropout. On a GPU scores that depend on both tokens,
        // and a copy of them that is padded.
        let (pair, pair_gradients) = match device.is_cuda() {
            true if shape.reads_packed_tokens => (0.0, 0.0),
            true => (2.0 * size * heads, size * heads),
            false => (2.0 * size * heads, 3.0 * size * heads),
        };
        // A layer that computes one token of each example keeps its input, keys and values.
        let inputs = size * hidden * layers;
        let (kept, kept_of_positions, whole) = match checkpointed {
            true => (inputs, 0.0, 1.0),
            false => (inputs - size * hidden * whole, (layers - whole) * 2.0 / 3.0 * position, whole),
        };
        // And the gradients of one layer while backward is in it.
        let token_gradients = size * (3.0 * hidden + 2.0 * intermediate);
        Self {
            fixed,
            per_token: kept + whole * token + token_gradients,
            per_position: kept_of_positions + whole * position,
            per_pair: whole * pair + pair_gradients,
            hidden: shape.hidden,
            device,
        }
    }

    /// Returns the bytes of activations of a pass over examples of the given lengths.
    pub fn of_pass(&self, lengths: &[usize]) -> f64 {
        let tokens = lengths.iter().sum::<usize>() as f64;
        let (positions, pairs) = AttentionLayout::area(lengths, self.hidden, self.device);
        tokens * self.per_token + positions as f64 * self.per_position + pairs as f64 * self.per_pair
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

/// Returns the examples of one pass of training, as the run says, or as many as fit into the memory that is left, for as many
/// passes as a step goes backward through at once. Gradients are there already, and on a GPU the optimizer's state of
/// `state_bytes`; on the CPU it is still to come.
///
/// # Errors
/// Fails if the memory of the device cannot be asked for.
pub fn micro_batch_of_training(
    classifier: &Classifier,
    data: &EncodedDataset,
    hyperparameters: &Hyperparameters,
    passes_held: usize,
    state_bytes: usize,
) -> Result<usize> {
    let (shape, device) = (classifier.own_shape()?, classifier.parameters.device());
    // Recorded passes keep their memory for themselves, beside those that run as they come.
    let records =
        device.is_cuda() && hyperparameters.cuda_graphs && hyperparameters.recording_obstacle().is_none();
    let passes = if records { 2 * passes_held } else { passes_held };
    let memory = MemoryUse::new(&shape, hyperparameters, 0, device).with_method(0, passes);
    // Moments of zero are not in memory before the first step: the system has only promised it.
    let promised = if device.is_cuda() { 0.0 } else { state_bytes as f64 };
    let best = match hyperparameters.checkpoint {
        Checkpoint::Best => FLOAT * shape.weights as f64,
        Checkpoint::Last => 0.0,
    };
    micro_batch(&memory, data, hyperparameters, promised + best)
}

/// Returns the examples of one pass of the preparation of a method, as the run says, or as many as fit.
///
/// # Errors
/// Fails if the memory of the device cannot be asked for.
pub fn micro_batch_of_preparation(
    classifier: &Classifier,
    data: &EncodedDataset,
    hyperparameters: &Hyperparameters,
) -> Result<usize> {
    let (shape, device) = (classifier.own_shape()?, classifier.parameters.device());
    let memory = MemoryUse::of_fisher_pass(&shape, hyperparameters.precision, device);
    micro_batch(&memory, data, hyperparameters, 0.0)
}

/// Returns the examples of one pass beside which `later` bytes will be needed.
fn micro_batch(
    memory: &MemoryUse,
    data: &EncodedDataset,
    hyperparameters: &Hyperparameters,
    later: f64,
) -> Result<usize> {
    let batch_size = hyperparameters.batch_size;
    if let MicroBatch::Examples(examples) = hyperparameters.micro_batch {
        return Ok(examples);
    }
    let Some(available) = available_memory(memory.device)? else { return Ok(batch_size) };
    // Some of it for others, and for what the estimate does not know.
    Ok(memory.micro_batch(&data.lengths(), batch_size, 0.8 * (available as f64 - later)))
}

/// Bytes of the values, of those to start from for the next seed, and of the encoder's copy in bfloat16.
fn held(shape: &ModelShape, half: bool) -> f64 {
    let copy = if half { 2.0 * shape.layer_weights as f64 } else { 0.0 };
    2.0 * FLOAT * shape.weights as f64 + copy
}

/// Returns the bytes of memory that this process may still take: of the device on CUDA; elsewhere of the machine, within
/// the limit of the control group. `None` where the system does not say.
///
/// # Errors
/// Fails if libtorch cannot ask the device.
pub fn available_memory(device: Device) -> Result<Option<u64>> {
    if let Device::Cuda(index) = device {
        // What earlier runs have left in libtorch's cache is free, too.
        release_cached_memory(device)?;
        return Ok(Some(device_memory(index)?.0));
    }
    let machine = number_behind("/proc/meminfo", "MemAvailable:").map(|kilobytes| kilobytes * 1024);
    let groups = CONTROL_GROUPS.iter().map(ControlGroup::available);
    Ok(groups.chain([machine]).flatten().min())
}

/// Where a version of Linux' control groups says how much memory a container may have and has.
struct ControlGroup {
    limit: &'static str,
    used: &'static str,
    details: &'static str,
    /// What the details call copies of files that nobody has looked at lately, and that make room when it is needed.
    reclaimable: &'static str,
}

const CONTROL_GROUPS: [ControlGroup; 2] = [
    ControlGroup {
        limit: "/sys/fs/cgroup/memory.max",
        used: "/sys/fs/cgroup/memory.current",
        details: "/sys/fs/cgroup/memory.stat",
        reclaimable: "inactive_file",
    },
    ControlGroup {
        limit: "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        used: "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        details: "/sys/fs/cgroup/memory/memory.stat",
        reclaimable: "total_inactive_file",
    },
];

impl ControlGroup {
    /// Returns the bytes that are left; `None` where there is no limit.
    fn available(&self) -> Option<u64> {
        let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let (limit, used) = (number(self.limit)?, number(self.used)?);
        let reclaimable = number_behind(self.details, self.reclaimable).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
    }
}

/// Returns the number behind a word at the beginning of a line of a file.
fn number_behind(path: &str, word: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next()? == word).then(|| words.next()?.parse().ok()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: ModelShape = ModelShape {
        weights: 1000,
        embedding_weights: 100,
        vocabulary: 10,
        layer_weights: 800,
        matrix_weights: 700,
        layers: 2,
        whole_layers: 1,
        hidden: 8,
        intermediate: 32,
        heads: 2,
        reads_packed_tokens: true,
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
