//! Rows of the results file: what is known of a run before it starts, and what it came to.

use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tch::Device;

use super::cost::method_cost;
use super::entries::Evaluated;
use super::machine;
use super::plan::Plan;
use super::results::{Row, Status};
use super::run::Run;
use crate::data::Objective;
use crate::libtorch;
use crate::train::{Evaluation, Trained};
use crate::values::{hexadecimal, yaml_name};

const MEBIBYTE: f64 = 1024.0 * 1024.0;

/// What one run came to.
pub struct Outcome {
    /// What training left behind.
    pub trained: Trained,
    /// Each evaluation of the run, in order, and how long it took.
    pub evaluations: Vec<(Evaluation, Duration)>,
    /// Most memory held during the run, in bytes.
    pub peak_memory: Option<u64>,
}

/// Makes the row of a run on one data set, with what is known whatever becomes of the run.
pub fn described(plan: &Plan, run: &Run, evaluated: &Evaluated, device: Device, started: SystemTime) -> Row {
    let on = &evaluated.on;
    let source = run.source();
    let overrides = &run.model.overrides;
    let is_regression = matches!(run.task.card.objective, Objective::Regression);
    Row {
        experiment: plan.name.clone(),
        purpose: yaml_name(&run.purpose),
        model: run.model.name.clone(),
        model_sha256: run.model.sha256.clone(),
        model_revision: run.model.revision.clone().unwrap_or_default(),
        config_sha256: hexadecimal(&Sha256::digest(run.config().to_json())),
        tokenizer_sha256: run.model.tokenizer_sha256.clone(),
        model_config: match overrides.is_empty() {
            true => String::new(),
            false => serde_json::Value::Object(overrides.clone()).to_string(),
        },
        source_run: source.run,
        source_task: source.task,
        source_method: source.method,
        source_config: source.method_config,
        source_settings: source.settings,
        train_sha256: run.task.train.sha256.clone(),
        evaluated_on: on.card.name.clone(),
        split: on.split.name().to_owned(),
        evaluated_sha256: evaluated.sha256.clone(),
        preset: yaml_name(&plan.preset),
        headline: on.card.headline.name().to_owned(),
        examples_prepared: run.method.examples_passed(run.training_examples()) as u64,
        passes_per_step: run.method.parts().passes(is_regression) as u64,
        method_state_mb: method_cost(run).ok().map(|cost| cost.method_bytes as f64 / MEBIBYTE),
        examples_evaluated: on.dataset.examples.len() as u64,
        device: machine::device_name(device),
        torch: libtorch::version(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        commit: Some(env!("CHILD_TUNING_COMMIT").to_owned()).filter(|commit| commit != "unknown"),
        started_at: humantime::format_rfc3339_seconds(started).to_string(),
        ..settled(run)
    }
}

/// Makes the part of a run's rows that says what trains, and how.
pub fn settled(run: &Run) -> Row {
    let settings = &run.hyperparameters;
    Row {
        run: run.id.clone(),
        task: run.task.card.name.clone(),
        method: run.method.name().to_owned(),
        method_config: run.method.options(),
        freeze: yaml_name(&settings.freeze),
        head: yaml_name(&run.head),
        seed: run.seed,
        learning_rate: settings.learning_rate,
        epochs: settings.epochs,
        batch_size: settings.batch_size as u64,
        micro_batch: settings.micro_batch.at_most(settings.batch_size) as u64,
        max_length: settings.max_length as u64,
        warmup: settings.warmup.0,
        weight_decay: settings.weight_decay,
        max_gradient_norm: settings.max_gradient_norm,
        optimizer: yaml_name(&settings.optimizer),
        beta1: settings.betas.0,
        beta2: settings.betas.1,
        epsilon: settings.epsilon,
        adamw: yaml_name(&settings.adamw),
        precision: yaml_name(&settings.precision),
        order: yaml_name(&settings.order),
        checkpoint: yaml_name(&settings.checkpoint),
        early_stopping: settings.early_stopping.map(|patience| patience as u64),
        label_noise: run.label_noise,
        examples_train: run.training_examples() as u64,
        ..Row::default()
    }
}

/// Fills in what a run that ended well came to on one of its data sets.
pub fn measured(row: &mut Row, outcome: &Outcome, (evaluation, evaluate_time): &(Evaluation, Duration)) {
    let trained = &outcome.trained;
    let seconds = trained.train_time.as_secs_f64();
    row.status = Status::Ok;
    row.score = Some(evaluation.headline);
    row.loss = Some(evaluation.loss);
    row.degenerate = Some(evaluation.degenerate);
    for (metric, value) in &evaluation.scores {
        *row.column_of(*metric) = Some(*value);
    }
    row.epoch = Some(trained.epoch);
    row.step = Some(trained.step);
    row.train_seconds = Some(seconds);
    row.prepare_seconds = Some(trained.prepare_time.as_secs_f64());
    row.evaluate_seconds = Some(evaluate_time.as_secs_f64());
    row.examples_per_second = Some(trained.examples as f64 / seconds);
    row.tokens_per_second = Some(trained.tokens as f64 / seconds);
    row.peak_memory_mb = outcome.peak_memory.map(|bytes| bytes as f64 / MEBIBYTE);
    row.optimizer_state_mb = Some(trained.optimizer_bytes as f64 / MEBIBYTE);
    row.trainable_parameters = Some(trained.trainable as u64);
    if let Some(mask) = &trained.mask {
        row.child_share = Some(mask.share());
    }
    if let Some(child) = trained.mask.as_ref().and_then(|mask| mask.child()) {
        row.child_parameters = Some(child.kept() as u64);
        row.mask_sha256 = Some(child.sha256());
    }
}
