//! One row of a results file: its columns.

use serde::{Deserialize, Serialize};

use super::text::{count, flag, number};
use crate::data::Metric;
use crate::values::yaml_name;

/// The version of the columns below; a column that is added, dropped or given another meaning raises it.
pub const SCHEMA_VERSION: u32 = 6;

/// The version of the columns of a row, [`SCHEMA_VERSION`] when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchemaVersion(u32);

impl Default for SchemaVersion {
    fn default() -> Self {
        Self(SCHEMA_VERSION)
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Trained and evaluated.
    #[default]
    Ok,
    /// The loss or a gradient stopped being a finite number; training it again would end in the same way.
    Diverged,
    /// Something outside the mathematics went wrong, such as memory or a file; it is tried again.
    Failed,
}

impl Status {
    /// Reads the column of a results file; a word that is not known counts as trained and evaluated.
    pub(super) fn of_field(field: &str) -> Self {
        let is_named = |status: &Self| yaml_name(status) == field;
        [Status::Diverged, Status::Failed].into_iter().find(is_named).unwrap_or_default()
    }
}

/// One run as evaluated on one data set; the fields are the columns, in this order.
///
/// What may be missing is an `Option` and an empty field of the file; so is a number that is NaN.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// [`SCHEMA_VERSION`] at the time of writing.
    pub schema_version: SchemaVersion,

    /// Name of the experiment.
    pub experiment: String,
    /// Hash of the resolved run, 16 hexadecimal characters.
    pub run: String,
    /// Hub id or folder of the pretrained encoder.
    pub model: String,
    /// SHA-256 of the pretrained weights.
    pub model_sha256: String,
    /// Commit of the pretrained encoder on the Hub; empty for a folder.
    pub model_revision: String,
    /// SHA-256 of the config that the model trained with, `model_config` included.
    pub config_sha256: String,
    /// SHA-256 of the files of its tokenizer.
    pub tokenizer_sha256: String,
    /// Task that was trained on.
    pub task: String,
    /// SHA-256 of its training data, of which a run may take a part.
    pub train_sha256: String,
    /// Task that was scored; the same as `task` unless domains are transferred.
    pub evaluated_on: String,
    /// Split of `evaluated_on` that was scored.
    pub split: String,
    /// SHA-256 of the data that were scored.
    pub evaluated_sha256: String,
    /// `report`; `selection` for a trial that chooses hyper-parameters, and `tuned` for a result that has these.
    pub purpose: String,
    /// Keys of the model's config that the experiment overrides, as JSON; empty without any.
    pub model_config: String,
    /// Run whose weights training started from, or the first 16 characters of the SHA-256 of these; empty if the
    /// pretrained ones.
    pub source_run: String,
    /// Task that the source was trained on; of a chain all tasks, between `>`.
    pub source_task: String,
    /// Method of the source; of a chain all methods, between `>`.
    pub source_method: String,
    /// Settings of these methods.
    pub source_config: String,
    /// The [`Row::settings`] of the source and its number of training examples, as `key=value` pairs between spaces; of a chain
    /// all, between `>`.
    pub source_settings: String,
    /// `paper` or `official`.
    pub preset: String,
    /// Name of the fine-tuning method, such as `child_tuning_d`.
    pub method: String,
    /// Settings of the method as `key=value` pairs between spaces, such as `p=0.3 scope=backbone`.
    pub method_config: String,
    /// Part of the model that did not train: `nothing` or `encoder`.
    pub freeze: String,
    /// Whether a head in the weights that training started from was used: `keep` or `fresh`.
    pub head: String,
    /// Seed of the head, the order of examples, dropout and random masks.
    pub seed: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Passes over the training examples.
    pub epochs: f64,
    /// Examples of one optimizer step.
    pub batch_size: u64,
    /// Examples of one forward and backward pass; a step adds up as many passes as it needs.
    pub micro_batch: u64,
    /// Longest input in tokens; what is longer was cut.
    pub max_length: u64,
    /// Warmup: below 1 a share of all optimizer steps, from 1 on a number of steps.
    pub warmup: f64,
    /// Coefficient of the decoupled weight decay.
    pub weight_decay: f64,
    /// Norm that gradients are clipped to; empty if they are not clipped.
    #[serde(default, with = "number")]
    pub max_gradient_norm: Option<f64>,
    /// Rule that turns gradients into steps, `adamw` or `sgd`.
    pub optimizer: String,
    /// Decay rate of Adam's first moment.
    pub beta1: f64,
    /// Decay rate of Adam's second moment.
    pub beta2: f64,
    /// Adam's epsilon.
    pub epsilon: f64,
    /// Rule of the optimizer, `torch` or `hf_legacy`.
    pub adamw: String,
    /// Arithmetic of the forward and backward pass, such as `bf16`.
    pub precision: String,
    /// Order of the training examples, `shuffled` or `sequential`.
    pub order: String,
    /// Checkpoint that was scored, `last` or `best`.
    pub checkpoint: String,
    /// Epochs without a better dev score after which training stopped early; empty if it never does.
    #[serde(default, deserialize_with = "count")]
    pub early_stopping: Option<u64>,
    /// Share of the training labels that were replaced by wrong ones.
    pub label_noise: f64,

    /// How the run ended.
    pub status: Status,
    /// Why it diverged or failed, on one line.
    pub reason: Option<String>,
    /// Name of the headline metric of `evaluated_on`; known before a run starts, so failed runs name it too.
    pub headline: String,
    /// The headline metric, unscaled: 1 is best.
    #[serde(default, with = "number")]
    pub score: Option<f64>,
    /// Share of right answers.
    #[serde(default, with = "number")]
    pub accuracy: Option<f64>,
    /// F1 of the positive class.
    #[serde(default, with = "number")]
    pub f1: Option<f64>,
    /// Matthews correlation.
    #[serde(default, with = "number")]
    pub matthews: Option<f64>,
    /// Pearson correlation.
    #[serde(default, with = "number")]
    pub pearson: Option<f64>,
    /// Spearman correlation.
    #[serde(default, with = "number")]
    pub spearman: Option<f64>,
    /// Plain mean of the task's metrics.
    #[serde(default, with = "number")]
    pub combined: Option<f64>,
    /// Mean loss over the scored examples.
    #[serde(default, with = "number")]
    pub loss: Option<f64>,
    /// Whether every prediction was of one class.
    #[serde(default, deserialize_with = "flag")]
    pub degenerate: Option<bool>,
    /// Epochs behind the scored checkpoint.
    #[serde(default, with = "number")]
    pub epoch: Option<f64>,
    /// Optimizer steps behind the scored checkpoint.
    #[serde(default, deserialize_with = "count")]
    pub step: Option<u64>,

    /// Forward passes over each example of an optimizer step: 1, and those that the method adds.
    pub passes_per_step: u64,
    /// Examples that the method passes over before training.
    pub examples_prepared: u64,
    /// Examples that were trained on; 0 if the run failed before they were read.
    pub examples_train: u64,
    /// Examples that were scored; 0 if the run failed before they were read.
    pub examples_evaluated: u64,
    /// Seconds of training, without what `prepare_seconds` and `evaluate_seconds` hold.
    #[serde(default, with = "number")]
    pub train_seconds: Option<f64>,
    /// Seconds of what comes before training: Fisher information and mask, a first training, or features of a frozen encoder.
    #[serde(default, with = "number")]
    pub prepare_seconds: Option<f64>,
    /// Seconds of scoring.
    #[serde(default, with = "number")]
    pub evaluate_seconds: Option<f64>,
    /// Training examples a second of `train_seconds`.
    #[serde(default, with = "number")]
    pub examples_per_second: Option<f64>,
    /// Real tokens, padding not counted, a second of `train_seconds`.
    #[serde(default, with = "number")]
    pub tokens_per_second: Option<f64>,
    /// Most memory held during the run, in MiB: of the device on CUDA, of the process on the CPU.
    #[serde(default, with = "number")]
    pub peak_memory_mb: Option<f64>,
    /// Optimizer state in MiB.
    #[serde(default, with = "number")]
    pub optimizer_state_mb: Option<f64>,
    /// What the method keeps besides, in MiB, such as a mask.
    #[serde(default, with = "number")]
    pub method_state_mb: Option<f64>,
    /// Number of weights that training can change; those outside a fixed mask do not count.
    #[serde(default, deserialize_with = "count")]
    pub trainable_parameters: Option<u64>,
    /// Weights of the child network; empty for methods without one.
    #[serde(default, deserialize_with = "count")]
    pub child_parameters: Option<u64>,
    /// Child network as a share of the weights in the mask's scope.
    #[serde(default, with = "number")]
    pub child_share: Option<f64>,
    /// SHA-256 of the mask; empty where there is none or a new one at every step.
    pub mask_sha256: Option<String>,

    /// Name of the device.
    pub device: String,
    /// Version of libtorch.
    pub torch: String,
    /// Version of this program.
    pub version: String,
    /// Commit that this program was built from, if it was known.
    pub commit: Option<String>,
    /// Start of the run, RFC 3339 in UTC.
    pub started_at: String,
}

impl Row {
    /// Returns the column of a metric.
    pub fn column_of(&mut self, metric: Metric) -> &mut Option<f64> {
        match metric {
            Metric::Accuracy => &mut self.accuracy,
            Metric::F1 => &mut self.f1,
            Metric::Matthews => &mut self.matthews,
            Metric::Pearson => &mut self.pearson,
            Metric::Spearman => &mut self.spearman,
            Metric::Combined => &mut self.combined,
        }
    }

    /// Returns whether the run was a trial that chose hyper-parameters.
    pub fn is_trial(&self) -> bool {
        self.purpose == "selection"
    }

    /// Returns what a run shares with runs of other methods, by name: how it trains, with all that its preset has settled.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("learning_rate", short(self.learning_rate)),
            ("epochs", short(self.epochs)),
            ("batch_size", self.batch_size.to_string()),
            ("micro_batch", self.micro_batch.to_string()),
            ("max_length", self.max_length.to_string()),
            ("warmup", short(self.warmup)),
            ("weight_decay", short(self.weight_decay)),
            ("max_gradient_norm", self.max_gradient_norm.map_or("none".into(), short)),
            ("optimizer", self.optimizer.clone()),
            ("beta1", short(self.beta1)),
            ("beta2", short(self.beta2)),
            ("epsilon", short(self.epsilon)),
            ("adamw", self.adamw.clone()),
            ("precision", self.precision.clone()),
            ("order", self.order.clone()),
            ("checkpoint", self.checkpoint.clone()),
            ("early_stopping", self.early_stopping.map_or("none".into(), |patience| patience.to_string())),
            ("label_noise", short(self.label_noise)),
            ("freeze", self.freeze.clone()),
            ("head", self.head.clone()),
        ]
    }
}

/// Writes a number as people write hyper-parameters: `0.01`, but `2e-5`.
fn short(number: f64) -> String {
    if number != 0.0 && number.abs() < 1e-3 { format!("{number:e}") } else { number.to_string() }
}
