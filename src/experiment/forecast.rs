//! What an experiment will cost in time and memory, before it is started.
//!
//! A run's time is its arithmetic over the measured rate of matrix products, plus the passes over parameters, gradients
//! and moments that every step makes, over the measured speed of memory. The machine is measured for a moment, so that the
//! forecast is of the machine that it is made on; it is meant to tell minutes from days.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::cost::{MethodCost, method_cost};
use super::machine;
use super::resident::Tokens;
use super::run::Run;
use super::training_set::training_set;
use crate::data::EncodedDataset;
use crate::error::Result;
use crate::model::{Classifier, Labels, ModelShape, Precision, words_among};
use crate::statistics::median;
use crate::train::MemoryUse;

/// Share of the rate of one large matrix product that training reaches in all.
const EFFICIENCY: f64 = 0.75;
/// Bytes of parameters, gradients and moments that a step moves for each weight: zero, clip, update.
const STEP_BYTES: f64 = 64.0;
/// Seconds that a step takes besides: hundreds of small kernels.
const STEP_SECONDS: f64 = 0.004;
/// Batches whose memory is estimated, of each epoch and in all: the largest of more is hardly larger.
const BATCHES_LOOKED_AT: usize = 200;

/// Cost of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Seconds, preparation, training and scoring together.
    pub seconds: f64,
    /// Most memory held, in bytes: of the process on the CPU, of the device on CUDA.
    pub memory: f64,
}

/// How fast this machine is.
pub struct Speed {
    /// Floating-point operations a second in matrix products, in float32, TF32 and bfloat16.
    operations: [f64; 3],
    /// Bytes a second that a copy reads and writes.
    bytes: f64,
    device: Device,
    /// What a process holds before a model is loaded: libtorch and its buffers, and data; on the device nothing.
    held_before: u64,
}

impl Speed {
    /// Measures a device for a fraction of a second.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn measure(device: Device) -> Result<Self> {
        let rate = |precision: Precision| -> Result<f64> {
            let [rows, width] = [1024, 768];
            let _products = precision.matrix_products(device)?;
            let kind = precision.kind();
            let left = Tensor::f_ones([rows, width], (kind, device))?;
            let right = Tensor::f_ones([width, width], (kind, device))?;
            let seconds = repeated(device, || Ok(left.f_matmul(&right)?))?;
            Ok(2.0 * (rows * width * width) as f64 / seconds)
        };
        let operations = [rate(Precision::Float32)?, rate(Precision::Tf32)?, rate(Precision::Bf16)?];
        let held_before = if device.is_cuda() { 0 } else { machine::resident_memory().unwrap_or(0) };
        let elements = 16 << 20;
        let source = Tensor::f_ones([elements], (Kind::Float, device))?;
        let mut target = source.f_zeros_like()?;
        let copied = repeated(device, || {
            target.f_copy_(&source)?;
            Ok(target.shallow_clone())
        })?;
        Ok(Self { operations, bytes: 8.0 * elements as f64 / copied, device, held_before })
    }

    fn operations(&self, precision: Precision) -> f64 {
        let [float32, tf32, bf16] = self.operations;
        EFFICIENCY
            * match precision {
                Precision::Float32 => float32,
                Precision::Tf32 => tf32,
                Precision::Bf16 => bf16,
            }
    }
}

/// Returns the median seconds of an operation over a tenth of a second.
fn repeated(device: Device, mut operation: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut times = Vec::new();
    let begun = Instant::now();
    while times.len() < 3 || begun.elapsed().as_millis() < 100 {
        let started = Instant::now();
        let output = operation()?;
        if device.is_cuda() {
            // Reading a number waits for the device.
            let _ = output.f_flatten(0, -1)?.f_double_value(&[0])?;
        }
        times.push(started.elapsed().as_secs_f64());
    }
    Ok(median(&times).unwrap_or(0.0))
}

/// Tells what a run will cost.
///
/// # Errors
/// Fails if the family does not run here or the data cannot be made into tokens.
pub fn forecast(run: &Run, tokens: &mut Tokens, speed: &Speed) -> Result<Forecast> {
    let settings = &run.hyperparameters;
    let shape = Classifier::shape(&run.model.folder.config, &Labels::from(&run.task.card.objective))?;
    let train = tokens.of(&run.model, &run.task.train.dataset, settings.max_length)?;
    let share = run.training_examples() as f64 / train.len() as f64;
    let epoch = share * forward_operations(&shape, &train);
    let steps = run.total_steps() as f64;
    let rate = speed.operations(settings.precision);
    let weights = shape.weights as f64;
    let cost = method_cost(run)?;

    let mut seconds = 0.0;
    for evaluated in run.evaluations.iter() {
        let data = tokens.of(&run.model, &evaluated.on.dataset, settings.max_length)?;
        seconds += forward_operations(&shape, &data) / rate;
    }
    match run.is_frozen() {
        true => seconds += forward_operations(&shape, &train) / rate + steps * STEP_SECONDS / 10.0,
        false => {
            let mut training = steps * (STEP_BYTES * weights / speed.bytes + STEP_SECONDS);
            training += 3.0 * epoch * settings.epochs * cost.passes as f64 / rate;
            seconds += if cost.fine_tunes_first { 2.0 * training } else { training };
            // A pass whose weight gradients are float32 always.
            let passed = cost.examples_prepared as f64;
            let pass = epoch * (2.0 / rate + 1.0 / speed.operations(Precision::Float32));
            seconds += pass * passed / run.training_examples().max(1) as f64;
        }
    }
    let memory = memory(run, &shape, &cost, &*training_set(&train, run)?, speed)?;
    Ok(Forecast { seconds, memory })
}

/// Bytes that a run holds at most, which trains on these examples.
fn memory(
    run: &Run,
    shape: &ModelShape,
    cost: &MethodCost,
    train: &EncodedDataset,
    speed: &Speed,
) -> Result<f64> {
    let settings = &run.hyperparameters;
    // A first training has no mask.
    let trained = if cost.fine_tunes_first { shape.weights } else { cost.trainable };
    let trained = trained.saturating_sub(idle_weights(run, shape, train)?);
    let memory = MemoryUse::new(shape, settings, trained, speed.device)
        .with_method(cost.method_bytes, run.method.parts().passes_held());
    let passes = lengths_of_passes(run, train);
    let largest = passes.iter().map(|lengths| memory.of_pass(lengths)).fold(0.0, f64::max);
    let training = memory.fixed + largest.max(scoring_bytes(shape));
    Ok(speed.held_before as f64 + training.max(fisher_bytes(run, shape, train, speed.device)))
}

/// Counts the weights that train but have no moments, since they are of words that no example has; with a fixed child network it
/// forecasts them all.
fn idle_weights(run: &Run, shape: &ModelShape, train: &EncodedDataset) -> Result<usize> {
    let table = run.declared()?;
    let words = words_among(table.iter(), shape.vocabulary);
    let words = words.filter(|words| run.method.trains(words, shape.layers) && !run.is_frozen());
    let Some(words) = words else { return Ok(0) };
    let has_child = run.method.fixed_share(table.as_slice())?.is_some();
    if has_child || run.method.parts().reach_gradients() {
        return Ok(0);
    }
    let absent = shape.vocabulary.saturating_sub(train.vocabulary().len());
    Ok(absent * words.shape[1] as usize)
}

/// Bytes of the pass that a method begins with, if it does, over batches of examples of similar length.
fn fisher_bytes(run: &Run, shape: &ModelShape, train: &EncodedDataset, device: Device) -> f64 {
    let settings = &run.hyperparameters;
    let passed = run.method.examples_passed(run.training_examples());
    if passed == 0 {
        return 0.0;
    }
    let mut lengths = train.lengths();
    lengths.sort_unstable_by(|left, right| right.cmp(left));
    lengths.truncate(passed.min(settings.batch_size));
    let memory = MemoryUse::of_fisher_pass(shape, settings.precision, device);
    memory.fixed + memory.of_pass(&lengths)
}

/// Returns the lengths of the examples of each pass, for the first batches that the run will train on.
fn lengths_of_passes(run: &Run, train: &EncodedDataset) -> Vec<Vec<usize>> {
    let settings = &run.hyperparameters;
    let lengths = train.lengths();
    let steps = (run.total_steps() as usize).min(BATCHES_LOOKED_AT);
    let epochs = steps.div_ceil(lengths.len().div_ceil(settings.batch_size).max(1));
    let pass = settings.micro_batch.at_most(settings.batch_size);
    let mut passes = Vec::new();
    for epoch in 0..epochs {
        let order = settings.order.of_epoch(lengths.len(), run.seed, epoch);
        for batch in order.chunks(settings.batch_size).take(BATCHES_LOOKED_AT) {
            let of_pass = |numbers: &[usize]| numbers.iter().map(|&number| lengths[number]).collect();
            passes.extend(batch.chunks(pass).map(of_pass));
        }
    }
    passes
}

/// Operations of one forward pass over a data set.
fn forward_operations(shape: &ModelShape, data: &EncodedDataset) -> f64 {
    let per_example = |tokens: f64| {
        tokens * (2 * shape.matrix_weights) as f64
            + 4.0 * tokens * tokens * (shape.whole_layers * shape.hidden) as f64
    };
    data.inputs.iter().map(|input| per_example(input.ids.len() as f64)).sum()
}

/// Bytes of one layer's activations while examples are scored.
fn scoring_bytes(shape: &ModelShape) -> f64 {
    crate::train::TOKENS_PER_BATCH as f64 * 12.0 * shape.hidden as f64 * 4.0
}
