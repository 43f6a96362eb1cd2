//! Experiments: YAML as typed, the plan of runs it stands for, the runner, and the result CSV.

mod machine;
mod overrides;
mod plan;
pub mod results;
mod runner;
mod spec;
mod training_set;

pub use machine::graphics_cards;
pub use overrides::Override;
pub use plan::{ModelEntry, Plan, PlanOptions, Run, TaskEntry, named_card};
pub use runner::{RunEvent, Runner, Summary};
pub use spec::{ExperimentSpec, PAPER_SEEDS};
