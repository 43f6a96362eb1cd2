//! The grid of hyper-parameters: lists multiplied out, and what is left to the preset filled in.

use super::spec::TrainSpec;
use crate::error::{Error, Result};
use crate::method::{MaskKind, Method, Preset};
use crate::model::Precision;
use crate::train::{AdamWForm, Freeze, Hyperparameters, MicroBatch, Warmup};
use crate::values::OneOrMany;

/// One point of the grid, still without the parts that depend on the method.
#[derive(Clone, Debug, Default)]
pub struct GridPoint {
    hyperparameters: Hyperparameters,
    micro_batch: Option<MicroBatch>,
    warmup: Option<Warmup>,
    adamw: Option<AdamWForm>,
    cuda_graphs: Option<bool>,
    /// Size of the subset of the training data.
    pub examples: Option<usize>,
    /// Share of the training labels that are replaced.
    pub label_noise: f64,
}

impl GridPoint {
    /// Multiplies out the lists of a stage that follows this point, which gives what they leave out; what this point
    /// does to its training data is its own.
    ///
    /// # Errors
    /// Fails if there are more than anyone means.
    pub fn next_stage(&self, typed: Option<&TrainSpec>) -> Result<Vec<GridPoint>> {
        let start = GridPoint { examples: None, label_noise: 0.0, ..self.clone() };
        match typed {
            Some(typed) => grid(typed, start),
            None => Ok(vec![start]),
        }
    }

    /// Settles what depends on the method.
    ///
    /// # Errors
    /// Fails, naming the keys, if sizes contradict each other.
    pub fn settle(&self, method: &dyn Method, preset: Preset, freeze: Freeze) -> Result<Hyperparameters> {
        let mut hyperparameters = self.hyperparameters.clone();
        let official = preset == Preset::Official;
        // The released F and D skip the warm-up that their command asks for; its vanilla path has it.
        let warmup = if official && method.is_child_tuning() { 0.0 } else { 0.1 };
        hyperparameters.warmup = self.warmup.unwrap_or(Warmup(warmup));
        hyperparameters.adamw =
            self.adamw.unwrap_or(if official { AdamWForm::HfLegacy } else { AdamWForm::Torch });
        let batch_size = hyperparameters.batch_size;
        hyperparameters.micro_batch = self.micro_batch.unwrap_or(MicroBatch::Examples(batch_size));
        hyperparameters.freeze = freeze;
        if let MicroBatch::Examples(micro_batch) = hyperparameters.micro_batch
            && micro_batch > batch_size
        {
            return Err(Error::configuration(format!(
                "train.micro_batch {micro_batch} is larger than train.batch_size {batch_size}"
            )));
        }
        if hyperparameters.epochs > MOST_EPOCHS {
            return Err(Error::configuration(format!(
                "train.epochs is {}; more than {MOST_EPOCHS} are not supported",
                hyperparameters.epochs
            )));
        }
        hyperparameters.cuda_graphs = self.cuda_graphs.unwrap_or(true);
        if self.cuda_graphs == Some(true)
            && let Some(obstacle) = recording_obstacle(&hyperparameters, method)
        {
            return Err(Error::configuration(format!("train.cuda_graphs: {obstacle}")));
        }
        let noise = method.parts().hidden_noise.filter(|_| hyperparameters.precision == Precision::Bf16);
        if let Some(noise) = noise.filter(|noise| noise.scale < FINEST_BF16_NOISE) {
            return Err(Error::configuration(format!(
                "hype: noise of {} is lost in bf16, which cannot tell it from none on hidden states of about 1; set \
                 `train.precision: float32` (or `tf32`), or `scale: {FINEST_BF16_NOISE}` or more",
                noise.scale
            )));
        }
        if let Some(obstacle) = release_obstacle(&hyperparameters, method) {
            return Err(Error::configuration(format!(
                "train.release_gradients frees each gradient as soon as it is used, but {obstacle}"
            )));
        }
        Ok(hyperparameters)
    }
}

/// More than anyone trains, and little enough that steps can be counted.
const MOST_EPOCHS: f64 = 1e6;

/// Of finer noise on numbers around 1, rounding to bfloat16 (steps of 2⁻⁸ and 2⁻⁷) leaves next to nothing.
const FINEST_BF16_NOISE: f64 = 2e-3;

/// Returns why gradients that are to be released in backward cannot be.
fn release_obstacle(hyperparameters: &Hyperparameters, method: &dyn Method) -> Option<&'static str> {
    let parts = method.parts();
    let whole = hyperparameters.micro_batch == MicroBatch::Examples(hyperparameters.batch_size);
    match hyperparameters.max_gradient_norm {
        _ if !hyperparameters.release_gradients => None,
        Some(_) => Some("clipping needs all gradients at once: set `train.max_gradient_norm: 0`"),
        None if !whole => Some("micro-batches add up in them: leave `train.micro_batch` out"),
        None if method.mask() == Some(MaskKind::Adaptive)
            || !(parts.has_plain_passes() && parts.pulls.is_empty()) =>
        {
            Some("the method has more than one use for them: leave it out")
        }
        None => None,
    }
}

/// Returns in a sentence why passes of a method cannot be recorded under its settings, if they cannot.
fn recording_obstacle(hyperparameters: &Hyperparameters, method: &dyn Method) -> Option<String> {
    let plain = method.parts().has_plain_passes();
    let of_method = || {
        let name = method.name();
        (!plain).then(|| {
            format!(
                "{name} has other passes than plain fine-tuning, and only those are recorded: leave it out"
            )
        })
    };
    hyperparameters.recording_obstacle().map(str::to_owned).or_else(of_method)
}

/// Multiplies the lists out, the last key varying fastest.
fn grid(typed: &TrainSpec, mut start: GridPoint) -> Result<Vec<GridPoint>> {
    if let Some([first, second]) = typed.betas {
        start.hyperparameters.betas = (first.0, second.0);
    }
    if let Some(stopping) = typed.early_stopping {
        start.hyperparameters.early_stopping = stopping.map(|stopping| stopping.patience.0);
    }
    start.hyperparameters.gradient_checkpointing =
        typed.gradient_checkpointing.unwrap_or(start.hyperparameters.gradient_checkpointing);
    start.cuda_graphs = typed.cuda_graphs.or(start.cuda_graphs);
    start.hyperparameters.release_gradients =
        typed.release_gradients.unwrap_or(start.hyperparameters.release_gradients);
    let mut points = vec![start];
    axis(&mut points, &typed.epochs, |point, value| point.hyperparameters.epochs = value.0)?;
    axis(&mut points, &typed.batch_size, |point, value| point.hyperparameters.batch_size = value.0)?;
    axis(&mut points, &typed.micro_batch, |point, value| point.micro_batch = Some(*value))?;
    axis(&mut points, &typed.max_length, |point, value| point.hyperparameters.max_length = value.0)?;
    axis(&mut points, &typed.learning_rate, |point, value| point.hyperparameters.learning_rate = value.0)?;
    axis(&mut points, &typed.warmup, |point, value| point.warmup = Some(*value))?;
    axis(&mut points, &typed.weight_decay, |point, value| point.hyperparameters.weight_decay = value.0)?;
    axis(&mut points, &typed.max_gradient_norm, |point, value| {
        point.hyperparameters.max_gradient_norm = value.0.filter(|limit| *limit > 0.0);
    })?;
    axis(&mut points, &typed.optimizer, |point, value| point.hyperparameters.optimizer = *value)?;
    axis(&mut points, &typed.epsilon, |point, value| point.hyperparameters.epsilon = value.0)?;
    axis(&mut points, &typed.adamw, |point, value| point.adamw = Some(*value))?;
    axis(&mut points, &typed.precision, |point, value| point.hyperparameters.precision = *value)?;
    axis(&mut points, &typed.order, |point, value| point.hyperparameters.order = *value)?;
    axis(&mut points, &typed.examples, |point, value| point.examples = Some(value.0))?;
    axis(&mut points, &typed.label_noise, |point, value| point.label_noise = value.0)?;
    axis(&mut points, &typed.checkpoint, |point, value| point.hyperparameters.checkpoint = *value)?;
    Ok(points)
}

/// More points than any grid is meant to have.
const MOST_POINTS: usize = 100_000;

/// Replaces each point by one for each value of an axis, if the axis was typed.
fn axis<T>(
    points: &mut Vec<GridPoint>,
    values: &Option<OneOrMany<T>>,
    set: impl Fn(&mut GridPoint, &T),
) -> Result<()> {
    let Some(OneOrMany(values)) = values else { return Ok(()) };
    if points.len().saturating_mul(values.len()) > MOST_POINTS {
        return Err(Error::configuration(format!(
            "train: its lists multiply to more than {MOST_POINTS} settings; shorten them, or divide them among several files"
        )));
    }
    *points = points
        .iter()
        .flat_map(|point| {
            values.iter().map(|value| {
                let mut point = point.clone();
                set(&mut point, value);
                point
            })
        })
        .collect();
    Ok(())
}
