//! Experiments: YAML as typed, the plan of runs it stands for, the runner, and the result CSV.

mod entries;
mod forecast;
mod grid;
mod inspection;
mod machine;
mod overrides;
mod plan;
mod profile;
mod resident;
pub mod results;
mod rows;
mod run;
mod runner;
mod selection;
mod spec;
mod start;
mod training_set;
mod transfer;

pub use entries::{Evaluated, ModelEntry, SplitEntry, TaskEntry, data_roots, named_card};
pub use forecast::{Forecast, Speed, forecast};
pub use machine::{device_name, graphics_cards, peak_memory, reset_peak_memory};
pub use overrides::Override;
pub use plan::{Plan, PlanOptions};
pub use resident::Tokens;
pub use run::{Run, RunPurpose};
pub use runner::{RunEvent, Runner, Summary};
pub use selection::{Candidate, Choice, Selection};
pub use spec::{ExperimentSpec, PAPER_SEEDS};
pub use start::Start;
