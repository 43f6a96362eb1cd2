//! Experiments: YAML as typed, the plan of runs it stands for, the runner, and the result CSV.

mod overrides;
mod plan;
pub mod results;
mod runner;
mod spec;
mod training_set;

pub use plan::{ModelEntry, Plan, PlanOptions, Run, TaskEntry};
pub use runner::{Outcome, RunEvent, Runner, Summary};
pub use spec::{ExperimentSpec, PAPER_SEEDS};
