//! Training and evaluation of one run.

mod evaluate;
mod hyperparameters;
mod optimizer;
mod schedule;
mod trainer;

pub use evaluate::{Evaluation, TOKENS_PER_BATCH, Scored, evaluate, frozen_features, predict};
pub use hyperparameters::{AdamWForm, Checkpoint, Freeze, Hyperparameters, Order, Precision, Warmup};
pub use optimizer::AdamW;
pub use schedule::Schedule;
pub use trainer::{Control, Event, Progress, Trained, Trainer, prepare, train};
