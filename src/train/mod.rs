//! Training and evaluation of one run.

mod adamw;
mod adamw_device;
mod adamw_host;
mod best_epoch;
mod control;
mod evaluate;
mod hyperparameters;
mod memory;
mod optimizer;
mod prepare;
mod pull;
mod run;
mod schedule;
mod sgd;
mod step_graphs;
mod step_variance;
mod step_weights;
mod trainer;

pub use adamw::AdamW;
pub use control::{Control, Event, Progress};
pub use evaluate::{
    Evaluation, Scored, TOKENS_PER_BATCH, evaluate, first_not_finite, frozen_features, predict,
};
pub use hyperparameters::{
    AdamWForm, Checkpoint, Freeze, Hyperparameters, MicroBatch, OptimizerRule, Warmup,
};
pub use memory::{MemoryUse, available_memory};
pub use optimizer::{Clip, Optimizer};
pub use prepare::prepare;
pub use run::{Trained, train};
pub use sgd::Sgd;
pub use step_variance::{StepVariance, step_variance};
pub use trainer::Trainer;
