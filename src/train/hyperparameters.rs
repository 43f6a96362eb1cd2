//! What a run's training is made of, with no options left.

use std::fmt;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Serialize};

use crate::data::Order;
use crate::model::Precision;

/// How gradients become steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerRule {
    /// Adam with decoupled weight decay, in the form that [`AdamWForm`] says.
    #[default]
    Adamw,
    /// Plain stochastic gradient descent without momentum: w ← (1 − ηλ) w − η g.
    Sgd,
}

impl OptimizerRule {
    /// Returns whether this is the rule where none is typed.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The two forms of AdamW in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdamWForm {
    /// `torch.optim.AdamW`: decay before the update, epsilon beside the bias-corrected root.
    Torch,
    /// The AdamW of transformers 4 and of the released code: decay after the update, epsilon beside the raw root.
    HfLegacy,
}

/// The weights that are scored at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checkpoint {
    /// Those after the last step, as in the paper.
    Last,
    /// Those of the epoch with the best headline metric on the dev set.
    Best,
}

/// The part of the model that training leaves alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freeze {
    /// Nothing: all weights may train.
    #[default]
    Nothing,
    /// Everything but the head: the encoder's features are computed once, without dropout, and keep every bit.
    Encoder,
}

/// The length of the warm-up, as typed: a share of all steps if below 1, a number of steps from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "f64")]
pub struct Warmup(pub f64);

impl TryFrom<f64> for Warmup {
    type Error = String;

    fn try_from(value: f64) -> Result<Self, String> {
        if (0.0..1.0).contains(&value) || (value >= 1.0 && value.fract() == 0.0 && value < 1e12) {
            return Ok(Self(value));
        }
        Err(format!("must be a share of the steps in [0, 1) or a whole number of steps, not {value}"))
    }
}

impl Warmup {
    /// Returns the number of warm-up steps out of `total`; shares are rounded up, as in transformers.
    pub fn steps(self, total: u64) -> u64 {
        if self.0 < 1.0 { (self.0 * total as f64).ceil() as u64 } else { self.0 as u64 }
    }
}

/// The number of examples of one forward and backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatch {
    /// So many.
    Examples(usize),
    /// As many of the batch as fit into memory.
    Auto,
}

impl MicroBatch {
    /// Returns how many examples a pass has at most.
    pub fn at_most(self, batch_size: usize) -> usize {
        match self {
            MicroBatch::Examples(examples) => examples.min(batch_size),
            MicroBatch::Auto => batch_size,
        }
    }
}

impl Serialize for MicroBatch {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MicroBatch::Examples(examples) => serializer.serialize_u64(*examples as u64),
            MicroBatch::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for MicroBatch {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MicroBatchVisitor)
    }
}

struct MicroBatchVisitor;

impl Visitor<'_> for MicroBatchVisitor {
    type Value = MicroBatch;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a whole number of at least 1, or `auto`")
    }

    fn visit_u64<E: serde::de::Error>(self, examples: u64) -> Result<MicroBatch, E> {
        match usize::try_from(examples) {
            Ok(examples @ 1..) => Ok(MicroBatch::Examples(examples)),
            _ => Err(E::invalid_value(Unexpected::Unsigned(examples), &self)),
        }
    }

    fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<MicroBatch, E> {
        match word {
            "auto" => Ok(MicroBatch::Auto),
            _ => Err(E::invalid_value(Unexpected::Str(word), &self)),
        }
    }
}

/// Everything that decides how a run trains, besides data, model, method and seed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hyperparameters {
    /// Passes over the training data; may be fractional.
    pub epochs: f64,
    /// Examples of one optimizer step.
    pub batch_size: usize,
    /// Examples of one forward and backward pass; a step adds up as many as it needs.
    pub micro_batch: MicroBatch,
    /// Longest example in tokens; longer ones are truncated.
    pub max_length: usize,
    /// Highest learning rate of the schedule.
    pub learning_rate: f64,
    /// Length of the linear warm-up; a linear decay to zero follows.
    pub warmup: Warmup,
    /// Decoupled weight decay of matrices and embeddings.
    pub weight_decay: f64,
    /// Largest global gradient norm; `None` does not clip.
    pub max_gradient_norm: Option<f64>,
    /// How gradients become steps.
    // Left out where it is the default, so that runs from before there was a choice keep their ids.
    #[serde(skip_serializing_if = "OptimizerRule::is_default")]
    pub optimizer: OptimizerRule,
    /// Decay rates of Adam's moments.
    pub betas: (f64, f64),
    /// Adam's epsilon.
    pub epsilon: f64,
    /// Form of AdamW.
    pub adamw: AdamWForm,
    /// Number type of the passes.
    pub precision: Precision,
    /// Order of the examples.
    pub order: Order,
    /// Weights that are scored.
    pub checkpoint: Checkpoint,
    /// Part of the model that does not train.
    pub freeze: Freeze,
    /// Epochs without a better dev score after which training stops; `None` never stops early.
    pub early_stopping: Option<usize>,
    /// Whether passes on a GPU are recorded and replayed, if nothing stands in the way
    /// ([`Hyperparameters::recording_obstacle`]). What dropout draws on a GPU depends on it.
    #[serde(skip_serializing_if = "is_true")]
    pub cuda_graphs: bool,
    /// Whether each parameter is updated in backward, as soon as its gradient is there, and the gradient freed. No bit of
    /// the outcome depends on it.
    #[serde(skip)]
    pub release_gradients: bool,
    /// Whether backward computes each layer again instead of keeping what it needs of it. No bit of the outcome depends on
    /// it on the CPU.
    #[serde(skip)]
    pub gradient_checkpointing: bool,
}

fn is_true(value: &bool) -> bool {
    *value
}

impl Default for Hyperparameters {
    /// What an experiment has that says nothing, under the preset `paper`.
    fn default() -> Self {
        Self {
            epochs: 3.0,
            batch_size: 16,
            micro_batch: MicroBatch::Examples(16),
            max_length: 128,
            learning_rate: 4e-5,
            warmup: Warmup(0.1),
            weight_decay: 0.01,
            max_gradient_norm: Some(1.0),
            optimizer: OptimizerRule::Adamw,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            adamw: AdamWForm::Torch,
            precision: Precision::Float32,
            order: Order::Shuffled,
            checkpoint: Checkpoint::Last,
            freeze: Freeze::Nothing,
            early_stopping: None,
            cuda_graphs: true,
            release_gradients: false,
            gradient_checkpointing: false,
        }
    }
}

impl Hyperparameters {
    /// Returns in a sentence why passes on a GPU cannot be recorded under these settings, if they cannot.
    pub fn recording_obstacle(&self) -> Option<&'static str> {
        match self {
            Self { freeze: Freeze::Encoder, .. } => {
                Some("the passes of a frozen encoder's head are too short to gain by a record: leave it out")
            }
            Self { gradient_checkpointing: true, .. } => Some(
                "a layer that is run again seeds the generator, which no record can: leave `train.gradient_checkpointing` out",
            ),
            Self { release_gradients: true, .. } => Some(
                "passes in which the optimizer steps are not recorded: leave `train.release_gradients` out",
            ),
            _ if self.micro_batch.at_most(self.batch_size) < self.batch_size => {
                Some("only passes over whole batches are recorded: leave `train.micro_batch` out")
            }
            Self { precision: Precision::Float32 | Precision::Tf32, .. } => {
                Some("only in bf16 do many batches have one shape: set `train.precision: bf16`")
            }
            _ => None,
        }
    }

    /// Returns the number type of the passes; the head alone is float32 always.
    pub fn pass_precision(&self) -> Precision {
        match self.freeze {
            Freeze::Nothing => self.precision,
            Freeze::Encoder => Precision::Float32,
        }
    }

    /// Returns the number of optimizer steps of one epoch.
    pub fn steps_per_epoch(&self, examples: usize) -> u64 {
        examples.div_ceil(self.batch_size) as u64
    }

    /// Returns the number of optimizer steps of the whole run.
    pub fn total_steps(&self, examples: usize) -> u64 {
        (self.epochs * self.steps_per_epoch(examples) as f64).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_recorded_where_nothing_stands_in_the_way_and_ids_tell_only_who_does_not_want_it() {
        let half = Hyperparameters { precision: Precision::Bf16, ..Hyperparameters::default() };
        assert_eq!((half.cuda_graphs, half.recording_obstacle()), (true, None));
        let others = [
            Hyperparameters::default(),
            Hyperparameters { freeze: Freeze::Encoder, ..half.clone() },
            Hyperparameters { gradient_checkpointing: true, ..half.clone() },
            Hyperparameters { release_gradients: true, ..half.clone() },
            Hyperparameters { micro_batch: MicroBatch::Examples(8), ..half.clone() },
        ];
        assert!(others.iter().all(|settings| settings.recording_obstacle().is_some()));
        let auto = Hyperparameters { micro_batch: MicroBatch::Auto, ..half.clone() };
        assert_eq!(auto.recording_obstacle(), None);
        let names = |settings: &Hyperparameters| {
            serde_json::to_value(settings).unwrap().as_object().unwrap().contains_key("cuda_graphs")
        };
        let without = Hyperparameters { cuda_graphs: false, ..half.clone() };
        assert_eq!([names(&half), names(&without)], [false, true]);
    }
}
